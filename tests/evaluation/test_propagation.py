"""Label propagation: the plain version's labels and contours, clear refusals."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.functional import normalize

from cmtmae_scale.evaluation.propagation import (
    WINDOW,
    contour_accuracy,
    load_frame,
    open_clips,
    patch_labels,
    propagate,
    propagate_clips,
    region_similarity,
    upsample_labels,
    window_mask,
)
from dataloading.errors import DataError
from tests.evaluation.dense_case import ENCODER, POSTSCRIPT, draw, write_clip, write_huge_png
from tests.evaluation.evaluation_case import world
from tests.processes import run_ranks
from tests.references import dense as reference

CPU = torch.device("cpu")


def test_labels_are_the_plain_versions() -> None:
    rng = np.random.default_rng(0)
    grid = (10, 7)
    frames = [normalize(torch.from_numpy(rng.normal(size=(70, 6))), dim=1) for _ in range(3)]
    labels = [torch.from_numpy(rng.random((70, 3))) for _ in range(2)]
    sources = list(zip(frames[1:], labels, strict=True))
    found = propagate(frames[0], sources, window_mask(grid, CPU))
    plain = [(a.numpy(), b.numpy()) for a, b in sources]
    window = (round(WINDOW * 10), max(round(WINDOW * 7), 1))
    expected = reference.propagate(frames[0].numpy(), plain, grid, window)
    assert np.allclose(found.numpy(), expected, atol=1e-9)


def test_j_and_f_are_the_plain_versions() -> None:
    a, b = (draw(number, (40, 33))[1] == 1 for number in (0, 3))
    assert contour_accuracy(a, b) == pytest.approx(reference.contour_f(a, b))
    assert 0 < contour_accuracy(a, b) < 1 == contour_accuracy(a, a)
    moved = np.roll(a, 1, axis=1)
    assert contour_accuracy(a, moved) == pytest.approx(reference.contour_f(a, moved))
    assert region_similarity(a, b) == (a & b).sum() / (a | b).sum()
    empty = np.zeros_like(a)
    assert region_similarity(empty, empty) == contour_accuracy(empty, empty) == 1
    assert region_similarity(a, empty) == contour_accuracy(a, empty) == 0


def test_the_label_of_a_patch_is_each_classes_fraction() -> None:
    mask = np.array([[0, 1, 5, 5], [0, 1, 5, 255]], np.uint8)
    found = patch_labels(mask, [0, 1, 5], (1, 2), CPU)
    assert found.tolist() == [[0.5, 0.5, 0], [0, 0, 0.75]]


@pytest.mark.parametrize("noise", [0.0, 1e-7])
def test_an_object_that_fills_the_frame_stays_an_object(noise: float) -> None:
    """A class that does not vary beyond rounding has no range over which it could be scaled."""
    labels = torch.zeros(9, 2)
    labels[:, 1] = 1 - noise * torch.arange(9) / 8
    assert np.unique(upsample_labels(labels, [0, 7], (3, 3), (6, 6))).tolist() == [7]
    faint = torch.tensor([0.0, 1e-9]).repeat(9, 1) * torch.arange(9)[:, None]
    assert 7 in upsample_labels(faint, [0, 7], (3, 3), (6, 6)), "however faint, as in DINO"


def rows_of(root: Path) -> list[Any]:
    rows, shown = propagate_clips(ENCODER, open_clips(str(root)).clips, world(), CPU)
    assert shown is None or shown.predicted.shape == (24, 24)
    return [(row.measure, row.value, row.interval, row.total, row.parts) for row in rows]


@pytest.mark.gloo
def test_a_moving_square_is_followed_at_any_number_of_ranks(tmp_path: Path) -> None:
    for number, name in enumerate(("bear", "car")):
        write_clip(tmp_path, name, 4 + number, number)
    expected = rows_of(tmp_path)
    assert [row[0] for row in expected] == ["J&F", "J", "F"]
    assert expected[1][1] > 0.6 and set(expected[1][4]) == {"bear/1", "car/1"}
    assert expected[0][1] == pytest.approx((expected[1][1] + expected[2][1]) / 2)
    assert run_ranks(3, rows_of, tmp_path) == [expected] * 3


def clips_on_this_rank(root: Path) -> list[str]:
    os.chdir(root / str(dist.get_rank()))
    return [f"{one.name} {one.frames[-1]} {one.masks[1]}" for one in open_clips("clips").clips]


@pytest.mark.gloo
def test_the_clips_are_those_of_rank_0(tmp_path: Path) -> None:
    """Ranks with lists of their own would divide clips of different lists."""
    write_clip(tmp_path / "0" / "clips", "b", 2)
    for name in ("a", "b"):
        write_clip(tmp_path / "1" / "clips", name, 3)
    frame, mask = (f"clips/{kind}/480p/b/00001" for kind in ("JPEGImages", "Annotations"))
    assert run_ranks(2, clips_on_this_rank, tmp_path) == [[f"b {frame}.jpg {mask}.png"]] * 2


def test_unusable_clips_are_counted_or_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such folder; name a folder in DAVIS's layout"):
        open_clips(str(tmp_path / "absent"))
    with pytest.raises(DataError, match="no JPEGImages/ and Annotations/ are here"):
        open_clips(str(tmp_path))
    for name in ("good", "bare", "void", "short", "other"):
        write_clip(tmp_path, name, 3)
    masks = tmp_path / "Annotations" / "480p"
    (masks / "good" / "00001.png").unlink()
    (masks / "bare" / "00000.png").unlink()
    Image.new("L", (48, 48), 255).save(masks / "void" / "00000.png")
    Image.new("L", (9, 9)).save(masks / "other" / "00001.png")
    for number in (1, 2):
        (tmp_path / "JPEGImages" / "480p" / "short" / f"0000{number}.jpg").unlink()
    found = open_clips(str(tmp_path))
    assert [clip.name for clip in found.clips] == ["good"]
    assert found.excluded == {
        "clips without a mask of the first frame": 1,
        "clips with a mask of another size than its frame": 1,
        "clips of fewer than two frames": 1,
        "clips without an object in the first mask (0 is the background, 255 void)": 1,
        "frames without a mask": 1,
    }
    rows = propagate_clips(ENCODER, found.clips, world(), CPU)[0]
    assert rows[0].interval is None and rows[0].total == 1
    write_huge_png(masks / "other" / "00000.png")
    (tmp_path / "JPEGImages" / "480p" / "void" / "00000.jpg").write_bytes(POSTSCRIPT)
    found = open_clips(str(tmp_path))
    assert found.excluded["clips that cannot be decoded"] == 2
    write_huge_png(masks / "good" / "00002.png")
    with pytest.raises(DataError, match=r"00002.png: cannot be decoded .*remove its clip"):
        propagate_clips(ENCODER, found.clips, world(), CPU)
    frame = tmp_path / "JPEGImages" / "480p" / "good" / "00002.jpg"
    frame.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"00002.jpg: cannot be decoded .*remove its clip"):
        propagate_clips(ENCODER, found.clips, world(), CPU)
    Image.new("RGB", (48, 48)).save(masks / "good" / "00000.png")
    with pytest.raises(DataError, match="in colours"):
        open_clips(str(tmp_path))


def test_frames_follow_the_numbers_in_their_names(tmp_path: Path) -> None:
    write_clip(tmp_path, "a", 11)
    frames, masks = (tmp_path / kind / "480p" / "a" for kind in ("JPEGImages", "Annotations"))
    for number in range(11):
        (frames / f"{number:05d}.jpg").rename(frames / f"take2_{number}.jpeg")
        (masks / f"{number:05d}.png").rename(masks / f"take2_{number}.png")
    (clip,) = open_clips(str(tmp_path)).clips
    assert [file.stem for file in clip.frames] == [f"take2_{number}" for number in range(11)]
    assert [file.stem for file in clip.masks.values()].count("take2_2") == 1
    assert clip.masks == {i: masks / f"{file.stem}.png" for i, file in enumerate(clip.frames)}


def test_files_without_a_partner_are_counted(tmp_path: Path) -> None:
    for name in ("a", "masks", "twice"):
        write_clip(tmp_path, name, 4)
    frames, masks = (tmp_path / kind / "480p" for kind in ("JPEGImages", "Annotations"))
    (frames / "a" / "00002.jpg").unlink()
    (frames / "a" / "notes.txt").touch()
    (frames / "a" / ".DS_Store").touch()
    (frames / "masks").rename(tmp_path / "away")
    (frames / "twice" / "00001.png").write_bytes((masks / "twice" / "00001.png").read_bytes())
    found = open_clips(str(tmp_path))
    assert [clip.name for clip in found.clips] == ["a"]
    assert found.excluded == {
        "masks without a frame": 1,
        "files among the frames that are no images": 1,
        "clips of fewer than two frames": 1,
        "clips with two frames of one name": 1,
    }


@pytest.mark.parametrize("orientation", [3, 6])
def test_frames_are_turned_upright_as_in_training(tmp_path: Path, orientation: int) -> None:
    """A mask fits the upright frame; half a turn does not change the size."""
    write_clip(tmp_path, "a", 3)
    (frame, *_) = sorted((tmp_path / "JPEGImages" / "480p" / "a").iterdir())
    mask = tmp_path / "Annotations" / "480p" / "a" / f"{frame.stem}.png"
    upright = np.asarray(Image.open(frame))[:, :40]
    Image.open(mask).crop((0, 0, 40, 48)).save(mask)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = np.rot90(upright, 2 if orientation == 3 else 1)
    Image.fromarray(turned).save(frame, "JPEG", quality=100, subsampling=0, exif=exif)
    assert open_clips(str(tmp_path)).excluded == {}
    side = upright.shape[0]
    expected = np.asarray(
        Image.fromarray(upright).resize((side, side), Image.Resampling.BICUBIC), np.float64
    )
    assert np.abs(load_frame(frame, side) - expected).mean() < 8
