"""Values without a known range cause no silent black or white views; suspect values are named."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from dataloading.check import check_samples
from dataloading.index import build_index
from dataloading.reading import GREY, UndecodableError
from dataloading.stream import Stream
from dataloading.torch_decode import with_pillow
from dataloading.values import find_suspect_values
from tests.dataloading.bad_data_case import planar_tiff, tiff, twelve_bits
from tests.dataloading.decoder_case import DECODERS

RAMP = np.linspace(0, 1, 64 * 48).reshape(48, 64)
SIGNED = 2


def encoded(values):
    data = io.BytesIO()
    Image.fromarray(values).save(data, "TIFF")
    return data.getvalue()


UNKNOWN = {
    "float, 0 to 1": (encoded(RAMP.astype(np.float32)), "floating-point values have no range"),
    "float, 0 to 4095": (encoded((RAMP * 4095).astype(np.float32)), "floating-point"),
    "float, negative": (encoded((RAMP - 0.5).astype(np.float32)), "floating-point"),
    "pfm": (b"Pf\n64 48\n-1.0\n" + RAMP.astype("<f4").tobytes(), "floating-point"),
    "32 bits": (encoded((RAMP * 1e6).astype(np.int32)), "signed integers of 32 bits"),
    "unsigned 32 bits": (
        tiff((RAMP * 255).astype("<u4").tobytes(), 64, 48, 32),
        "unsigned integers of 32 bits",
    ),
    "signed 16 bits": (
        tiff((RAMP * 255 - 100).astype("<i2").tobytes(), 64, 48, 16, SIGNED),
        "signed integers of 16 bits have no range that the file defines; convert",
    ),
    "signed 8 bits": (
        tiff((RAMP * 200 - 100).astype("<i1").tobytes(), 64, 48, 8, SIGNED),
        "signed integers of 8 bits have no range",
    ),
    "planes of 16 bits": (
        planar_tiff((RAMP[..., None] * 65535).repeat(3, axis=2)),
        "planes of 16 bits, which Pillow reads wrongly; convert the image to 8 bits",
    ),
    "planes of 16 bits, with alpha": (
        planar_tiff((RAMP[..., None] * 65535).repeat(4, axis=2), extra=2),
        "planes of 16 bits",
    ),
    "planes of 16 bits, CMYK": (
        planar_tiff((RAMP[..., None] * 65535).repeat(4, axis=2), photometric=5),
        "planes of 16 bits",
    ),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_values_without_a_range_are_undecodable(name):
    data, reason = UNKNOWN[name]
    with pytest.raises(UndecodableError, match=reason):
        with_pillow(data)


def test_integers_of_12_and_16_bits_are_scaled_and_negatives_inverted():
    levels = (RAMP * 255).round().astype(np.uint8)
    assert (with_pillow(tiff(twelve_bits(levels), 64, 48, 12)).numpy() == levels).all()
    wide = (RAMP * 65535).round().astype("<u2")
    for photometric, expected in ((1, wide), (0, 65535 - wide)):
        got = with_pillow(tiff(wide.tobytes(), 64, 48, 16, photometric=photometric)).numpy()
        assert np.abs(got - expected * (255 / 65535)).max() <= 0.5
    pgm = b"P5\n64 48\n1023\n" + (RAMP * 1023).round().astype(">u2").tobytes()
    assert np.abs(with_pillow(pgm).numpy() - RAMP * 255).max() <= 1


@pytest.mark.parametrize("decode", DECODERS)
def test_views_of_unknown_values_are_grey_counted_and_named(tmp_path, picture, decode):
    root, names = tmp_path / "data", ["0.tif", "1.tif", "2.png"]
    root.mkdir()
    (root / "0.tif").write_bytes(UNKNOWN["float, 0 to 1"][0])
    (root / "1.tif").write_bytes(UNKNOWN["signed 16 bits"][0])
    picture(1, 64, 48).save(root / "2.png")
    index, quarantine = build_index(root), tmp_path / "quarantine.jsonl"
    assert list(index.names) == names
    how = {"seed": 0, "micro_batch": 3, "sizes": (16,), "threads": 1, "shuffle": "none"}
    with Stream(index, decode=decode, quarantine=quarantine, **how) as stream:
        batch = next(stream)
        assert batch.valid.tolist() == [False, False, True]
        assert bool((batch.images[0][:2] == GREY).all())
        assert (stream.draws, stream.bad) == (3, 2)
    lines = [json.loads(line) for line in quarantine.read_text().splitlines()]
    assert [line["name"] for line in lines] == names[:2]
    assert all("convert the image to unsigned integers" in line["reason"] for line in lines)


def image(values):
    return torch.as_tensor(np.asarray(values, dtype=np.uint8)).expand(3, -1, -1)


def test_suspect_values_are_named_and_ordinary_ones_are_not(picture):
    noise = np.random.default_rng(0)
    flat = np.full((40, 50), 7)
    assert find_suspect_values(image(flat)) == "constant: every pixel is (7, 7, 7)"
    flat[3, 4] = 200
    assert find_suspect_values(image(flat)).startswith("near-constant: 99 %")
    dark = RAMP * 16  # 12 bits, stored as 16
    assert find_suspect_values(image(dark)).startswith("near-constant")
    cut = np.clip(noise.uniform(0, 4095, (300, 400)), 0, 255)
    assert find_suspect_values(image(cut)) == "saturated: 94% of the values are 0 or 255"
    one_channel = torch.stack([*image(np.full((48, 64), 90))[:2], image(RAMP * 255)[0]])
    for ordinary in (image(RAMP * 255), image(RAMP * 60), one_channel):
        assert find_suspect_values(ordinary) is None
    for seed in range(5):
        pixels = torch.as_tensor(np.array(picture(seed, 600, 400))).permute(2, 0, 1)
        assert find_suspect_values(pixels) is None


def test_duplicates_are_found_by_their_bytes(photographs):
    originals = sorted(photographs.rglob("*.jpg"))
    for number in (0, 5):
        (photographs / "class2" / f"copy{number}.jpg").write_bytes(originals[number].read_bytes())
    (photographs / "class0" / "again.jpg").write_bytes(originals[0].read_bytes())
    cut = originals[3].read_bytes()[:-300]  # undecodable ones count as well
    for name in ("cut1.jpg", "cut2.jpg"):
        (photographs / name).write_bytes(cut)
    Image.fromarray((RAMP * 65535).astype(np.uint16)).save(photographs / "wide.png")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(photographs / "black.png")
    index = build_index(photographs)
    faults, survey = check_samples(index, 2, lambda done: None)
    names = [{index.names[row] for row in group} for group in survey.duplicates]
    first, sixth = (str(originals[k].relative_to(photographs)) for k in (0, 5))
    assert sorted(names, key=len) == [
        *sorted([{"cut1.jpg", "cut2.jpg"}, {sixth, "class2/copy5.jpg"}], key=names.index),
        {first, "class0/again.jpg", "class2/copy0.jpg"},
    ]
    assert [fault.name for fault in faults] == ["cut1.jpg", "cut2.jpg"]
    suspect = [(index.names[row], reason) for row, reason in survey.suspect]
    assert suspect == [("black.png", "constant: every pixel is (0, 0, 0)")]
    assert survey.scaled == 1
