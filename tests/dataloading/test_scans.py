"""A JPEG of very many scans is undecodable before any decoder works on it."""

import io

import numpy as np
import pytest
from PIL import Image

from dataloading.headers import MAX_SCANS, has_many_scans
from dataloading.index import build_index
from dataloading.stream import Stream
from tests.dataloading.decoder_case import DECODERS

NOISE = np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8)


def jpeg(scans: int = 0, **options) -> bytes:
    """A progressive JPEG whose last scan is repeated."""
    target = io.BytesIO()
    Image.fromarray(NOISE).save(target, "JPEG", progressive=True, **options)
    data = target.getvalue()
    last = data[data.rfind(b"\xff\xda") : -2]
    return data[:-2] + scans * last + data[-2:]


def test_usual_files_have_few_scans():
    assert not has_many_scans(jpeg())
    assert not has_many_scans(jpeg(MAX_SCANS - 20))
    assert has_many_scans(jpeg(MAX_SCANS)) and has_many_scans(jpeg(400))
    for data in (b"", b"\xff\xd8", b"\xff\xda" * 400, b"\xff\xd8" + b"\xff\xda" * 300):
        has_many_scans(data)  # of any bytes it ends


def test_markers_within_segments_are_no_scans():
    data = jpeg(exif=b"Exif\x00\x00" + b"\xff\xda" * 500)
    assert data.count(b"\xff\xda") > 500 and not has_many_scans(data)


def test_a_sequential_file_has_as_many_scans_as_its_first_leaves_components():
    target = io.BytesIO()
    Image.fromarray(NOISE).save(target, "JPEG")
    whole = target.getvalue()
    start = whole.rfind(b"\xff\xda")
    scan = whole[start:-2]
    assert scan[4] == 3  # components
    assert not has_many_scans(whole[:-2] + 400 * scan + whole[-2:])
    first = scan[:4] + b"\1" + scan[5:]
    assert has_many_scans(whole[:start] + first + 400 * scan + whole[-2:])


@pytest.mark.parametrize("decode", DECODERS)
def test_a_file_of_400_scans_is_a_bad_view_with_its_reason(tmp_path, decode):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(400 if number == 2 else 0))
    index = build_index(tmp_path)
    options = {"seed": 0, "micro_batch": 4, "sizes": (24,), "threads": 1, "shuffle": "none"}
    with Stream(index, decode=decode, **options) as stream:
        batch = next(stream)
        assert batch.valid.tolist() == [True, True, False, True]
        assert stream.bad == 1
