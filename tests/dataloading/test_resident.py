"""Images that stay decoded give the views of the ordinary stream."""

import logging

import numpy as np
import pytest
import torch

from dataloading import resident
from dataloading.errors import DataError, ReadError
from dataloading.index import build_index
from dataloading.plan import Planner
from dataloading.reading import Reader
from dataloading.resident import cut, filter_weights
from dataloading.stream import Stream
from dataloading.torch_decode import crop_and_resize, make_decode

OPTIONS = {"seed": 5, "micro_batch": 8, "sizes": (64, 48), "threads": 2}


def take(index, number, **options):
    with Stream(index, **(OPTIONS | options)) as stream:
        batches = [next(stream) for _ in range(number)]
        return batches, stream.bad


def test_the_resident_stream_is_the_ordinary_one(photographs):
    """Order, views, boxes, mirroring, faults and on a CPU every pixel, over two epoch edges."""
    broken = photographs / "class0" / "03.jpg"
    index = build_index(photographs)
    broken.write_bytes(broken.read_bytes()[:-300])
    ordinary, bad = take(index, 5, start_position=4)
    kept, also_bad = take(index, 5, start_position=4, resident=True)
    assert bad == also_bad > 0
    for ours, theirs in zip(kept, ordinary, strict=True):
        assert ours.faulty == theirs.faulty
        for a, b in zip(ours.images + ours[1:5], theirs.images + theirs[1:5], strict=True):
            assert torch.equal(a, b)
        assert np.array_equal(ours.plan.boxes, theirs.plan.boxes)


@pytest.mark.parametrize("size", [24, 64, 150])
def test_matrix_products_cut_as_the_resampler_does(photographs, size):
    """At most two levels of 255 apart, and 99 of 100 pixels equal; shrunk and enlarged."""
    index = build_index(photographs)
    plan = Planner(
        index, seed=1, scale=(0.05, 1), ratio=(0.5, 2), flip=True, count=None, shuffle="full"
    )(np.arange(96))
    reader, decode = Reader(index), make_decode(None)
    side = max(index.entries["width"].max(), index.entries["height"].max())
    # Pixels outside an image are never used: noise there changes nothing.
    whole = torch.randint(0, 256, (96, 3, side, side), dtype=torch.uint8)
    expected = []
    for place, sample in enumerate(plan.ids):
        picture = decode(reader.read(int(sample)))
        whole[place, :, : picture.shape[1], : picture.shape[2]] = picture
        box, flip = plan.boxes[place].tolist(), bool(plan.flips[place])
        expected += crop_and_resize(picture, box, (size,), flip)
    reader.close()
    found = cut(whole, plan.boxes, plan.flips, filter_weights(size, int(side)))
    assert found.shape == (96, size, size, 3) and found.dtype == torch.uint8
    apart = np.abs(found.numpy().astype(int) - np.stack(expected))
    assert apart.max() <= 2
    assert (apart > 0).mean() < 0.01


def test_weights_of_every_length_have_sum_one_and_stay_within_the_line():
    weights = filter_weights(10, 7)
    assert torch.allclose(weights.sum(1), torch.ones(7, 10), atol=1e-6)
    for length in range(1, 8):
        assert not weights[length - 1, length:].any()


def test_a_set_that_is_too_large_is_refused(photographs, monkeypatch):
    monkeypatch.setattr(resident, "MOST_BYTES", 1 << 10)
    message = r"would keep 0.0 GiB per process \(12 images in squares of 167\).* set data.res"
    with pytest.raises(DataError, match=message):
        Stream(build_index(photographs), resident=True, **OPTIONS)


def test_dali_is_refused_beside_it(photographs):
    with pytest.raises(ValueError, match="decode is 'dali'; resident=True decodes on the CPU"):
        Stream(build_index(photographs), resident=True, decode="dali", **OPTIONS)


def test_storage_that_fails_says_so_and_the_next_call_tries_again(photographs, caplog):
    """As every decoder: an error in place of the batch, no grey image, no record of a fault."""
    index = build_index(photographs)
    away = photographs / "class0" / "03.jpg"
    kept = away.rename(away.with_suffix(".away"))
    with Stream(index, resident=True, patience_s=0.0, **OPTIONS) as stream:
        with pytest.raises(ReadError, match=r"03\.jpg"):
            next(stream)
        kept.rename(away)
        with caplog.at_level(logging.INFO, "dataloading"):
            batch = next(stream)
        assert batch.position.tolist() == list(range(8, 16)) and batch.valid.all()
        assert "12 images stay decoded on cpu, 1 MiB" in caplog.text
