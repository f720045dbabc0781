import io
import json
import logging
import os
import random
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dataloading.progress
import dataloading.sources
import dataloading.webdataset
from dataloading.entries import ENTRY
from dataloading.errors import DataError
from dataloading.index import build_index
from dataloading.kept_index import load_or_build
from dataloading.sources import TarSource
from dataloading.stream import Stream
from tests.dataloading.tar_case import FORMATS, reference, write_tar


@pytest.fixture
def jpegs(picture):
    """Encoded images of different sizes."""

    def encode(i):
        file = io.BytesIO()
        picture(i, 40 + 3 * i, 60 - 2 * i).save(file, "JPEG")
        return file.getvalue()

    return [encode(i) for i in range(12)]


@pytest.fixture
def tars(tmp_path, jpegs):
    """Three shards of four images each, with classes."""
    for shard in range(3):
        content = []
        for i in range(4 * shard, 4 * shard + 4):
            content += [(f"{i:03d}.jpg", jpegs[i]), (f"{i:03d}.cls", f"{i % 5 * 6}".encode())]
        write_tar(tmp_path / "shards" / f"train-{shard:03d}.tar", content)
    return tmp_path / "shards"


def views_of(index):
    with Stream(index, seed=3, micro_batch=8, sizes=(32,), threads=2) as stream:
        return [next(stream) for _ in range(4)]


