"""Parquet files as Hugging Face datasets writes them: the views, promises and faults of tars."""

import io
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dataloading.parquet
from cmtmae_scale.tools.data_report import render_data_report, summarise_data
from dataloading.data_set import Request, list_data
from dataloading.entries import MAX_PIXELS
from dataloading.errors import DataError, ReadError, UndecodableError
from dataloading.exchange import index_from_bytes, index_to_bytes
from dataloading.index import Index, build_index, build_listed
from dataloading.kept_index import load_or_build, open_kept, write_index
from dataloading.pack import Pack
from dataloading.parquet_index import require_small_groups
from dataloading.reading import Reader
from dataloading.stream import Batch, Stream
from tests.dataloading.conftest import smooth
from tests.dataloading.tar_case import write_tar
from tests.dataloading.test_parts import equal

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
pq = pytest.importorskip("pyarrow.parquet")

FILES, PER_FILE, GROUP = 2, 20, 5
CLASSES = ("wolf", "ant", "bee")


def encode(number: int) -> bytes:
    file = io.BytesIO()
    smooth(number, 60 + number, 90 - number).save(file, "JPEG", quality=90)
    return file.getvalue()


IMAGES = [encode(number) for number in range(FILES * PER_FILE)]


def write(
    path: Path,
    images: Sequence[Any],
    labels: Sequence[Any] | Any = None,
    names: Sequence[str] | None = None,
    **options: Any,
) -> Path:
    """Write a file: bytes, or dicts of bytes and path, as a struct; and its features if named."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": one, "path": "x.jpg"} if isinstance(one, bytes) else one for one in images]
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    columns: dict[str, Any] = {"image": pa.array(rows, kind)}
    if labels is not None:
        columns["label"] = labels if isinstance(labels, pa.Array) else pa.array(labels)
    table = pa.table(columns)
    if names is not None:
        features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
        text = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": text})
    pq.write_table(table, path, **({"row_group_size": GROUP} | options))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, tars and Parquet files, in the same order."""
    root = tmp_path_factory.mktemp("data")
    for shard in range(FILES):
        rows = range(shard * PER_FILE, (shard + 1) * PER_FILE)
        labels = [i % 3 for i in rows]
        write(
            root / "parquet" / f"train-{shard:05d}-of-{FILES:05d}.parquet",
            [IMAGES[i] for i in rows],
            labels,
            CLASSES,
        )
        members = []
        for i, label in zip(rows, labels, strict=True):
            members += [(f"{i:03d}.jpg", IMAGES[i]), (f"{i:03d}.cls", CLASSES[label].encode())]
            (root / "files").mkdir(exist_ok=True)
            (root / "files" / f"{i:03d}.jpg").write_bytes(IMAGES[i])
        write_tar(root / "tars" / f"train-{shard}.tar", members)
    return root


def content(index: Index) -> list[tuple[bytes, str]]:
    source, labels = index.open(), [*index.labels, ""]
    return [(source.read(i), labels[index.entries["label"][i]]) for i in range(len(index))]


def draw(index: Index, batches: int, **options: Any) -> list[Batch]:
    options = {"worker_type": "thread", "threads": 3, "micro_batch": 8} | options
    with Stream(index, seed=3, sizes=(16,), **options) as stream:
        return [next(stream) for _ in range(batches)]


def same(one: Sequence[Batch], other: Sequence[Batch]) -> bool:
    return all(
        torch.equal(a.images[0], b.images[0])
        and torch.equal(a.sample_id, b.sample_id)
        and bool(a.valid.all() and b.valid.all())
        for a, b in zip(one, other, strict=True)
    )


