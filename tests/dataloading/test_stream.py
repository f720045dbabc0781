import itertools
import json
import threading

import numpy as np
import pytest
import torch

from dataloading.index import build_index
from dataloading.order import sample_ids
from dataloading.plan import Plan
from dataloading.quarantine import Quarantine
from dataloading.reading import GREY, Reader, lend
from dataloading.stream import Stream
from dataloading.torch_decode import TorchDecoder, crop_and_resize, make_decode
from dataloading.views import crop_boxes

SCALE, RATIO = (0.2, 1.0), (3 / 4, 4 / 3)


def take(index, number, **options):
    """The first views as a list of (position, sample, view, valid, first image)."""
    options = {"seed": 5, "micro_batch": 4, "sizes": (32,), "threads": 2} | options
    views = []
    with Stream(index, **options) as stream:
        while len(views) < number:
            batch = next(stream)
            for k in range(len(batch.position)):
                facts = (batch.position, batch.sample_id, batch.view, batch.valid)
                views.append((*(fact[k].item() for fact in facts), batch.images[0][k]))
    return views[:number]


def same(ours, theirs):
    return all(
        a[:4] == b[:4] and torch.equal(a[4], b[4]) for a, b in zip(ours, theirs, strict=True)
    )


def test_batch_is_the_planned_one(photographs):
    """Two sizes of the crop that order and views name, across an epoch edge (12 samples)."""
    index = build_index(photographs)
    decode = make_decode(None)
    with Stream(index, seed=5, micro_batch=8, sizes=(32, 24), threads=2) as stream:
        for j, batch in enumerate(itertools.islice(stream, 3)):
            positions = np.arange(8 * j, 8 * j + 8)
            ids, epochs = sample_ids(12, 5, positions)
            assert batch.position.tolist() == positions.tolist()
            assert batch.sample_id.tolist() == ids.tolist()
            assert batch.view.tolist() == epochs.tolist()
            assert batch.valid.dtype == torch.bool and batch.valid.all()
            assert all(t.dtype == torch.int64 for t in (batch.position, batch.sample_id))
            rows = index.entries[ids]
            boxes, flips = crop_boxes(5, ids, epochs, rows["width"], rows["height"], SCALE, RATIO)
            for k in range(8):
                data = index.open().read(ids[k])
                expected = crop_and_resize(decode(data), boxes[k].tolist(), (32, 24), flips[k])
                for images, view in zip(batch.images, expected, strict=True):
                    assert images.dtype == torch.uint8
                    assert np.array_equal(images[k].numpy(), view)
        assert (stream.draws, stream.bad) == (24, 0)


@pytest.mark.parametrize(("world_size", "micro_batch"), [(2, 4), (3, 2)])
def test_draws_do_not_depend_on_ranks_and_micro_batches(photographs, world_size, micro_batch):
    index = build_index(photographs)
    alone = take(index, 36)
    shared = [
        view
        for rank in range(world_size)
        for view in take(
            index, 36 // world_size, rank=rank, world_size=world_size, micro_batch=micro_batch
        )
    ]
    shared = sorted((view for view in shared if view[0] < 36), key=lambda view: view[0])
    expected = [view for view in alone if view[0] in {other[0] for other in shared}]
    assert len(shared) >= 30
    assert same(shared, expected)


@pytest.mark.parametrize(("start", "threads"), [(4, 1), (7, 3), (12, 1), (25, 3)])
def test_stream_starts_anywhere(photographs, start, threads):
    index = build_index(photographs)
    whole = take(index, 40)
    assert same(take(index, 40 - start, start_position=start, threads=threads), whole[start:])