def test_samples_have_sizes_labels_and_bytes(tars, jpegs):
    index = build_index(tars)
    assert index.source == "webdataset" and len(index) == 12
    assert [path.name for path in index.shards] == [f"train-00{i}.tar" for i in range(3)]
    assert index.labels == ("0", "6", "12", "18", "24")
    assert index.entries["label"].tolist() == [i % 5 for i in range(12)]
    assert index.entries["shard"].tolist() == [i // 4 for i in range(12)]
    assert index.entries.dtype == ENTRY and not index.excluded
    source = index.open()
    for i, row in enumerate(index.entries):
        assert source.read(i) == jpegs[i] and row["size"] == len(jpegs[i])
        assert (row["width"], row["height"]) == (40 + 3 * i, 60 - 2 * i)
    source.close()


def test_names_say_where_the_image_is(tars, jpegs):
    index = build_index(tars)
    assert len(set(index.names)) == len(index.names) == 12
    word, offset, _, shard = index.names[5].split()
    assert word == "byte" and shard == "train-001.tar"
    assert (tars / shard).read_bytes()[int(offset) :].startswith(jpegs[5])
    assert list(index.names[4:6]) == [index.names[4], index.names[5]]
    assert index.names[-1] == index.names[11]


def test_folder_and_tars_of_the_same_pictures_give_the_same_views(photographs, tmp_path):
    folder = build_index(photographs)
    for shard in range(3):
        names = folder.names[4 * shard : 4 * shard + 4]
        content = [
            pair
            for name in names
            for pair in [
                (name, (photographs / name).read_bytes()),
                (name.replace(".jpg", ".cls"), name.partition("/")[0].encode()),
            ]
        ]
        write_tar(tmp_path / "tars" / f"{shard}.tar", content)
    tars = build_index(tmp_path / "tars")
    assert tars.labels == folder.labels
    for field in ("size", "width", "height", "label"):
        assert np.array_equal(tars.entries[field], folder.entries[field])
    for a, b in zip(views_of(folder), views_of(tars), strict=True):
        assert torch.equal(a.sample_id, b.sample_id) and torch.equal(a.view, b.view)
        assert torch.equal(a.position, b.position)
        assert torch.equal(a.images[0], b.images[0]) and a.valid.all() and b.valid.all()


def test_a_path_may_be_a_folder_a_tar_or_a_pattern(tars):
    whole = build_index(tars)
    assert build_index(tars / "train-{000..002}.tar").digest == whole.digest
    assert build_index(f"{tars}/train-{{000,001,002}}.tar", "webdataset").digest == whole.digest
    assert len(build_index(tars / "train-001.tar")) == 4
    backwards = build_index(tars / "train-{002..000}.tar")
    assert [path.name for path in backwards.shards] == [f"train-00{i}.tar" for i in (2, 1, 0)]
    assert backwards.digest != whole.digest
    (tars / "a").mkdir()
    (tars / "train-002.tar").rename(tars / "a" / "train-001.tar")
    index = build_index(tars / "{.,a}" / "train-001.tar", "webdataset")
    assert index.names[0].endswith("of train-001.tar")
    assert index.names[4].endswith("of a/train-001.tar")


def test_digest_is_that_of_a_copy_elsewhere_and_follows_the_content(tars, tmp_path, jpegs):
    digest = build_index(tars).digest
    moved = tars.rename(tmp_path / "elsewhere")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert build_index(moved).digest == digest
    (moved / "train-002.tar").rename(moved / "train-003.tar")
    renamed = build_index(moved).digest
    write_tar(moved / "train-003.tar", [("a.jpg", jpegs[0])])
    assert len({digest, renamed, build_index(moved).digest}) == 3


def test_labels_are_distinct_texts_in_order(tmp_path, jpegs):
    content = [(f"{i}.jpg", jpegs[0]) for i in range(4)]
    content += [("0.cls", b"10\n"), ("1.cls", b" 9"), ("3.cls", b"10"), ("x.cls", b"7")]
    index = build_index(write_tar(tmp_path / "a.tar", content))
    assert index.labels == ("9", "10")
    assert index.entries["label"].tolist() == [1, 0, -1, 1]
    index = build_index(write_tar(tmp_path / "a.tar", [*content, ("2.cls", b"cat")]))
    assert index.labels == ("10", "9", "cat")


def test_key_is_the_name_up_to_the_first_dot_of_the_file(tmp_path, jpegs):
    content = [
        ("v1.0/a.jpg", jpegs[0]),
        ("v1.0/a.cls", b"1"),
        ("v2.0/a.JPEG", jpegs[1]),
        ("v2.0/a.seg.png", b"not an image of the sample"),
        ("v2.0/.hidden.jpg", b"x"),
        ("v2.0/noextension", b"x"),
        ("../b.jpg", jpegs[2]),
        ("/c.jpg", jpegs[3]),
        ("/c.cls", b"2"),
    ]
    index = build_index(write_tar(tmp_path / "a.tar", content))
    assert index.entries["label"].tolist() == [0, -1, -1, 1]
    assert not index.excluded
    assert [index.open().read(i) for i in range(4)] == jpegs[:4]


def test_bad_members_are_excluded_with_reasons(tmp_path, jpegs, picture):
    large = io.BytesIO()
    picture(0, 300, 200).save(large, "PNG")
    content = [
        ("a.jpg", jpegs[0]),
        ("a.jpg", jpegs[1]),
        ("a.png", large.getvalue()),
        ("empty.jpg", b""),
        ("text.jpg", b"this is not an image"),
        ("header.jpg", jpegs[0][:30]),
        ("large.png", large.getvalue()),
        ("a.cls", b"1"),
        ("a.cls", b"2"),
        ("b.cls", b"9" * 300),
        ("b.jpg", jpegs[2]),
    ]
    path = write_tar(tmp_path / "a.tar", content)
    index = build_index(path, max_pixels=59_999)
    offsets = [offset for _, offset, _ in reference(path)]
    second = "a second image of its sample; the first is used"
    assert index.excluded == (
        (f"byte {offsets[1]} of a.tar (a.jpg)", second),
        (f"byte {offsets[2]} of a.tar (a.png)", second),
        (f"byte {offsets[3]} of a.tar (empty.jpg)", "empty file"),
        (f"byte {offsets[4]} of a.tar (text.jpg)", "not an image of a known format"),
        (f"byte {offsets[5]} of a.tar (header.jpg)", "JPEG ends before its frame header"),
        (
            f"byte {offsets[6]} of a.tar (large.png)",
            "300 x 200 has more than 59999 pixels (max_pixels)",
        ),
        (f"byte {offsets[8]} of a.tar (a.cls)", "a second class of its sample; the first is used"),
        (f"byte {offsets[9]} of a.tar (b.cls)", "a class of 300 bytes; its image has no label"),
    )
    assert index.entries["offset"].tolist() == [offsets[0], offsets[10]]
    assert index.entries["label"].tolist() == [0, -1] and index.labels == ("1",)


def test_cut_tar_gives_what_stands_before_the_cut(tars):
    path = tars / "train-001.tar"
    data, (_, offset, size) = path.read_bytes(), reference(path)[4]
    path.write_bytes(data[: offset + size - 10])
    index = build_index(tars)
    name = f"byte {offset} of train-001.tar (006.jpg)"
    assert index.excluded == ((name, "the tar is cut short: 10 bytes are missing"),)
    assert index.entries["shard"].tolist() == [0] * 4 + [1] * 2 + [2] * 4
    path.write_bytes(data[: offset - 100])
    name = f"byte {offset - 512} of train-001.tar"
    reason = "the tar is cut short within a header; the rest of this tar is excluded"
    assert build_index(tars).excluded == ((name, reason),)
    path.write_bytes(data[: offset - 512])
    reason = "no end-of-archive mark: the tar may be cut short"
    assert build_index(tars).excluded == ((name, reason),)


def test_damaged_header_leaves_out_the_rest_of_its_tar_once(tars):
    path = tars / "train-001.tar"
    at = reference(path)[3][1] - 512
    data = bytearray(path.read_bytes())
    data[at + 3] ^= 0x40
    path.write_bytes(data)
    index = build_index(tars)
    reason = "damaged header: its checksum is wrong; the rest of this tar is excluded"
    assert index.excluded == ((f"byte {at} of train-001.tar", reason),)
    assert index.entries["shard"].tolist() == [0] * 4 + [1] * 2 + [2] * 4
    assert index.entries["label"].tolist()[5] == -1 == index.labels.index("0") - 1


@pytest.mark.parametrize("blocks", [2, 20, 21, 22, 64, 5000])  # 21: just filled; 64: tar -b 64
def test_archive_behind_the_end_of_another_is_reported(tmp_path, jpegs, blocks):
    path = write_tar(tmp_path / "a.tar", [("a.jpg", jpegs[0])])
    data = path.read_bytes()
    _, start, length = reference(path)[0]
    end = start + -(-length // 512) * 512
    padded = data[:end] + bytes(512 * blocks)
    path.write_bytes(padded)
    assert build_index(path).excluded == ()
    path.write_bytes(padded + data)
    index = build_index(path)
    assert len(index) == 1
    reason = "data after the end of the archive are excluded"
    assert index.excluded == ((f"byte {end} of a.tar", reason),)


@pytest.mark.parametrize("form", FORMATS)
def test_any_damage_ends_in_an_index_or_in_the_users_error(tmp_path, jpegs, form):
    name = "n" * 90 if form == "ustar" else "n" * 150
    content = [(f"{name}{i}.jpg", jpegs[i]) for i in range(4)] + [("a.cls", b"1")]
    path = write_tar(tmp_path / "a.tar", content, form)
    data, rng = path.read_bytes(), random.Random(5)
    for _ in range(120):
        broken = bytearray(data[: rng.randrange(1, len(data))] if rng.random() < 0.3 else data)
        for _ in range(rng.randrange(20)):
            broken[rng.randrange(len(broken))] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            index = build_index(path)
        except DataError as error:
            assert str(path) in str(error)
        else:
            assert 0 < len(index) <= 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 bytes, a tar has at least 512"),
        (b"x" * 5000, "is not a tar .* at byte 0"),
        (b"\x1f\x8b\x08" + b"\0" * 600, r"is compressed \(gzip\) .* decompress it"),
        (b"\x28\xb5\x2f\xfd" + b"\0" * 600, r"is compressed \(zstd\)"),
        (bytes(10240), "no usable image in 4 tar files; set data.path"),
    ],
)
def test_a_file_that_is_no_tar_is_the_users_error(tars, content, message):
    for path in tars.iterdir():
        path.write_bytes(bytes(10240))
    (tars / "train-999.tar").write_bytes(content)
    with pytest.raises(DataError, match=message):
        build_index(tars)


