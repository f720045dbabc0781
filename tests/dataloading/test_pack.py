"""A pack holds every good image once, in random order, however often it was interrupted."""

import json
import os
import resource
import signal
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest

from dataloading.check import Fault, check_samples
from dataloading.entries import MAX_PIXELS
from dataloading.errors import DataError, ReadError
from dataloading.index import Index, build_index
from dataloading.pack import Pack, PackRecord
from dataloading.packed_tar import extension
from tests.dataloading.tar_case import write_tar
from tests.processes import CONTEXT

SHARD = 9_000  # bytes; some three images


@pytest.fixture
def source(tmp_path: Path, picture) -> Index:
    """Twenty-one images of three classes and one of none, of four formats."""
    root = tmp_path / "photos"
    for number in range(22):
        folder = root / f"class {number % 3}" if number else root
        folder.mkdir(parents=True, exist_ok=True)
        form = ("JPEG", "JPEG", "PNG", "WEBP")[number % 4]
        picture(number, 40 + number, 50).save(folder / f"{number:02d}.jpg", form)
    return build_index(root)


def pack(
    index: Index, out: Path, excluded=(), seed=3, size=SHARD, tell=lambda done: None, patience_s=1.0
) -> PackRecord:
    job = Pack(index, out, seed=seed, shard_bytes=size, patience_s=patience_s)
    with job.locked():
        plan = job.load_record() or job.create_record(excluded)
        job.write(plan, threads=2, max_pixels=MAX_PIXELS, report_done=tell)
    job.verify_index(plan, MAX_PIXELS)
    return plan


def content(index: Index) -> list[tuple[bytes, str]]:
    reader = index.open()
    labels = [*index.labels, ""]
    pairs = [
        (reader.read(i), labels[label]) for i, label in enumerate(index.entries["label"].tolist())
    ]
    reader.close()
    return pairs


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_a_pack_holds_the_same_bytes_and_labels_in_another_order(source, tmp_path) -> None:
    told: list[int] = []
    plan = pack(source, tmp_path / "out", tell=told.append)
    packed = build_index(tmp_path / "out")
    assert packed.source == "webdataset" and len(packed.shards) == plan.shards > 3
    before, after = content(source), content(packed)
    assert sorted(before) == sorted(after) and before != after
    assert packed.labels == source.labels == ("class 0", "class 1", "class 2")
    counts = [(packed.entries["shard"] == shard).sum() for shard in range(plan.shards)]
    assert max(counts) - min(counts) <= 1
    assert told == sorted(told) and told[-1] == 22
    last = plan.shards - 1
    pattern = build_index(tmp_path / "out" / f"train-{{000000..{last:06d}}}.tar")
    assert pattern.digest == packed.digest


def test_members_are_named_by_content_and_say_nothing_of_the_machine(source, tmp_path) -> None:
    pack(source, tmp_path / "out", size=10**9)
    (path,) = (tmp_path / "out").glob("*.tar")
    with tarfile.open(path) as tar:
        list_members = tar.getmembers()
    assert all(m.mtime == m.uid == m.gid == 0 and m.mode == 0o644 for m in list_members)
    assert all(m.uname == m.gname == "" for m in list_members)
    names = [m.name for m in list_members]
    assert len([name for name in names if name.endswith(".cls")]) == 21
    forms = [name.rsplit(".")[1] for name in names if not name.endswith(".cls")]
    assert {form: forms.count(form) for form in set(forms)} == {"jpg": 12, "png": 5, "webp": 5}
    assert [name.split(".")[0] for name in names if not name.endswith(".cls")] == [
        f"{k:09d}" for k in range(22)
    ]


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_formats_have_their_extension(picture, tmp_path, form) -> None:
    picture(0, 8, 8).save(tmp_path / "x", form)
    expected = {"JPEG": "jpg", "TIFF": "tif"}.get(form, form.lower())
    assert extension((tmp_path / "x").read_bytes()) == expected