@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_batches_that_are_kept_are_not_written_again(photographs, worker_type):
    index = build_index(photographs)
    expected = take(index, 60)
    options = {"micro_batch": 4, "sizes": (32,), "threads": 2, "decode": "torch"}
    with Stream(index, seed=5, worker_type=worker_type, **options) as stream:
        kept = [next(stream).images[0][1:3] for _ in range(3)]  # views of batches count as well
        places = {next(stream).images[0].data_ptr() for _ in range(12)}
    assert len(places) < 12  # others are used again
    for j, pair in enumerate(kept):
        assert torch.equal(pair[0], expected[4 * j + 1][4])
        assert torch.equal(pair[1], expected[4 * j + 2][4])


@pytest.mark.parametrize(
    "make",
    [
        lambda image: image,
        lambda image: image[1:, :2],
        lambda image: image.permute(2, 0, 1).detach(),
        lambda image: image.untyped_storage(),
        lambda image: image.numpy()[0],
        lambda image: torch.from_numpy(image.numpy()[1:]),
        lambda image: torch.from_dlpack(image),
    ],
)
def test_lent_memory_is_held_by_all_that_is_made_of_its_tensor(make):
    memory = np.zeros((4, 5, 3), np.uint8)
    image, is_held = lend(memory)
    assert image.data_ptr() == memory.ctypes.data
    made = make(image)
    del image
    assert is_held()
    del made
    assert not is_held()


def test_memory_of_a_batch_is_lent_again_once_nobody_holds_it(photographs):
    index = build_index(photographs)
    ids, boxes = np.arange(4), np.full((4, 4), (0, 0, 9, 9), np.int32)
    plan = Plan(ids, ids, ids, boxes, np.zeros(4, np.bool_))
    decoder = TorchDecoder(Reader(index), (8,), threads=1, pin=False)

    def decode():
        decoder.submit(plan)
        return decoder.collect().images[0]

    held = [decode() for _ in range(4)]
    places = [image.data_ptr() for image in held]
    assert len(set(places)) == 4
    del held[2]
    again = [decode().data_ptr() for _ in range(20)]
    decoder.close()
    assert again[0] == places.pop(2) and not set(again) & set(places)
    assert len(set(again)) <= 2  # the thread may not have let go of the batch before


def test_very_late_start_works(photographs):
    index = build_index(photographs)
    (first, *_) = take(index, 4, start_position=12 * 10**12)
    assert first[0] == 12 * 10**12 and first[2] == 10**12


def test_view_numbers_come_round(photographs):
    index = build_index(photographs)
    free = take(index, 48)
    limited = take(index, 48, count=2)
    assert [view[2] for view in limited] == [e % 2 for e in np.repeat(np.arange(4), 12)]
    assert same(free[:24], limited[:24])
    by_key = {(view[1], view[2]): view[4] for view in limited[:24]}
    assert all(torch.equal(by_key[view[1], view[2]], view[4]) for view in limited[24:])


def test_index_order_without_shuffling(photographs):
    views = take(build_index(photographs), 24, shuffle="none")
    assert [view[1] for view in views] == [*range(12), *range(12)]
    assert not torch.equal(views[0][4], views[12][4])  # the crops stay random


def test_mirroring_can_be_off(photographs):
    index = build_index(photographs)
    with_flips, without = take(index, 24), take(index, 24, flip=False)
    mirrored = [torch.equal(a[4].flip(1), b[4]) for a, b in zip(with_flips, without, strict=True)]
    equal = [torch.equal(a[4], b[4]) for a, b in zip(with_flips, without, strict=True)]
    assert all(a != b for a, b in zip(mirrored, equal, strict=True))
    assert 0 < sum(mirrored) < 24


def test_seeds_give_other_views(photographs):
    index = build_index(photographs)
    assert [v[1] for v in take(index, 12)] != [v[1] for v in take(index, 12, seed=6)]


def damage(index):
    """Four ways to be bad, found only when the sample is read; returns their names."""
    names = [index.names[i] for i in (1, 4, 6, 9)]
    truncated, emptied, text, other = (index.root / name for name in names)
    data = truncated.read_bytes()
    truncated.write_bytes(data[:-200] + b" " * 200)  # the same length
    emptied.write_bytes(b"")
    text.write_bytes(b"x" * text.stat().st_size)
    other.write_bytes(other.read_bytes() + b"more")
    return names


