"""Worker processes: the views, errors and reports of threads, and no trace after any end."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from dataloading import pool
from dataloading.entries import ENTRY
from dataloading.errors import ReadError
from dataloading.index import Index, build_index
from dataloading.pool import WorkerDiedError, find_faults
from dataloading.ring import (
    FAILED,
    UNREADABLE,
    Layout,
    Slot,
    chunk_of,
    chunks,
    map_head,
    new_memory,
)
from dataloading.stores import RemoteTar
from dataloading.stream import Stream
from dataloading.worker import RECORD, Job, work

OPTIONS = {"seed": 5, "micro_batch": 4, "sizes": (32, 24), "decode": "torch", "patience_s": 0.2}


def read_batches(index, number, **options):
    """Batches as plain values: facts, pixels, faulty places; or the text of the error."""
    found = []
    with Stream(index, **{**OPTIONS, "threads": 2, **options}) as stream:
        for _ in range(number):
            try:
                batch = next(stream)
            except ReadError as error:
                found.append(str(error).partition(", tried for")[0])
                continue
            facts = (batch.position, batch.sample_id, batch.view, batch.valid)
            pixels = [image.numpy().tobytes() for image in batch.images]
            found.append(([fact.tolist() for fact in facts], pixels, batch.faulty))
        found.append((stream.draws, stream.bad))
    return found


def damage(index):
    """Grey for three reasons, and a file that cannot be read."""
    cut, emptied, longer, gone = (index.root / index.names[i] for i in (1, 4, 6, 9))
    data = cut.read_bytes()
    cut.write_bytes(data[:-200] + b" " * 200)
    emptied.write_bytes(b"")
    longer.write_bytes(longer.read_bytes() + b"more")
    gone.unlink()


def children(pid, deep=True):
    """Processes below one, parents before their children."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
        if parent == pid:
            found += [int(folder.name), *(children(int(folder.name)) if deep else [])]
    return found


def wait_for_memory(pid):
    """Wait until a process has mapped the ring; one worker may decode the first batch alone."""
    for _ in range(400):
        maps = Path(f"/proc/{pid}/maps").read_text()
        if "memfd:views" in maps:
            return maps
        time.sleep(0.05)
    raise AssertionError(f"{pid} has not mapped the ring")


def wait_until_gone(pids):
    alive = pids
    for _ in range(400):
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        if not alive:
            return
        time.sleep(0.05)
    raise AssertionError(f"{alive} are still there")


def test_workers_do_what_threads_do(photographs, tmp_path):
    """Views, order, grey views, reasons, and the error in place of a batch, across epochs."""
    index = build_index(photographs)
    damage(index)
    kept = [tmp_path / kind / "quarantine.jsonl" for kind in ("thread", "process")]
    threads, processes = (
        read_batches(index, 9, worker_type=path.parent.name, quarantine=path) for path in kept
    )
    assert processes == threads
    lines = [sorted(path.read_text().splitlines()) for path in kept]
    assert lines[0] == lines[1] and len(lines[0]) == 3
    errors = [one for one in processes if isinstance(one, str)]
    assert len(errors) == 3 and all(index.names[9] in one for one in errors)


class DeadOnArrival:
    """Processes that die at once, always."""

    started = 0

    def __init__(self, job):
        type(self).started += 1
        self.busy = map_head(job.memory, job.layout)

    def request(self, slot, layout):
        self.busy[1] = slot * layout.views + 2 + 1

    def answers(self):
        raise WorkerDiedError("was killed by SIGKILL (out of memory?)", 1)

    def close(self):
        pass


def test_workers_that_die_again_end_the_batch_not_the_stream(photographs, monkeypatch, caplog):
    """No batch waits forever: after a second death it fails like a batch that cannot be read."""
    monkeypatch.setattr(pool, "Processes", DeadOnArrival)
    index = build_index(photographs)
    text = r"SIGKILL .* while it decoded class\d/\d+.jpg, for the second time .*data.workers"
    with Stream(index, threads=2, worker_type="process", **OPTIONS) as stream:
        for _ in range(3):
            with pytest.raises(ReadError, match=text) as caught:
                next(stream)
            assert caught.value.exit_code == 75
    assert DeadOnArrival.started == 7 and caplog.text.count("new workers take over") == 6


def test_a_fault_of_ours_is_raised_with_its_traceback():
    """The outcome that a worker writes when its code fails."""
    slot = one_slot()
    slot.write_reason(2, FAILED, "Traceback: ZeroDivisionError: a bug")
    with pytest.raises(RuntimeError, match=r"please report this(?s:.*)ZeroDivisionError: a bug"):
        find_faults(slot)
    slot.write_reason(1, UNREADABLE, "a.jpg: gone")
    with pytest.raises(ReadError, match=r"a\.jpg: gone"):
        find_faults(slot)


