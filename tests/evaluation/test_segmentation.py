"""Segmentation of patches: the plain version's predictions, the same at any number of ranks."""

import errno
import os
import shutil
import struct
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

from cmtmae_scale.errors import CmtMaeError, ConfigError
from cmtmae_scale.evaluation import masks, segmentation
from cmtmae_scale.evaluation.dense import open_masked_pair, total_excluded
from cmtmae_scale.evaluation.encoders import token_encoder
from cmtmae_scale.evaluation.features import ReadOptions
from cmtmae_scale.evaluation.masks import (
    MaskedSet,
    cut_patches,
    list_pairs,
    masked_batches,
    open_masked,
    read_mask,
    read_pair,
    split_masked,
)
from cmtmae_scale.evaluation.overlap import count_pixels, mean_iou, score_rows
from cmtmae_scale.evaluation.propagation import load_frame, open_clips
from cmtmae_scale.evaluation.segmentation import KnnSegmenter, join_patches, learn_patches, segment
from dataloading.errors import DataError, ReadError
from dataloading.files import open_regular
from dataloading.torch_decode import make_decode
from tests.evaluation.dense_case import (
    ENCODER,
    GRID,
    PATCH,
    POSTSCRIPT,
    SIDE,
    encode_tokens,
    size_of,
    write_clip,
    write_masked,
)
from tests.evaluation.evaluation_case import world
from tests.processes import run_ranks
from tests.references import dense as reference
from tests.runtime.collectives_case import counted_meetings

READING = ReadOptions(4, 2, "torch")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    write_masked(folder / "train", 7, 0, 3)
    write_masked(folder / "test", 5, 50, 3)
    return folder


