"""DALI gives what the other decoder gives: the same draws, and pixels within stated bounds."""

import functools
import importlib.util
import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from dataloading import stream as stream_module
from dataloading.errors import DataError, ReadError
from dataloading.index import build_index
from dataloading.reading import GREY, Reader
from dataloading.stream import Stream
from dataloading.views import crop_boxes

pytest.importorskip("nvidia.dali", reason="DALI is not installed")
from dataloading.dali import DaliDecoder

pytestmark = pytest.mark.dali
OPTIONS = {"seed": 5, "micro_batch": 8, "sizes": (48, 40), "threads": 2}


@pytest.fixture(params=["torch resizes", "DALI resizes"])
def graph(request, monkeypatch):
    """Both graphs, on the CPU: the one of CPUs and the one of GPUs."""
    if request.param == "DALI resizes":
        whole = functools.partial(DaliDecoder, resize=True)
        monkeypatch.setattr("dataloading.dali.DaliDecoder", whole)


def take(index, number, decode="dali", **options):
    with Stream(index, decode=decode, **(OPTIONS | options)) as stream:
        return [next(stream) for _ in range(number)]


def same_draws(ours, theirs):
    return all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in ("position", "sample_id", "view", "valid")
    )


def same_pixels(ours, theirs):
    return all(
        torch.equal(one, two)
        for a, b in zip(ours, theirs, strict=True)
        for one, two in zip(a.images, b.images, strict=True)
    )


def check_bounds(ours, theirs):
    """Both are within rounding of Pillow's bicubic: mean 0.16 and 0.03 levels, 99.9 % within 1."""
    difference = (ours.int() - theirs.int()).abs().float().numpy()
    assert difference.mean() <= 0.25
    assert np.quantile(difference, 0.999) <= 2
    assert difference.max() <= 12


@pytest.mark.usefixtures("graph")
def test_draws_are_the_same_and_pixels_within_rounding(photographs):
    index = build_index(photographs)
    ours, theirs = take(index, 5), take(index, 5, "torch")
    assert same_draws(ours, theirs)
    for a, b in zip(ours, theirs, strict=True):
        for one, two in zip(a.images, b.images, strict=True):
            assert one.dtype == torch.uint8 and one.shape == two.shape
            check_bounds(one, two)


def test_on_a_cpu_pixels_are_those_of_the_other_decoder(photographs):
    index = build_index(photographs)
    assert same_pixels(take(index, 3), take(index, 3, "torch"))


@pytest.mark.usefixtures("graph")
def test_pixels_are_pillows_crop_and_resize(photographs):
    index = build_index(photographs)
    for batch in take(index, 3):
        ids, views = batch.sample_id.numpy(), batch.view.numpy()
        rows = index.entries[ids]
        boxes, flips = crop_boxes(
            5, ids, views, rows["width"], rows["height"], (0.2, 1.0), (3 / 4, 4 / 3)
        )
        for k, (x, y, w, h) in enumerate(boxes.tolist()):
            data = index.open().read(int(ids[k]))
            with Image.open(io.BytesIO(data)) as image:
                crop = image.convert("RGB").crop((x, y, x + w, y + h))
            for pictures, size in zip(batch.images, (48, 40), strict=True):
                pixels = np.array(crop.resize((size, size), Image.Resampling.BICUBIC))
                expected = pixels[:, ::-1] if flips[k] else pixels
                check_bounds(pictures[k], torch.as_tensor(expected.copy()))


@pytest.mark.usefixtures("graph")
def test_real_photographs_agree_with_the_other_decoder(tmp_path):
    data = pytest.importorskip("skimage.data")
    for name in ("astronaut", "coffee", "chelsea", "camera"):
        Image.fromarray(getattr(data, name)()).save(tmp_path / f"{name}.jpg", quality=90)
    index = build_index(tmp_path)
    options = {"micro_batch": 4, "sizes": (224, 196)}
    for a, b in zip(take(index, 2, **options), take(index, 2, "torch", **options), strict=True):
        assert torch.equal(a.sample_id, b.sample_id)
        for one, two in zip(a.images, b.images, strict=True):
            check_bounds(one, two)


@pytest.mark.usefixtures("graph")
def test_it_starts_anywhere_and_repeats_itself(photographs):
    index = build_index(photographs)
    whole = take(index, 6)
    rest = take(index, 3, start_position=24)
    assert same_draws(whole[3:], rest) and same_pixels(whole[3:], rest)


@pytest.mark.usefixtures("graph")
def test_batches_handed_out_are_not_overwritten(photographs):
    index = build_index(photographs)
    with Stream(index, decode="dali", **OPTIONS) as stream:
        kept = [next(stream) for _ in range(4)]
        copies = [[image.clone() for image in batch.images] for batch in kept]
        for _ in range(6):
            next(stream)
        for batch, images in zip(kept, copies, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(batch.images, images, strict=True))