def test_packing_again_gives_the_same_files_and_another_seed_others(source, tmp_path) -> None:
    pack(source, tmp_path / "a")
    pack(source, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    pack(source, tmp_path / "c", seed=4)
    one, two = content(build_index(tmp_path / "a")), content(build_index(tmp_path / "c"))
    assert one != two and sorted(one) == sorted(two)


def test_tars_can_be_packed_and_packed_again(source, tmp_path) -> None:
    pack(source, tmp_path / "a")
    pack(build_index(tmp_path / "a"), tmp_path / "b", seed=9)
    again = build_index(tmp_path / "b")
    assert sorted(content(again)) == sorted(content(source))
    assert again.labels == source.labels


def test_bad_samples_are_excluded_and_recorded(source, tmp_path) -> None:
    bad = [Fault(i, source.names[i], "cut") for i in (0, 7, 21)]
    plan = pack(source, tmp_path / "out", excluded=bad)
    expected = [pair for i, pair in enumerate(content(source)) if i not in (0, 7, 21)]
    assert sorted(content(build_index(tmp_path / "out"))) == sorted(expected)
    record = json.loads((tmp_path / "out" / "pack.json").read_text())
    assert [fault[1] for fault in record["excluded"]] == [fault.name for fault in bad]
    assert pack(source, tmp_path / "out").excluded == plan.excluded  # remembered


def pack_until_killed(index_of: Path, out: Path) -> None:
    def tell(done: int) -> None:
        if done == 12:
            os.kill(os.getpid(), signal.SIGKILL)

    pack(build_index(index_of), out, tell=tell)


def test_a_killed_pack_continues_and_ends_with_the_same_bytes(source, tmp_path) -> None:
    out = tmp_path / "out"
    child = CONTEXT.Process(target=pack_until_killed, args=(source.root, out))
    child.start()
    child.join(timeout=120)
    assert child.exitcode == -signal.SIGKILL
    before = files(out)
    assert any(name.endswith(".tmp") for name in before)  # it was in the middle of a tar
    finished = [name for name in before if name.endswith(".tar")]
    assert len(finished) >= 2
    times = {name: (out / name).stat().st_mtime_ns for name in finished}
    pack(source, out)
    assert times == {name: (out / name).stat().st_mtime_ns for name in finished}  # not rewritten
    pack(source, tmp_path / "undisturbed")
    assert files(out) == files(tmp_path / "undisturbed")


def test_an_end_between_tar_and_record_costs_only_that_tar(source, tmp_path) -> None:
    plan = pack(source, tmp_path / "out")
    (tmp_path / "out" / ".notes.tmp").write_bytes(b"of somebody else")
    before = files(tmp_path / "out")
    record = json.loads(before["pack.json"])
    record["done"] = {"train-000000.tar": plan.done["train-000000.tar"]}
    (tmp_path / "out" / "pack.json").write_text(json.dumps(record))
    (tmp_path / "out" / "train-000001.tar").write_bytes(b"of an earlier life")
    pack(source, tmp_path / "out")
    assert files(tmp_path / "out") == before


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "empty"])
def test_a_finished_tar_that_is_damaged_is_written_again(source, tmp_path, damage, caplog) -> None:
    pack(source, tmp_path / "out")
    before = files(tmp_path / "out")
    path = tmp_path / "out" / "train-000001.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    new = {"flipped": bytes(data), "cut": bytes(data[:3000]), "empty": b""}
    path.unlink() if damage == "missing" else path.write_bytes(new[damage])
    pack(source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert "train-000001.tar" in caplog.text and "written again" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 4}, "another seed: 3, now 4"), ({"size": 3 * SHARD}, "another number of tars")],
)
def test_another_plan_in_the_same_folder_is_refused(source, tmp_path, change, message) -> None:
    pack(source, tmp_path / "out")
    before = files(tmp_path / "out")
    with pytest.raises(DataError, match=message):
        pack(source, tmp_path / "out", **change)
    assert files(tmp_path / "out") == before


def test_other_images_and_other_labels_are_refused(source, tmp_path) -> None:
    pack(source, tmp_path / "out")
    (source.root / "class 1").rename(source.root / "class 1b")
    with pytest.raises(DataError, match="was begun with other images"):
        pack(build_index(source.root), tmp_path / "out")
    images = [("0.jpg", (source.root / "class 0" / "03.jpg").read_bytes())]
    one = build_index(write_tar(tmp_path / "x.tar", [*images, ("0.cls", b"1")]))
    pack(one, tmp_path / "tars")
    (tmp_path / "x.tar").unlink()
    other = build_index(write_tar(tmp_path / "x.tar", [*images, ("0.cls", b"2")]))
    assert other.digest == one.digest
    with pytest.raises(DataError, match="was begun with other labels"):
        pack(other, tmp_path / "tars")