def test_missing_and_unreadable_tars_are_the_users_error(tars, monkeypatch):
    with pytest.raises(DataError, match=r"train-003.tar: this tar cannot be read \(No such file"):
        build_index(tars / "train-{000..003}.tar")
    with pytest.raises(DataError, match=r"no .tar files found"):
        build_index(tars.parent, "webdataset")
    with pytest.raises(DataError, match=r"names train-000.tar twice"):
        build_index(tars / "train-{000,000}.tar")
    with pytest.raises(DataError, match=r"\{0-2\} is not a range"):
        build_index(tars / "train-{0-2}.tar")
    with pytest.raises(DataError, match="expands to more than 1000000 files"):
        build_index(tars / "train-{0..99999999999}.tar")
    os.mkfifo(tars / "train-004.tar")
    with pytest.raises(DataError, match=r"train-004.tar: is not a regular file"):
        build_index(tars)
    (tars / "train-004.tar").unlink()
    opened = os.open

    def refuse(path, flags, *rest):
        if str(path).endswith("train-001.tar"):
            raise PermissionError(13, "Permission denied")
        return opened(path, flags, *rest)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"train-001.tar: .* cannot be read \(Permission denied\)"):
        build_index(tars)


def test_tars_beside_images_need_a_word_from_the_user(tars, picture):
    (tars / "class0").mkdir()
    picture(0, 20, 30).save(tars / "class0" / "a.png")
    with pytest.raises(DataError, match=r"both .tar files .* and images .* set data.source"):
        build_index(tars)
    assert len(build_index(tars, "webdataset")) == 12
    assert len(build_index(tars, "folder")) == 1