def read_all(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """All squeezed images and masks of a folder."""
    found = open_masked(str(folder), "train")
    batches = list(masked_batches(found, (SIDE,), READING, world(), CPU))
    return torch.cat([b.images[0] for b in batches]), torch.cat([b.masks for b in batches])


@pytest.mark.parametrize("k", [1, 5])
def test_knn_predicts_the_pixels_of_the_plain_version(place: Path, k: int) -> None:
    fit = learn_patches(ENCODER, open_masked(str(place / "train"), "train"), READING, world(), CPU)
    images, masks = read_all(place / "train")
    pixels = cut_patches(masks, *GRID).flatten(0, 1)
    mostly_void = (pixels == 255).sum(1) * 2 > PATCH * PATCH
    assert not mostly_void.any() and len(fit.table.positions) == len(pixels)
    rows = encode_tokens(images).patches.flatten(0, 1).double().numpy()
    tests = encode_tokens(read_all(place / "test")[0]).patches.flatten(0, 1)
    segmenter = KnnSegmenter(fit, k)
    found = segmenter.vote(segmenter.find(fit.standard(tests).float()))
    expected = reference.knn_pixels(rows, pixels.numpy(), tests.double().numpy(), k)
    same = (fit.classes[found.long()].numpy() == np.array(expected)).mean()
    assert same > 0.999  # equally near patches may come in another order in float64


def test_scores_are_the_plain_versions_pixel_after_pixel(place: Path) -> None:
    _, masks = read_all(place / "test")
    predicted = torch.from_numpy(np.random.default_rng(0).integers(0, 4, masks.shape)).byte()
    counts = count_pixels(torch.arange(len(masks)), masks, predicted)[:, 1:].numpy()
    overlap, accuracy = score_rows("made up", "any", counts)
    assert overlap.value == pytest.approx(reference.mean_iou(predicted.numpy(), masks.numpy()))
    known = masks != 255
    assert accuracy.value == pytest.approx(float((predicted == masks)[known].double().mean()))
    assert overlap.interval is not None and overlap.total == 5
    assert overlap.interval[0] < overlap.value < overlap.interval[1]
    assert score_rows("made up", "any", counts[:1])[0].interval is None
    assert set(overlap.parts or {}) == {"0", "1", "2", "3"}
    with pytest.raises(DataError, match="no pixel of the 5 test images has a class; all are void"):
        score_rows("made up", "any", 0 * counts)
    assert np.isnan(mean_iou(*np.zeros((3, 4))))


def test_cut_and_join_are_inverse(place: Path) -> None:
    _, masks = read_all(place / "test")
    assert torch.equal(join_patches(cut_patches(masks, *GRID).flatten(0, 1), ENCODER), masks)


def segment_place(
    place: Path, strengths: tuple[float, ...] = (), limit: int = 1 << 19
) -> list[tuple[Any, ...]]:
    before, segmentation.MAX_PATCHES = segmentation.MAX_PATCHES, limit
    try:
        train, test = open_masked_pair(str(place), None, None, 0)
        reading = ReadOptions(1, 2, "torch")
        rows, shown = segment(ENCODER, train, test, reading, 0, world(), CPU, [1, 5], strengths)
    finally:
        segmentation.MAX_PATCHES = before
    assert shown is None or set(shown.predicted) == {row.method for row in rows}
    return [(*row[:4], round(row.value, 12), row.interval, row.total) for row in rows]


@pytest.mark.gloo
def test_rows_do_not_depend_on_the_number_of_ranks(place: Path) -> None:
    """The last of three ranks has no image of the last block."""
    both = segment_place(place, (1e-2, 1.0))
    methods = [(row[2].split(",")[0], row[3]) for row in both]
    measures = ("mIoU", "pixel accuracy")
    names = ("k-NN segmentation", "linear segmentation")
    assert methods == [(name, measure) for name in names for measure in measures]
    assert all(row[4] > 0.5 for row in both)  # colours distinguish the classes
    expected = segment_place(place)
    assert expected == both[:2]
    assert run_ranks(3, segment_place, place) == [expected] * 3


def test_few_patches_of_many_images_still_tell_the_classes(place: Path) -> None:
    rows = segment_place(place, limit=7 * 9)
    assert rows[0][4] > 0.5


def test_hyperparameters_need_an_image_to_hold_out(place: Path) -> None:
    train = open_masked(str(place / "train"), "train")
    train.pairs = train.pairs[:1]
    with pytest.raises(ConfigError, match="one training image has patches with a class, and none"):
        segment(ENCODER, train, train, READING, 0, world(), CPU)
    rows, _ = segment(ENCODER, train, train, READING, 0, world(), CPU, [1], [])
    assert rows[0].method == "k-NN segmentation, k=1" and rows[0].value > 0.9


def test_features_that_are_not_finite_are_refused(place: Path) -> None:
    def encode(images: torch.Tensor) -> Any:
        tokens = encode_tokens(images)
        tokens.patches[:1] = torch.nan
        return tokens

    bad = token_encoder("bad weights", SIDE, GRID, encode)
    train, test = open_masked_pair(str(place), None, None, 0)
    with pytest.raises(DataError, match=r"bad weights \(patches\) are not finite for 1 of 4 train"):
        segment(bad, train, test, READING, 0, world(), CPU, [1], [])


def test_unusable_masks_are_counted_or_refused(tmp_path: Path, caplog: Any) -> None:
    folder = write_masked(tmp_path / "set", 6)
    images, masks = folder / "images", folder / "masks"
    (masks / "00.png").unlink()
    Image.new("L", (9, 9)).save(masks / "01.png")
    (masks / "02.png").write_bytes(b"no image")
    shutil.copy(masks / "05.png", masks / "06.png")
    (images / "06.png").write_bytes(POSTSCRIPT)
    (images / "03.png").unlink()
    damaged = (images / "04.png").read_bytes()
    (images / "04.png").write_bytes(damaged[: len(damaged) // 2])
    found = list_pairs(folder, "train")
    assert found.excluded == {
        **{"without a mask": 1, "with a mask of another size": 1, "that cannot be decoded": 2},
        "without an image": 1,
    }
    assert "1 with a mask of another size (first: 01.png)" in caplog.text
    batches = list(masked_batches(found, (SIDE,), READING, world(), CPU))
    assert [b.numbers.tolist() for b in batches] == [[1]] and found.broken == {0}
    assert total_excluded(found)["that cannot be decoded"] == 3


def test_a_store_that_fails_excludes_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_masked(tmp_path / "set", 3)
    write_clip(tmp_path / "clips", "a", 2)

    def fail(file: Path) -> int:
        if file.name in ("01.png", "00001.jpg"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return open_regular(file)

    monkeypatch.setattr("cmtmae_scale.evaluation.masks.open_regular", fail)
    with pytest.raises(ReadError, match=r"01.png: cannot be read \(Input/output error\); try"):
        open_masked(str(folder), "train")
    with pytest.raises(ReadError, match=r"00001.jpg: cannot be read \(Input/output error\)"):
        open_clips(str(tmp_path / "clips"))


def test_images_of_one_name_and_files_that_are_no_images_are_counted(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 3)
    images = folder / "images"
    Image.new("RGB", size_of(images / "00.png")).save(images / "00.jpg")
    (images / "02.png").rename(images / "02.tif")
    (images / ".DS_Store").touch()
    found = list_pairs(folder, "train")
    assert [pair.image for pair in found.pairs] == ["images/01.png"]
    assert found.excluded == {
        "with another image of the same name": 2,
        "that are files of another kind": 1,
        "without an image": 1,
    }


def test_links_to_folders_are_followed_but_not_back(tmp_path: Path) -> None:
    folder, store = write_masked(tmp_path / "set", 2), write_masked(tmp_path / "store", 2)
    (store / "images" / "01.png").unlink()
    for part in ("images", "masks"):
        (folder / part / "more").symlink_to(store / part)
        (store / part / "back").symlink_to(folder / part)
    found = list_pairs(folder, "train")
    assert [pair.image for pair in found.pairs] == [
        f"images/{n}.png" for n in ("00", "01", "more/00")
    ]
    assert found.excluded == {"without an image": 1}


def test_a_folder_that_may_not_be_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_masked(tmp_path / "set", 2)
    (folder / "images" / "locked").mkdir()
    scandir = os.scandir

    def refuse(folder: Path) -> Any:  # root may list every folder
        if Path(folder).name == "locked":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"locked: cannot be listed \(Permission denied\); make it"):
        list_pairs(folder, "train")


def test_a_list_without_folders_above_it_is_refused() -> None:
    with (
        tempfile.NamedTemporaryFile(suffix=".txt", dir="/tmp") as listed,
        pytest.raises(DataError, match="no images with masks are here; name a folder"),
    ):
        open_masked(listed.name, "train")


def refusal_on_this_rank(root: Path) -> str:
    os.chdir(root / str(dist.get_rank()))
    try:
        open_masked_pair("set", None, None, 0)
    except (CmtMaeError, DataError) as error:
        return str(error)
    return ""


@pytest.mark.gloo
def test_a_rank_without_the_folders_ends_all(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write_masked(tmp_path / "0" / "set" / part, 2)
    (tmp_path / "1").mkdir()
    first, second = run_ranks(2, refusal_on_this_rank, tmp_path)
    assert first == f"rank 1: {second}" and second.startswith("set: nothing to test on")


def list_for_long(folder: Path) -> int:
    """Rank 0 lists until the ranks have met twice; returns the number of images."""
    list_now = masks.list_pairs
    with counted_meetings(2) as meetings:

        def list_slowly(path: Path, part: str) -> MaskedSet:
            assert meetings.met.wait(15), "the other ranks wait for rank 0 in one collective"
            return list_now(path, part)

        masks.list_pairs = list_slowly
        try:
            return len(open_masked(str(folder), "train"))
        finally:
            masks.list_pairs = list_now


@pytest.mark.gloo
def test_no_collective_waits_for_a_long_listing_of_masks(tmp_path: Path) -> None:
    """At its time limit it would end the run, and every launch after it."""
    assert run_ranks(2, list_for_long, write_masked(tmp_path / "set", 3)) == [3, 3]


def test_masks_that_can_never_work_are_refused_with_a_remedy(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 3)
    with pytest.raises(DataError, match=r"no such file or folder; name a folder with images/ and"):
        open_masked(str(tmp_path / "absent"), "train")
    with pytest.raises(DataError, match="no images with masks are here"):
        open_masked(str(tmp_path), "train")
    with pytest.raises(ConfigError, match="nothing to test on; give --test PATH or"):
        open_masked_pair(str(folder), None, None, 0)
    size = size_of(folder / "images" / "00.png")
    Image.new("RGB", size).save(folder / "masks" / "00.png")
    with pytest.raises(
        DataError, match=r"00.png: the mask is in colours \(mode RGB\).* one number"
    ):
        open_masked(str(folder), "train")
    Image.fromarray(np.full(size[::-1], 300, np.uint16)).save(folder / "masks" / "00.png")
    found = open_masked(str(folder), "train")
    with pytest.raises(DataError, match="class numbers from 300 to 300; expected 0 to 254"):
        list(masked_batches(found, (SIDE,), READING, world(), CPU))
    for file in (folder / "masks").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="no image with a mask of 3 images: 3 without a mask"):
        open_masked(str(folder), "train")


def test_resamples_of_void_images_alone_are_left_out_of_the_interval() -> None:
    """Warnings are errors here; a quarter of the resamples holds the void image alone."""
    counts = np.zeros((2, 3, 256), np.int64)
    counts[0, :, 1] = 3, 4, 5  # hits, predicted and true pixels
    for row in score_rows("ours", "any", counts.reshape(2, -1)):
        assert row.interval == (row.value, row.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [(255, "have no pixel with a class"), (1, "one class only, 1"), (0, "one class only, 0")],
)
def test_masks_of_one_class_are_refused(tmp_path: Path, value: int, message: str) -> None:
    folder = write_masked(tmp_path / "set", 2)
    for file in (folder / "masks").iterdir():
        Image.new("L", size_of(file), value).save(file)
    found = open_masked(str(folder), "train")
    with pytest.raises(DataError, match=f"{message}.* save a foreground as 1 on 0, not as 255"):
        learn_patches(ENCODER, found, READING, world(), CPU)


def test_a_palette_gives_class_numbers_and_a_split_no_image_twice(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 5)
    expected = read_all(folder)[1]
    for file in (folder / "masks").iterdir():
        with Image.open(file) as opened:
            mask = opened.convert("P")
        mask.putpalette(list(range(255, -1, -1)) * 3)
        mask.save(file)
    assert torch.equal(read_all(folder)[1], expected)
    train, test = split_masked(open_masked(str(folder), "train"), 0.6, 3)
    assert len(train) == 3 and len(test) == 2 and not set(train.pairs) & set(test.pairs)


@pytest.mark.parametrize(("bits", "row"), [(1, 0b01100000), (2, 0b00011011), (4, 0x1F)])
def test_classes_in_grey_of_few_bits_are_those_that_are_stored(
    tmp_path: Path, bits: int, row: int
) -> None:
    """Pillow stretches the levels, so that the highest would be void."""
    header = struct.pack(">IIBBBBB", 8 // bits, 1, bits, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes([0, row]))), (b"IEND", b""))
    data = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        crc = struct.pack(">I", zlib.crc32(kind + content))
        data += struct.pack(">I", len(content)) + kind + content + crc
    (tmp_path / "mask.png").write_bytes(data)
    stored = [row >> (8 - bits * (k + 1)) & (2**bits - 1) for k in range(8 // bits)]
    assert np.asarray(read_mask(tmp_path / "mask.png")).tolist() == [stored]


def test_the_layout_of_pascal_voc_is_read(tmp_path: Path) -> None:
    folder = write_masked(tmp_path / "set", 4)
    root = tmp_path / "VOC2012"
    lists = root / "ImageSets" / "Segmentation"
    for part in (root / "JPEGImages", root / "SegmentationClass", lists):
        part.mkdir(parents=True)
    for file in (folder / "images").iterdir():
        with Image.open(file) as opened:
            opened.save(root / "JPEGImages" / f"{file.stem}.jpg", quality=95)
        shutil.copy(folder / "masks" / file.name, root / "SegmentationClass")
    (lists / "train.txt").write_text("00\n01\n")
    (lists / "val.txt").write_text("02\nabsent\n")
    (lists / "trainaug.txt").write_text("03\n02\n")
    train, test = open_masked_pair(str(root), None, None, 0)
    assert [pair.image for pair in train.pairs] == ["JPEGImages/00.jpg", "JPEGImages/01.jpg"]
    assert len(test) == 1 and test.excluded == {"without an image": 1}
    train = open_masked(str(lists / "trainaug.txt"), "train")
    assert [Path(pair.mask).stem for pair in train.pairs] == ["03", "02"]
    (lists / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val.txt: the list cannot be read"):
        open_masked_pair(str(root), None, None, 0)


@pytest.mark.parametrize("bits", [8, 16])
def test_images_of_16_bits_are_those_that_training_sees(tmp_path: Path, bits: int) -> None:
    """Pillow alone cuts off what is above 255, so that nearly all pixels are white."""
    top = (1 << bits) - 1
    levels = np.linspace(0, top, 24 * 24).round().reshape(24, 24)
    file = tmp_path / "images" / "0.png"
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.fromarray(levels.astype(np.uint16 if bits > 8 else np.uint8)).save(file)
    Image.fromarray(np.zeros((24, 24), np.uint8)).save(tmp_path / "masks" / "0.png")
    decoded = read_pair(open_masked(str(tmp_path), "train"), 0, (24,))
    assert decoded is not None
    expected = make_decode(None)(file.read_bytes()).permute(1, 2, 0).numpy()
    for found in (decoded.views[0], load_frame(file, 24)):
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_allclose(found[..., 0], levels * 255 / top, atol=0.51)
