import ast
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop

import dataloading.counters
import dataloading.views
from dataloading.views import ASPECTS, aspect_table, crop_boxes

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def draw(count, width, height, scale=SCALE, ratio=RATIO, seed=0):
    ids = np.arange(count)
    return crop_boxes(
        seed, ids, np.zeros_like(ids), np.full(count, width), np.full(count, height), scale, ratio
    )


def test_types_and_shapes():
    boxes, flips = draw(5, 100, 80)
    assert boxes.shape == (5, 4) and boxes.dtype == np.int32
    assert flips.shape == (5,) and flips.dtype == np.bool_


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (500, 375), (20, 3000), (65535, 65535)])
@pytest.mark.parametrize("scale", [SCALE, (1.0, 1.0)])
def test_boxes_lie_within_the_photograph(size, scale):
    boxes, _ = draw(300, *size, scale=scale)
    x, y, w, h = boxes.T
    assert min(x.min(), y.min()) >= 0 and min(w.min(), h.min()) >= 1
    assert (x + w).max() <= size[0] and (y + h).max() <= size[1]


@pytest.mark.parametrize("size", [(500, 375), (300, 301), (900, 200)])
def test_law_is_torchvisions(size):
    """Means within five standard errors, deviations within 6 %, of x, y, w, h."""
    count = 4000
    ours = draw(count, *size)[0].astype(np.float64)
    torch.manual_seed(0)
    blank = torch.empty(3, size[1], size[0])
    drawn = [RandomResizedCrop.get_params(blank, list(SCALE), list(RATIO)) for _ in range(count)]
    theirs = np.array([(x, y, w, h) for y, x, h, w in drawn], dtype=np.float64)
    error = np.sqrt((ours.var(0) + theirs.var(0)) / count)
    assert (abs(ours.mean(0) - theirs.mean(0)) <= 5 * error + 1e-9).all()
    assert np.allclose(ours.std(0), theirs.std(0), rtol=0.06, atol=0.05)


def test_half_of_the_views_are_mirrored_independently_of_the_box():
    boxes, flips = draw(4000, 500, 375)
    assert abs(flips.mean() - 0.5) < 0.04
    assert abs(np.corrcoef(flips, boxes[:, 2])[0, 1]) < 0.08


@pytest.mark.parametrize(
    ("size", "box"), [((1000, 10), (493, 0, 13, 10)), ((10, 1000), (0, 493, 10, 13))]
)
def test_hopeless_shapes_get_the_largest_centred_box(size, box):
    """With the whole area requested, no try can fit such a strip."""
    boxes, _ = draw(20, *size, scale=(1.0, 1.0))
    assert (boxes == box).all()


def test_view_depends_on_its_own_row_only():
    ids, views = np.array([4, 9, 2**40, 4]), np.array([0, 3, 1, 1])
    widths, heights = np.array([50, 60, 70, 50]), np.array([80, 60, 75, 80])
    boxes, flips = crop_boxes(3, ids, views, widths, heights, SCALE, RATIO)
    for k in range(4):
        row = slice(k, k + 1)
        one, flip = crop_boxes(3, ids[row], views[row], widths[row], heights[row], SCALE, RATIO)
        assert np.array_equal(one[0], boxes[k]) and flip[0] == flips[k]
    assert not np.array_equal(boxes[0], boxes[3])
    other, _ = crop_boxes(4, ids, views, widths, heights, SCALE, RATIO)
    assert not np.array_equal(other, boxes)


def test_small_index_types_do_not_overflow():
    small = crop_boxes(0, [1], [0], np.array([60000], "u2"), np.array([50000], "u2"), SCALE, RATIO)
    large = crop_boxes(0, [1], [0], [60000], [50000], SCALE, RATIO)
    assert np.array_equal(small[0], large[0])


def test_aspect_table_is_log_uniform_and_fixed():
    table = aspect_table(*RATIO)
    assert table.shape == (ASPECTS,) and not table.flags.writeable
    low, high = math.log(RATIO[0]), math.log(RATIO[1])
    middles = low + (high - low) * (np.arange(ASPECTS) + 0.5) / ASPECTS
    assert np.allclose(np.log(table), middles, rtol=0, atol=1e-14)
    assert aspect_table(*RATIO) is table
    assert np.unique(aspect_table(1.0, 1.0)).tolist() == [1.0]


def test_geometry_uses_no_function_that_rounds_differently_elsewhere():
    """numpy and math exp, log and powers depend on the machine; decimal's do not."""
    for module in (dataloading.views, dataloading.counters):
        tree = ast.parse(Path(module.__file__).read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                name = f"{node.value.id}.{node.attr}"
                assert name.split(".")[0] != "math"
                assert name not in {"np.exp", "np.log", "np.power", "np.exp2", "np.log2"}


def test_known_boxes_stay():
    """Fixed values: a change of the order or the crops would silently change every run."""
    boxes, flips = crop_boxes(0, [0, 1, 2], [0, 0, 5], [500, 500, 64], [375, 375, 48], SCALE, RATIO)
    assert boxes.tolist() == [[82, 143, 212, 217], [87, 50, 365, 279], [17, 7, 32, 25]]
    assert flips.tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.0, 1.0), RATIO), ((0.5, 1.1), RATIO), (SCALE, (2.0, 1.0))]
)
def test_wrong_ranges_are_refused(scale, ratio):
    with pytest.raises(ValueError, match="expected 0 < low <= high"):
        draw(1, 10, 10, scale=scale, ratio=ratio)