@pytest.mark.parametrize("name", ["old.tar", "photo.jpg", "folder/"])
def test_a_folder_with_other_things_is_refused(source, tmp_path, name) -> None:
    (tmp_path / "out").mkdir()
    path = tmp_path / "out" / name
    path.mkdir() if name.endswith("/") else path.write_bytes(b"precious")
    with pytest.raises(DataError, match=r"holds .* and no pack.json; name an empty"):
        pack(source, tmp_path / "out")
    assert path.is_dir() or path.read_bytes() == b"precious"


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"format": 3}', '{"format": 2, "excluded": [], "done": [1]}']
)
def test_a_record_that_is_not_ours_is_refused(source, tmp_path, text) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "pack.json").write_text(text)
    with pytest.raises(DataError, match=r"pack.json: cannot be understood"):
        pack(source, tmp_path / "out")


def test_two_packs_at_once_do_not_meet(source, tmp_path) -> None:
    first, second = (Pack(source, tmp_path / "out", seed=3, shard_bytes=SHARD) for _ in range(2))
    refused = pytest.raises(DataError, match="another pack is being written there")
    with first.locked(), refused, second.locked():
        pytest.fail("both packs hold the folder")
    with second.locked():
        pass


def test_a_full_disk_stops_cleanly_and_the_rest_follows(source, tmp_path) -> None:
    """A limit of the file size stands for the disk: the write fails in the middle of a tar."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(
            DataError, match=r"cannot be written \(.*\); 0 of \d+ tars are there, the others need"
        ):
            pack(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert sorted(files(tmp_path / "out")) == [".pack.lock", "pack.json"]
    pack(source, tmp_path / "out")
    assert sorted(content(build_index(tmp_path / "out"))) == sorted(content(source))


def test_a_folder_that_cannot_be_made_is_named(source, tmp_path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match=r"file/out: cannot be written"):
        pack(source, tmp_path / "file" / "out")


def test_a_source_that_fails_midway_is_named_and_the_pack_can_go_on(source, tmp_path) -> None:
    hidden = source.root / source.names[5]
    hidden.rename(tmp_path / "away")
    with pytest.raises(ReadError, match=rf"{source.names[5]}: No such file or directory, tried"):
        pack(source, tmp_path / "out", patience_s=0.1)
    assert not list((tmp_path / "out").glob(".*.tmp"))
    (tmp_path / "away").rename(hidden)
    pack(source, tmp_path / "out")


def test_a_source_that_fails_while_it_is_checked_is_not_packed_without_the_image(
    source, tmp_path
) -> None:
    gone = Path(source.root, source.names[4])
    gone.rename(tmp_path / "kept.jpg")
    excluded, _ = check_samples(source, 2, lambda done: None, patience_s=0.1)
    assert [fault.name for fault in excluded] == [source.names[4]]
    with pytest.raises(ReadError, match=f"{gone.name} cannot be read: No such file .* without it"):
        pack(source, tmp_path / "out", excluded)
    assert not (tmp_path / "out" / "pack.json").exists()
    (tmp_path / "kept.jpg").rename(gone)
    assert not pack(source, tmp_path / "out").excluded


@pytest.mark.parametrize("label", ["class 0 ", "\ufeffclass 0", "x" * 257])
def test_labels_that_tars_cannot_keep_are_refused(source, tmp_path, label) -> None:
    index = replace(source, labels=(label, *source.labels[1:]))
    with pytest.raises(DataError, match=r"the label '.+' cannot be packed") as refused:
        Pack(index, tmp_path / "out", seed=0, shard_bytes=SHARD)
    assert "at most 256 bytes without spaces or a byte-order mark" in str(refused.value)
    # A class without images is not packed.
    Pack(replace(source, labels=(*source.labels, label)), tmp_path, seed=0, shard_bytes=SHARD)


def test_foreign_tars_beside_a_pack_are_noticed(source, tmp_path) -> None:
    pack(source, tmp_path / "out")
    data = (source.root / source.names[0]).read_bytes()
    write_tar(tmp_path / "out" / "zzz.tar", [("x.jpg", data)])
    with pytest.raises(DataError, match="remove what this pack did not write"):
        pack(source, tmp_path / "out")