def test_a_published_index_is_taken_whatever_the_compression(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has 200 times fewer bytes than its images, which the rows count decompressed."""
    images: list[bytes] = []
    for number in range(4):
        file = io.BytesIO()
        Image.new("RGB", (200, 200), (number, 2, 3)).save(file, "BMP")
        images.append(file.getvalue())
    path = write(tmp_path / "data" / "a.parquet", images, [0, 1, 0, 1], CLASSES)
    assert path.stat().st_size < len(images[0])
    listing = list_data(Request(path.parent))
    built = build_listed(listing)
    write_index(listing, built)
    monkeypatch.setattr("dataloading.index_build.examine_parquet", None)
    taken = load_or_build(path.parent, tmp_path / "kept")
    assert equal(taken, built) and content(taken) == content(built)


@pytest.mark.parametrize("shuffle", ["full", "none"])
def test_views_are_those_of_files_and_tars_at_every_position(data: Path, shuffle: str) -> None:
    index = build_index(data / "parquet")
    assert (index.source, len(index), len(index.shards)) == ("parquet", len(IMAGES), FILES)
    views = draw(index, 12, shuffle=shuffle)
    for other in ("files", "tars"):
        assert same(views, draw(build_index(data / other), 12, shuffle=shuffle))
    assert same(views[7:], draw(index, 5, shuffle=shuffle, start_position=56))


@pytest.mark.slow
def test_worker_processes_read_the_same(data: Path) -> None:
    index = build_index(data / "parquet")
    assert same(draw(index, 6), draw(index, 6, worker_type="process", threads=2))


def test_rows_are_named_by_file_and_row(data: Path, tmp_path: Path) -> None:
    index = build_index(data / "parquet" / "train-*.parquet")
    assert index.names[27] == "row 7 of train-00001-of-00002.parquet"
    path, row = index.where(27)
    assert (path.name, row) == ("train-00001-of-00002.parquet", 7)
    assert index.labels == CLASSES and index.entries["label"].tolist()[:4] == [0, 1, 2, 0]
    groups = {at: sum(map(len, IMAGES[at : at + GROUP])) for at in range(0, PER_FILE, GROUP)}
    assert index.row_group == max(
        (size, f"row {at} of train-00000-of-00002.parquet") for at, size in groups.items()
    )
    shutil.copytree(data / "parquet", tmp_path / "copy")
    kept = load_or_build(tmp_path / "copy", tmp_path / "kept")
    again = load_or_build(tmp_path / "copy", tmp_path / "kept")
    shared = open_kept(tmp_path / "copy", tmp_path / "kept", index.digest, kept.list_shards())
    for other in (kept, again, shared, index_from_bytes(index_to_bytes(kept))):
        assert (other.digest, other.labels, other.row_group, list(other.names)) == (
            *(index.digest, index.labels, index.row_group, list(index.names)),
        )
        assert other.source == "parquet" and other.open().read(27) == IMAGES[27]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "data_page_size": 3000, "write_page_index": True},
        {"compression": "snappy", "data_page_version": "2.0", "write_page_checksum": True},
        {"row_group_size": 100, "dictionary_pagesize_limit": 4000},
    ],
    ids=lambda options: options.get("compression", "dictionary"),
)
def test_pages_of_every_kind_are_read(tmp_path: Path, options: dict[str, Any]) -> None:
    images = [*IMAGES[:15], *IMAGES[:3]]  # equal images share an entry of a dictionary
    index = build_index(write(tmp_path / "a.parquet", images, list("aab" * 6), **options))
    assert content(index) == list(zip(images, "aab" * 6, strict=True))


@pytest.mark.parametrize("kind", ["binary", "large_binary", "binary_view", "dictionary"])
def test_images_may_be_a_plain_column_beside_others(tmp_path: Path, kind: str) -> None:
    images = pa.array(IMAGES[:6], pa.binary())
    images = (
        images.dictionary_encode() if kind == "dictionary" else images.cast(getattr(pa, kind)())
    )
    table = pa.table({"caption": ["a.b"] * 6, "img.jpg": images, "width": [1] * 6})
    try:
        pq.write_table(table, tmp_path / "a.parquet")
    except pa.ArrowNotImplementedError as error:
        pytest.skip(f"this pyarrow writes no such column ({error})")
    assert content(build_index(tmp_path)) == [(image, "") for image in IMAGES[:6]]


def test_labels_are_classes_in_their_order_or_values_in_theirs(tmp_path: Path, caplog) -> None:
    def labels(labels: Any, names: Any = None) -> tuple[tuple[str, ...], list[int]]:
        index = build_index(write(tmp_path / "a.parquet", IMAGES[:4], labels, names))
        return index.labels, index.entries["label"].tolist()

    assert labels([1, 0, None, -1], ["b", "a"]) == (("b", "a"), [1, 0, -1, -1])
    assert labels([10, 9, 9, None]) == (("9", "10"), [1, 0, 0, -1])
    assert labels([" cat", "ant", "", "cat"]) == (("ant", "cat"), [1, 0, -1, 1])
    assert labels(pa.array(["z", "y", "z", "z"]).dictionary_encode()) == (("y", "z"), [1, 0, 1, 1])
    assert "no labels are read" not in caplog.text
    assert labels([None, 1.0, 2.0, 3.0]) == ((), [-1] * 4)
    assert "no labels are read from a.parquet: label (double); write them as" in caplog.text
    index = build_index(write(tmp_path / "a.parquet", IMAGES[:3], [0, 2, 1], ["b", "a"]))
    assert index.entries["label"].tolist() == [0, -1, 1]
    assert index.excluded == (
        ("row 1 of a.parquet", "its label is 2, of 2 classes; its image has no label"),
    )


def test_a_report_of_classes_without_a_labelled_image_has_no_nan(tmp_path: Path) -> None:
    for name in ("a", "b"):  # -1 throughout: so Hugging Face datasets writes test sets
        write(tmp_path / f"{name}.parquet", IMAGES[:4], [-1] * 4, CLASSES)
    report = summarise_data(build_index(tmp_path), [], max_bad_fraction=0.0)
    assert "nan" not in render_data_report(report)
    facts = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert (facts["labels"], facts["unlabelled"], facts["labels_per_tar"]) == (3, 8, None)


def test_files_of_one_set_have_the_same_classes(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", IMAGES[:3], [0, 1, 1], ["b", "a"])
    write(tmp_path / "b.parquet", IMAGES[3:6], [0, 1, 1], ["a", "b"])
    with pytest.raises(DataError, match=r"a.parquet and b.parquet have other classes"):
        build_index(tmp_path)
    write(tmp_path / "b.parquet", IMAGES[3:6], [0, 1, 1])
    with pytest.raises(DataError, match=r"have other classes"):
        build_index(tmp_path)
    write(tmp_path / "b.parquet", IMAGES[3:6])
    assert build_index(tmp_path).labels == ("b", "a")


def test_rows_without_bytes_are_counted_with_a_remedy(tmp_path: Path, caplog) -> None:
    absent = [None, {"bytes": None, "path": "a/b.jpg"}, {"bytes": b"", "path": None}, b"no image"]
    index = build_index(write(tmp_path / "a.parquet", [*IMAGES[:4], *absent]))
    assert len(index) == 4
    assert [(one.kind, one.number, one.first) for one in index.passed_over] == [
        ("null", 1, "row 4 of a.parquet"),
        ("path", 1, "row 5 of a.parquet"),
    ]
    assert index.excluded == (
        ("row 6 of a.parquet", "empty file"),
        ("row 7 of a.parquet", "not an image of a known format"),
    )
    assert "row 5 of a.parquet: paths are not followed; embed the bytes" in caplog.text
    write(tmp_path / "a.parquet", [IMAGES[0], *absent[:2]])
    with pytest.raises(DataError, match=r"more than half of the rows, 2 of 3, .*embed the bytes"):
        build_index(tmp_path)
    write(tmp_path / "a.parquet", absent[1:2] * 3)
    with pytest.raises(DataError, match=r"no usable image in 1 Parquet file.*3 with the path"):
        build_index(tmp_path)


def test_a_file_that_is_none_is_refused_and_damage_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", IMAGES[:15], compression="none", use_dictionary=False)
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for damaged, problem in (
        (b"", "is not a Parquet file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
        (whole[: len(whole) // 2], "magic bytes not found in footer"),
        (whole[:footer] + b"\xff" * 20 + whole[footer + 20 :], "thrift"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.parquet: .*{problem}.*") as caught:
            build_index(tmp_path)
        assert caught.value.exit_code == 78
    second = pq.ParquetFile(io.BytesIO(whole)).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(whole[:second] + b"\xff" * 20 + whole[second + 20 :])
    index = build_index(tmp_path)
    assert content(index) == [(image, "") for image in [*IMAGES[:5], *IMAGES[10:15]]]
    ((name, reason),) = index.excluded
    assert name == "row 5 of a.parquet" and reason.startswith("5 rows from here on cannot be dec")
    report = render_data_report(summarise_data(index, [], 0.5))
    assert "unusable: 1 damaged row group;" in report and "1 Parquet file, 10 images" in report


def test_what_changes_after_the_index_is_seen(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", IMAGES[:12])
    index = build_index(path)

    def read(row: int) -> bytes:
        reader = Reader(index, patience_s=0.0)
        try:
            return reader.read(row)
        finally:
            reader.close()

    assert read(11) == IMAGES[11]
    whole = path.read_bytes()
    write(path, IMAGES[12:18])
    with pytest.raises(UndecodableError, match=r"bytes, the index says"):
        read(1)
    with pytest.raises(UndecodableError, match=r"0 bytes, the index says"):
        read(11)
    path.write_bytes(whole[:-100])
    with pytest.raises(UndecodableError, match="magic bytes"):
        read(1)
    pq.write_table(pa.table({"text": ["x"] * 12}), path)
    with pytest.raises(UndecodableError, match="other columns than when indexed"):
        read(1)
    path.unlink()
    with pytest.raises(ReadError, match=r"a.parquet, row 1: No such file"):
        read(1)
    path.write_bytes(whole)
    assert read(1) == IMAGES[1]


def test_a_cut_file_gives_grey_views_and_its_return_the_images(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", IMAGES[:16], compression="none", use_dictionary=False)
    index, whole = build_index(path), path.read_bytes()
    source = index.open()
    assert source.read(0) == IMAGES[0]  # its footer is known now
    path.write_bytes(whole[: len(whole) // 3])
    with pytest.raises(UndecodableError):
        source.read(15)
    (batch,) = draw(index, 1, quarantine=tmp_path / "bad.jsonl", micro_batch=4)
    assert not batch.valid.any()
    line = json.loads((tmp_path / "bad.jsonl").read_text().splitlines()[0])
    assert line["name"] == f"row {line['offset']} of a.parquet" and line["path"] == str(path)
    path.write_bytes(whole)
    assert source.read(15) == IMAGES[15]


def test_neighbours_decode_their_row_group_once(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    original = dataloading.parquet.batches

    def count(path: Path, footer: Any, group: int, columns: Any) -> Any:
        def batches() -> Any:
            opened.append(group)
            yield from original(path, footer, group, columns)

        return batches()

    monkeypatch.setattr(dataloading.parquet, "batches", count)
    index = build_index(data / "parquet")
    opened.clear()
    source = index.open()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, range(len(index)))) == IMAGES
    assert sorted(opened) == sorted([*range(4)] * FILES)
    monkeypatch.setattr(dataloading.parquet, "_KEPT_BYTES", 0)  # only the row group in use is kept
    source.close()
    opened.clear()
    assert [source.read(i) for i in (0, 6, 1, 2)] == [IMAGES[i] for i in (0, 6, 1, 2)]
    assert opened == [0, 1, 0]


def test_a_row_group_larger_than_memory_is_read_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataloading.parquet, "_BUFFER", 4096)
    monkeypatch.setattr(dataloading.parquet, "_BACK_BYTES", 40 * len(IMAGES[0]))
    images, pages = IMAGES * 10, {"write_batch_size": 16, "data_page_size": 1}
    write(tmp_path / "a.parquet", images, row_group_size=1000, use_dictionary=False, **pages)
    source, before = build_index(tmp_path).open(), pa.total_allocated_bytes()
    for i, image in enumerate(images):
        assert source.read(i) == image
        assert pa.total_allocated_bytes() - before < sum(map(len, images)) / 4
    assert source.read(2) == images[2]  # decodes again from the first row on


def test_large_row_groups_are_refused_with_the_command_that_rewrites_them(data: Path) -> None:
    for shuffle in ("full", "window"):
        require_small_groups("D", (32 << 20, "row 0 of a.parquet"), shuffle)
        with pytest.raises(
            DataError, match=r"at row 5 of b.parquet has 100.0 MiB .*check-data D --p"
        ):
            require_small_groups("D", (100 << 20, "row 5 of b.parquet"), shuffle)
    require_small_groups("D", (1 << 40, "row 0 of a.parquet"), "none")
    require_small_groups("D", build_index(data / "tars").row_group, "full")


def test_a_pack_is_that_of_the_same_files_as_tars(data: Path, tmp_path: Path) -> None:
    def pack(kind: str, stop_at: int | None = None) -> dict[str, bytes]:
        def told(done: int) -> None:
            if done == stop_at:
                raise KeyboardInterrupt

        job = Pack(build_index(data / kind), tmp_path / kind, seed=3, shard_bytes=20_000)
        with job.locked():
            record = job.load_record() or job.create_record([])
            job.write(record, threads=2, max_pixels=MAX_PIXELS, report_done=told)
        job.verify_index(record, MAX_PIXELS)
        names = sorted(path.name for path in (tmp_path / kind).iterdir())
        assert not any(name.startswith(".images") for name in names)
        return {name: (tmp_path / kind / name).read_bytes() for name in names if ".tar" in name}

    with pytest.raises(KeyboardInterrupt):
        pack("parquet", stop_at=17)
    (copy,) = (tmp_path / "parquet").glob(".images-*")
    assert copy.read_bytes() == b"".join(IMAGES)
    stale = copy.with_name(".images-of-other-data")
    stale.touch()
    packed = pack("parquet")
    assert len(packed) > 3 and packed == pack("tars")
    assert pack("parquet") == packed  # nothing is missing, and nothing is copied


def test_sources_are_detected_and_splits_refused(data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data / "parquet", folder)
    for path in (folder, folder / "train-*", folder / "train-0000{0,1}-of-00002.parquet"):
        assert build_index(path).digest == build_index(data / "parquet").digest
    write(folder / "test-00000-of-00001.parquet", IMAGES[:2])
    with pytest.raises(
        DataError, match=r"test set, train-\*-of-\*.parquet and test-.*data.path=.*"
    ):
        build_index(folder)
    assert len(build_index(folder / "train-*.parquet")) == len(IMAGES)
    with pytest.raises(
        DataError, match=r"data.source=webdataset reads .tar files; set data.source"
    ):
        build_index(folder / "test-00000-of-00001.parquet", "webdataset")
    with pytest.raises(DataError, match=r"Parquet files are read from a file system, where"):
        build_index(tmp_path)
    (folder / "0.jpg").write_bytes(IMAGES[0])
    with pytest.raises(DataError, match=r"both .parquet files .* and images .*parquet or folder"):
        build_index(folder)
    beside = tmp_path / "images"
    beside.mkdir()
    (beside / "0.jpg").write_bytes(IMAGES[0])
    write(beside / "metadata.parquet", IMAGES[:2])
    assert build_index(beside).source == "folder"
    for address in ("s3://bucket/train-*.parquet", "https://host/a.parquet"):
        with pytest.raises(DataError, match=r"read from a store as tars only; pack them"):
            build_index(address)


def test_a_folder_whose_name_is_not_utf_8_is_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"photos-\xff")
    write(tmp_path / "a.parquet", IMAGES[:4])
    folder.mkdir()
    (tmp_path / "a.parquet").rename(folder / "a.parquet")
    assert content(build_index(folder)) == [(image, "") for image in IMAGES[:4]]


def test_columns_that_are_unknown_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": ["a.jpg"], "label": [1]}), path)
    with pytest.raises(
        DataError, match=r"no column of encoded images, but image \(string\), label"
    ):
        build_index(path)
    pq.write_table(pa.table({"before": [IMAGES[0]], "after": [IMAGES[1]]}), path)
    with pytest.raises(DataError, match=r"columns before, after has the images .*name it image"):
        build_index(path)
    pq.write_table(pa.table({"before": [IMAGES[0]], "image": [IMAGES[1]]}), path)
    assert content(build_index(path)) == [(IMAGES[1], "")]
    for names in (["image", "image", "label"], ["image", "label", "label"]):
        columns = [pa.array([IMAGES[0]]), pa.array([IMAGES[0]]), pa.array([1])]
        pq.write_table(pa.Table.from_arrays(columns, names), path)
        with pytest.raises(DataError, match=r"has several columns named (image|label); give each"):
            build_index(path)
    pq.write_table(pa.table({"image": pa.array([], pa.binary())}), path)
    with pytest.raises(DataError, match=r"no usable image in 1 Parquet file"):
        build_index(path)


def test_without_pyarrow_the_error_names_the_extra(data: Path, monkeypatch) -> None:
    index = build_index(data / "parquet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for attempt in (lambda: build_index(data / "parquet"), index.open):
        with pytest.raises(DataError, match=r"pip install 'cmtmae-scale\[parquet\]'"):
            attempt()
    assert np.array_equal(build_index(data / "tars").entries["size"], index.entries["size"])