@pytest.mark.usefixtures("graph")
@pytest.mark.parametrize("in_processes", [False, True])
def test_views_are_the_same_where_plans_run_out_in_between(photographs, in_processes):
    """DALI requests the micro-batch after the one that it returns, even if there is none."""
    index = build_index(photographs)
    damage(index)
    expected = take(index, 6)
    device = torch.device("cpu")
    decoder = stream_module.make_decoder(
        "dali", Reader(index), OPTIONS["sizes"], 8, 2, device, in_processes
    )
    ours = []
    for number in (1, 3, 2):
        plans = [batch.plan for batch in expected[len(ours) : len(ours) + number]]
        for plan in plans:
            decoder.submit(plan)
        ours += [decoder.collect() for _ in plans]
    with pytest.raises(IndexError):
        decoder.collect()  # nothing is submitted
    decoder.close()
    for views, batch in zip(ours, expected, strict=True):
        assert [fault is None for fault in views.faults] == batch.valid.tolist()
        assert all(map(torch.equal, views.images, batch.images))


def damage(index):
    """Two that break while they are decoded, and two that are found when they are read."""
    names = [index.names[i] for i in (1, 4, 6, 9)]
    truncated, cut, emptied, text = (index.root / name for name in names)
    data = truncated.read_bytes()
    truncated.write_bytes(data[:-200] + b" " * 200)
    data = cut.read_bytes()
    cut.write_bytes(data[: len(data) // 2].ljust(len(data), b" "))
    emptied.write_bytes(b"")
    text.write_bytes(b"x" * text.stat().st_size)
    return names


@pytest.mark.usefixtures("graph")
def test_bad_pictures_are_replaced_and_nothing_is_lost(photographs, tmp_path):
    index = build_index(photographs)
    good = take(index, 6)
    names = damage(index)
    path = tmp_path / "quarantine.jsonl"
    bad = take(index, 6, quarantine=path)
    for before, after in zip(good, bad, strict=True):
        assert torch.equal(before.position, after.position)
        assert torch.equal(before.sample_id, after.sample_id)
        expected = [index.names[i] not in names for i in after.sample_id.tolist()]
        assert after.valid.tolist() == expected
        for one, two in zip(before.images, after.images, strict=True):
            assert torch.equal(one[after.valid], two[after.valid])
            assert (two[~after.valid] == GREY).all()
    lines = [json.loads(line)["name"] for line in path.read_text().splitlines()]
    assert sorted(lines) == sorted(names)
    assert same_draws(bad, take(index, 6, "torch"))
    rest = take(index, 3, start_position=24, quarantine=path)
    assert same_draws(bad[3:], rest) and same_pixels(bad[3:], rest)


@pytest.mark.usefixtures("graph")
def test_formats_that_dali_does_not_know_are_decoded_by_the_others(tmp_path, picture):
    for number, ending in enumerate(("gif", "png", "webp", "bmp", "ppm", "jpg")):
        image = picture(number, 80 + number, 60)
        image = image.convert("P") if ending == "gif" else image
        image.save(tmp_path / f"{number}.{ending}", **({"lossless": True} if number == 2 else {}))
    index = build_index(tmp_path)
    ours, theirs = take(index, 2, micro_batch=6), take(index, 2, "torch", micro_batch=6)
    assert same_draws(ours, theirs) and all(batch.valid.all() for batch in ours)
    for a, b in zip(ours, theirs, strict=True):
        check_bounds(a.images[0], b.images[0])


def test_processes_read_what_threads_read(photographs, tmp_path, picture):
    """With undecodable files, one that cannot be read, and one that DALI does not know."""
    picture(3, 80, 60).convert("P").save(photographs / "class0" / "0.gif")
    index = build_index(photographs)
    damage(index)
    (photographs / index.names[11]).unlink()

    def batches(worker_type):
        path = tmp_path / worker_type / "quarantine.jsonl"
        how = {"worker_type": worker_type, "quarantine": path, "patience_s": 0.2}
        with Stream(index, decode="dali", **OPTIONS | {"micro_batch": 3} | how) as stream:
            for _ in range(9):
                try:
                    yield next(stream)
                except ReadError as error:
                    yield str(error).partition(", tried")[0]
        yield sorted(path.read_text().splitlines())

    threads, processes = list(batches("thread")), list(batches("process"))
    assert [one for one in threads if isinstance(one, str | list)] == [
        one for one in processes if isinstance(one, str | list)
    ]
    assert sum(isinstance(one, str) for one in threads) >= 2
    pairs = [
        (a, b) for a, b in zip(threads, processes, strict=True) if not isinstance(a, str | list)
    ]
    ours, theirs = [list(side) for side in zip(*pairs, strict=True)]
    assert same_draws(ours, theirs) and same_pixels(ours, theirs)


def test_without_dali_the_message_names_the_extra(photographs, monkeypatch):
    found = importlib.util.find_spec

    def hide(name, package=None):
        return None if name.startswith("nvidia.dali") else found(name, package)

    monkeypatch.setattr(stream_module, "find_spec", hide)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # what imports it fails
    monkeypatch.delitem(sys.modules, "dataloading.dali")
    index = build_index(photographs)
    with Stream(index, seed=0, micro_batch=2, sizes=(16,)) as stream:
        next(stream)
    with pytest.raises(DataError, match="DALI is not installed; install the extra dali"):
        Stream(index, seed=0, micro_batch=2, decode="dali")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_decodes_within_bounds_of_the_cpu(photographs):
    index = build_index(photographs)
    ours, theirs = take(index, 5, device="cuda"), take(index, 5, "torch")
    assert all(image.is_cuda for batch in ours for image in batch.images)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.sample_id.cpu(), b.sample_id)
        for one, two in zip(a.images, b.images, strict=True):
            difference = (one.cpu().int() - two.int()).abs().float()
            assert difference.mean() <= 1.0