def one_slot():
    layout = Layout(views=4, sizes=(8,), encoded_bytes=0, workers=1)
    memory = new_memory(layout)
    os.ftruncate(memory, layout.head_bytes() + layout.slot_bytes())
    slot = Slot(memory, layout, 0)
    os.close(memory)
    return slot


@pytest.mark.parametrize(("views", "workers"), [(1, 8), (4, 2), (64, 4), (256, 8), (5000, 8)])
def test_requests_cover_a_batch_once_and_fit_into_a_small_pipe(views, workers):
    layout = Layout(views, (8,), 0, workers)
    firsts = list(chunks(layout))
    assert firsts == list(range(0, views, chunk_of(layout))) and len(firsts) <= 128
    assert len(firsts) >= min(views, workers)


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_nothing_is_lost(photographs, caplog):
    """Signals that ask a run to stop reach no worker; closing leaves no process."""
    index = build_index(photographs)
    with Stream(index, threads=2, worker_type="thread", **OPTIONS) as stream:
        expected = [next(stream).images[0].clone() for _ in range(12)]
    others = set(children(os.getpid()))
    stream = Stream(index, threads=2, worker_type="process", **OPTIONS)
    assert torch.equal(next(stream).images[0], expected[0])
    (server,) = set(children(os.getpid(), deep=False)) - others
    for pid in (server, *children(server)):
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(pid, number)
    for k in range(1, 6):
        assert torch.equal(next(stream).images[0], expected[k])
    assert "new workers" not in caplog.text
    os.kill(children(server)[0], signal.SIGKILL)
    time.sleep(1.0)  # the server checks its workers twice per second
    for k in range(6, 12):
        assert torch.equal(next(stream).images[0], expected[k])
    assert caplog.text.count("was killed by SIGKILL") == 1
    assert (stream.draws, stream.bad) == (48, 0)
    processes = set(children(os.getpid())) - others
    assert len(processes) == 3 and server not in processes
    stream.close()
    stream.close()
    wait_until_gone(processes)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["training process", "server"])
def test_no_worker_and_no_memory_outlive_a_kill(photographs, victim):
    index = build_index(photographs)
    seen, tell = os.pipe()
    parent = os.fork()
    if not parent:
        stream = Stream(index, threads=2, worker_type="process", **OPTIONS)
        next(stream)
        os.write(tell, json.dumps(children(os.getpid())).encode())
        time.sleep(300)
        os._exit(0)
    server, *workers = json.loads(os.read(seen, 4096))
    assert len(workers) == 2
    for worker in workers:
        assert "/dev/shm" not in wait_for_memory(worker)  # memory that has no name
    os.kill(parent if victim == "training process" else server, signal.SIGKILL)
    wait_until_gone(workers)
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until_gone([server])


def test_a_worker_reads_the_next_request_of_a_store_ahead(monkeypatch):
    layout = Layout(views=6, sizes=(4,), encoded_bytes=0, workers=3)
    rows = np.zeros(6, ENTRY)
    rows["offset"] = range(6)
    tar = RemoteTar("s3://b/a.tar", 1, "")
    index = Index("s3://b/a.tar", "webdataset", rows[:0], (), (), (), "", shards=(tar,))
    memory = new_memory(layout)
    os.ftruncate(memory, layout.head_bytes() + layout.slot_bytes())
    Slot(memory, layout, 0).rows[:] = rows
    (tasks, ask), (answers, results) = os.pipe(), os.pipe()
    done = []

    def make_filler(index, job):
        offsets = index.entries["offset"]
        return (
            lambda slot, view, row: done.append(("decoded", view, int(offsets[row]))),
            lambda rows: done.append(("read", *offsets[list(rows)].tolist())),
        )

    monkeypatch.setattr("dataloading.worker._make_filler", make_filler)
    for first in chunks(layout):
        os.write(ask, RECORD.pack(0, first))
    os.close(ask)
    work(Job(index, layout, memory, tasks, results, 1.0), 0)
    assert done == [
        *(("read", 0, 1), ("read", 2, 3), ("decoded", 0, 0), ("decoded", 1, 1)),
        *(("read", 4, 5), ("decoded", 2, 2), ("decoded", 3, 3)),
    ]  # then the pipe is closed
    for descriptor in (memory, tasks, answers, results):
        os.close(descriptor)