def test_bad_samples_keep_their_place_and_leave_the_others_alone(photographs, tmp_path):
    index = build_index(photographs)
    good = take(index, 36)
    names = damage(index)
    path = tmp_path / "run" / "quarantine.jsonl"
    bad = take(index, 36, quarantine=path)
    for before, after in zip(good, bad, strict=True):
        assert before[:3] == after[:3]
        assert after[3] == (index.names[after[1]] not in names)
        assert (after[4] == GREY).all() if not after[3] else torch.equal(before[4], after[4])
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["name"] for line in lines) == sorted(names)
    reasons = {line["name"]: line["reason"] for line in lines}
    assert "cannot be decoded" in reasons[names[0]]
    assert reasons[names[1]].startswith("0 bytes, the index says ")
    assert reasons[names[2]] == "not an image of a known format"
    size = index.entries[9]["size"]
    assert reasons[names[3]] == f"more bytes, the index says {size}"
    assert all(index.names[line["sample_id"]] == line["name"] for line in lines)
    assert all(line["path"] == str(photographs / line["name"]) for line in lines)
    assert all(line["offset"] is None for line in lines)
    take(index, 36, quarantine=path)
    assert len(path.read_text().splitlines()) == 4


def test_bad_draws_are_counted_when_handed_out(photographs):
    index = build_index(photographs)
    damage(index)
    with Stream(index, seed=5, micro_batch=6, sizes=(16,), threads=2) as stream:
        counts = [(int((~next(stream).valid).sum()), stream.draws, stream.bad) for _ in range(4)]
    assert [draws for _, draws, _ in counts] == [6, 12, 18, 24]
    assert [bad for *_, bad in counts] == list(itertools.accumulate(n for n, *_ in counts))
    assert counts[1][2] == 4 and counts[3][2] == 8


def test_picture_of_another_size_is_not_cropped_with_the_old_box(photographs, picture):
    index = build_index(photographs)
    path = index.root / index.names[3]
    length = path.stat().st_size
    picture(0, 20, 20).save(path)
    path.write_bytes(path.read_bytes().ljust(length, b"\0"))
    assert {view[1] for view in take(index, 12) if not view[3]} == {3}


def test_reading_is_tried_again_when_storage_falters(photographs, monkeypatch):
    index = build_index(photographs)
    expected = take(index, 12)
    monkeypatch.setattr("dataloading.patience._FIRST_PAUSE_S", 0.0)
    read, failed = type(index.open()).read, set()

    def falter(source, i):
        if i not in failed:
            failed.add(i)
            raise OSError(5, "Input/output error")
        return read(source, i)

    monkeypatch.setattr(type(index.open()), "read", falter)
    assert same(take(index, 12), expected)
    assert failed == set(range(12))


def test_internal_faults_are_raised_not_swallowed(photographs, monkeypatch):
    index = build_index(photographs)

    def broken(*_):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("dataloading.torch_decode.crop_and_resize", broken)
    with (
        Stream(index, seed=0, micro_batch=2, sizes=(16,)) as stream,
        pytest.raises(ZeroDivisionError, match="a bug"),
    ):
        next(stream)


def test_closing_ends_all_threads_and_the_stream(photographs):
    index = build_index(photographs)
    before = threading.active_count()
    stream = Stream(index, seed=0, micro_batch=4, sizes=(32,), threads=3)
    next(stream)
    assert threading.active_count() == before + 3
    stream.close()
    stream.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        next(stream)


