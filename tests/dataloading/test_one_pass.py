"""Each listed sample once over all ranks, from its centre."""

import logging

import numpy as np
import pytest
import torch
from PIL import Image

from dataloading.errors import ReadError
from dataloading.index import build_index
from dataloading.one_pass import OnePass
from dataloading.reading import GREY
from dataloading.torch_decode import crop_and_resize, make_decode
from dataloading.views import centre_boxes


def everything(index, ids, ranks, micro_batch=4, **options):
    """Position -> image of all ranks, and each rank's number of batches."""
    found, batches = {}, []
    for rank in range(ranks):
        options = {"size": 32, "threads": 2, "decode": "torch"} | options
        with OnePass(
            index, ids, micro_batch=micro_batch, rank=rank, world_size=ranks, **options
        ) as views:
            batches.append(len(views))
            for batch in views:
                assert batch.images[0].shape == (micro_batch, 32, 32, 3)
                for k in batch.valid.nonzero()[:, 0].tolist():
                    position = int(batch.position[k])
                    assert position not in found
                    assert int(batch.sample_id[k]) == ids[position]
                    found[position] = batch.images[0][k].clone()
    return found, batches


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_each_sample_comes_once_at_any_number_of_ranks(photographs, ranks):
    index = build_index(photographs)
    ids = np.array([0, 2, 3, 5, 6, 7, 8, 9, 11])
    found, batches = everything(index, ids, ranks)
    assert sorted(found) == list(range(9))
    assert batches == [{1: 3, 2: 2, 3: 1}[ranks]] * ranks
    decode = make_decode(None)
    for position, picture in found.items():
        data = index.open().read(int(ids[position]))
        _, height, width = decode(data).shape
        side = round(min(width, height) * 224 / 256)
        box = [(width - side) // 2, (height - side) // 2, side, side]
        (expected,) = crop_and_resize(decode(data), box, (32,), False)
        assert np.array_equal(picture.numpy(), expected)


def test_the_box_is_the_fields_resize_and_crop():
    """Shorter side to 256, centre 224: torchvision's box in the image, to a pixel."""
    widths, heights = np.array([500, 333, 64, 7]), np.array([375, 500, 64, 1])
    boxes = centre_boxes(widths, heights, 224 / 256)
    for (x, y, w, h), width, height in zip(boxes.tolist(), widths, heights, strict=True):
        factor = 256 / min(width, height)
        assert abs(w - 224 / factor) <= 0.5 or w == 1
        assert w == h
        assert abs(x - (width - 224 / factor) / 2) <= 1
        assert abs(y - (height - 224 / factor) / 2) <= 1
        assert x >= 0 and y >= 0 and x + w <= width and y + h <= height
    for share, sides in ((0.0, [4]), (1.5, [4]), (0.5, [0])):
        with pytest.raises(ValueError, match=r"expected 0 < share|no pixels"):
            centre_boxes(sides, sides, share)


def test_what_cannot_be_decoded_is_named_once_and_not_valid(photographs, caplog):
    path = photographs / "class1" / "01.jpg"
    path.write_bytes(path.read_bytes()[:-300])
    index = build_index(photographs)
    bad = index.names.index("class1/01.jpg")
    ids = np.arange(12)[::-1].copy()  # the last sample, which fills up the batch, is another
    with caplog.at_level(logging.WARNING):
        found, _ = everything(index, ids, 1, micro_batch=5)
        assert sorted(found) == [p for p in range(12) if ids[p] != bad]
    lines = [line for line in caplog.messages if "class1/01.jpg is excluded: " in line]
    assert len(lines) == 1
    with OnePass(index, np.array([bad]), micro_batch=2, size=8, threads=1, decode="torch") as views:
        (batch,) = views
    assert batch.faulty == (0,) and not batch.valid.any()
    assert (batch.images[0] == GREY).all()


def test_a_sample_that_storage_does_not_give_is_an_error(photographs):
    index = build_index(photographs)
    (photographs / "class0" / "00.jpg").unlink()
    ids = np.arange(12)
    options = {"size": 8, "threads": 1, "decode": "torch", "patience_s": 0.0}
    with OnePass(index, ids, micro_batch=4, **options) as views, pytest.raises(ReadError):
        list(views)


def test_an_empty_list_is_refused_and_a_closed_pass_gives_nothing(photographs):
    index = build_index(photographs)
    with pytest.raises(ValueError, match="no samples are listed"):
        OnePass(index, np.array([], dtype=np.int64), micro_batch=4, size=8)
    views = OnePass(index, np.arange(3), micro_batch=4, size=8, threads=1, decode="torch")
    views.close()
    views.close()
    with pytest.raises(RuntimeError, match="the pass is closed"):
        next(views)


@pytest.mark.dali
def test_dali_gives_the_same_pass(photographs):
    pytest.importorskip("nvidia.dali", reason="DALI is not installed")
    Image.new("RGB", (50, 40), (200, 10, 30)).save(photographs / "class0" / "flat.png")
    index = build_index(photographs)
    ids = np.arange(len(index))
    ours, _ = everything(index, ids, 1, micro_batch=5)
    theirs, _ = everything(index, ids, 1, micro_batch=5, decode="dali")
    assert sorted(ours) == sorted(theirs) == list(range(13))
    for position, picture in ours.items():
        assert torch.equal(picture, theirs[position])