def test_kept_index_is_small_mapped_and_used_while_the_tars_are_the_same(
    tars, tmp_path, monkeypatch, jpegs
):
    (tars / "train-003.tar").write_bytes((tars / "train-002.tar").read_bytes()[:-2000])
    kept = tmp_path / "kept"
    built = load_or_build(tars, kept)
    assert ENTRY.itemsize == 25
    (columns,) = kept.glob("index-*.bin")
    assert columns.stat().st_size == -(-25 * len(built) // 64) * 64
    assert json.loads((kept / "index.json").read_text())["images"] == len(built)
    with monkeypatch.context() as patch:
        patch.delattr(dataloading.webdataset, "list_members")  # walking a tar would fail
        loaded = load_or_build(tars, kept)
        elsewhere = load_or_build(tars / "train-{000..003}.tar", kept)
    assert not loaded.entries.flags.writeable
    assert np.array_equal(loaded.entries, built.entries)
    for index in (loaded, elsewhere):
        assert index.digest == built.digest and list(index.names) == list(built.names)
        assert index.labels == built.labels and index.excluded == built.excluded
        assert [index.open().read(i) for i in range(12)] == jpegs
    os.utime(tars / "train-001.tar", (5, 5))
    write_tar(tars / "train-003.tar", [("a.jpg", jpegs[0])])
    assert len(load_or_build(tars, kept)) == 13


def test_source_opens_lazily_reads_in_threads_and_closes(tars, jpegs, monkeypatch):
    index = build_index(tars)
    for limit in (512, 1):
        monkeypatch.setattr(dataloading.sources, "_MAX_OPEN", limit)
        before = len(os.listdir("/proc/self/fd"))
        source = index.open()
        assert isinstance(source, TarSource)
        assert len(os.listdir("/proc/self/fd")) == before
        wrong = []

        def read(source=source, wrong=wrong):
            wrong.extend(i for i in [*range(12)] * 20 if source.read(i) != jpegs[i])

        threads = [threading.Thread(target=read) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert len(os.listdir("/proc/self/fd")) == before + min(3, limit)
        source.close()
        source.close()
        assert len(os.listdir("/proc/self/fd")) == before
        source.read(0)
        del source, read
        assert len(os.listdir("/proc/self/fd")) == before


def test_tar_that_changed_after_indexing_makes_views_invalid(tars):
    index = build_index(tars)
    (tars / "train-001.tar").write_bytes((tars / "train-001.tar").read_bytes()[:1500])
    batch = views_of(index)[0]
    cut = {4, 5, 6, 7}
    assert cut & set(batch.sample_id.tolist())
    assert set(batch.sample_id[~batch.valid].tolist()) == cut & set(batch.sample_id.tolist())


def test_progress_is_logged_where_there_is_no_terminal(tars, monkeypatch, caplog, photographs):
    monkeypatch.setattr(dataloading.progress, "PROGRESS_S", 0.0)
    with caplog.at_level(logging.INFO):
        build_index(tars)
        build_index(photographs)
    assert any("2/3 [" in line and "tars/s" in line for line in caplog.messages)
    assert any(line.startswith("indexing: 100%") and "12/12" in line for line in caplog.messages)


def test_real_photographs_in_tars():
    default = Path(__file__).parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("CMTMAE_TEST_DATA", default)) / "imagenet-samples"
    if not folder.is_dir():
        pytest.skip(f"no real images: {folder} is absent (set CMTMAE_TEST_DATA)")
    index = build_index(folder)
    assert len(index) == 329 and len(index.labels) == 329 and not index.excluded
    assert sorted(index.entries["label"].tolist()) == list(range(329))
    expected = [row for tar in sorted(folder.glob("*.tar")) for row in reference(tar)]
    images = [(offset, size) for name, offset, size in expected if name.endswith(".jpg")]
    assert [(int(row["offset"]), int(row["size"])) for row in index.entries] == images
    source = index.open()
    for i in range(0, 329, 7):
        with Image.open(io.BytesIO(source.read(i))) as image:
            assert image.size == (index.entries[i]["width"], index.entries[i]["height"])