def test_threads_use_one_core_each_and_the_caller_keeps_its_own(photographs, monkeypatch):
    seen = []

    def spy(*arguments):
        seen.append(torch.get_num_threads())
        return crop_and_resize(*arguments)

    monkeypatch.setattr("dataloading.torch_decode.crop_and_resize", spy)
    torch.set_num_threads(3)
    take(build_index(photographs), 8)
    assert torch.get_num_threads() == 3
    assert set(seen) == {1}
    asked = []
    other = threading.Thread(target=lambda: asked.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert asked == [3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 0}, "micro_batch is 0"),
        ({"rank": 2, "world_size": 2}, "rank is 2"),
        ({"threads": 0}, "threads is 0"),
        ({"sizes": ()}, "sizes is 0"),
        ({"count": 0}, "count is 0"),
        ({"start_position": -1}, "start_position is -1"),
        ({"shuffle": "some"}, "shuffle is 'some'"),
        ({"decode": "pil"}, "decode is 'pil'"),
        ({"scale": (0.0, 1.0)}, "scale is"),
    ],
)
def test_wrong_arguments_are_refused(photographs, options, message):
    before = threading.active_count()
    with pytest.raises(ValueError, match=message):
        Stream(build_index(photographs), **{"seed": 0, "micro_batch": 2, **options})
    assert threading.active_count() == before


def test_quarantine_survives_half_a_line(photographs, tmp_path):
    index = build_index(photographs)
    path = tmp_path / "quarantine.jsonl"
    Quarantine(index, path).add(1, "reason")
    path.write_bytes(path.read_bytes() + b'{"sample_id": 2, "na')
    quarantine = Quarantine(index, path)
    assert not quarantine.add(1, "reason")
    assert quarantine.add(2, "reason") and not quarantine.add(2, "reason")
    assert json.loads(path.read_text().splitlines()[-1])["name"] == index.names[2]
    assert not quarantine.add(1, "reason") and len(path.read_text().splitlines()) == 3


def test_samples_are_named_once_by_several_ranks(photographs, tmp_path):
    """Ranks draw a bad sample in different epochs, long after both have opened the list."""
    index = build_index(photographs)
    path = tmp_path / "quarantine.jsonl"
    ranks = [Quarantine(index, path) for _ in range(4)]
    new = []

    def add_all(quarantine, order):
        new.extend(i for i in order if quarantine.add(i, "reason"))

    threads = [
        threading.Thread(target=add_all, args=(rank, [(k * 5 + i) % 12 for i in range(12)]))
        for k, rank in enumerate(ranks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert sorted(line["sample_id"] for line in lines) == sorted(new) == list(range(12))


def test_a_quarantine_that_cannot_be_written_ends_no_run(photographs, tmp_path, caplog):
    index = build_index(photographs)
    (tmp_path / "file").touch()
    assert Quarantine(index, tmp_path / "file" / "quarantine.jsonl").add(3, "reason")
    assert "cannot be written" in caplog.text and index.names[3] in caplog.text


def test_a_quarantine_counts_the_lines_that_a_full_store_refused(
    photographs, tmp_path, caplog, monkeypatch
):
    index, path = build_index(photographs), tmp_path / "quarantine.jsonl"
    quarantine = Quarantine(index, path)

    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    assert quarantine.add(0, "reason")
    with monkeypatch.context() as patch:
        patch.setattr("os.write", full)
        assert all(quarantine.add(sample, "reason") for sample in (1, 2, 3))
    assert not quarantine.add(1, "reason") and quarantine.add(4, "reason") and quarantine.add(5, "")
    assert [text.count("cannot be written") for text in caplog.messages].count(1) == 1
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["sample_id"], line.get("lost_lines")) for line in lines] == [
        *((0, None), (4, 3), (5, None))
    ]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("worker_type", ["thread", "process"])
def test_batches_arrive_on_the_gpu(photographs, worker_type):
    """Twenty batches, so that slots of pinned memory are filled again while copies are done."""
    index = build_index(photographs)
    expected = take(index, 80)
    got = take(index, 80, device="cuda", decode="torch", worker_type=worker_type)
    assert all(view[4].is_cuda for view in got)
    assert same([(*view[:4], view[4].cpu()) for view in got], expected)
