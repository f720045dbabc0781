"""CPU-seconds and memory of an index by its number of rows, and builds that are killed.

python -m tests.dataloading.index_scale use FOLDER 1000000 10000000 100000000
python -m tests.dataloading.index_scale names FOLDER 1000000 10000000
python -m tests.dataloading.index_scale launch FOLDER 1400000 14000000
python -m tests.dataloading.index_scale files FOLDER 20000 80000
python -m tests.dataloading.index_scale kill FOLDER 20000

``use``: an index of tars with synthetic rows, 25 bytes per row in ``FOLDER``, is opened, drawn from
and resumed by 8 processes, each of which reads every row once. ``names``: the same for a folder,
with a name of 30 bytes per row, as of ImageNet. ``launch``: what the 8 ranks of a
node do before the first draw, with an index of tars that are there (sparse files). ``files``: the
same for a folder of files. ``kill``: an index of real tars of so many images is built by a process
that is killed again and again.

Prints CPU-seconds, without imports, and the exponent: 1 is linear. The resident memory is the
proportional share (PSS) of all processes together, less that before the index was opened.
"""

import argparse
import functools
import io
import math
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dataloading.columns import new_columns
from dataloading.data_set import Request, list_data
from dataloading.index import build_index
from dataloading.index_file import new_file, publish
from dataloading.kept_index import find_kept, load_or_build, open_kept, require_files
from dataloading.plan import Planner
from tests.dataloading.tar_case import write_tar

PROCESSES = 8
_PER_TAR, _STRIDE = 10_000, 102_400
_AT_ONCE = 1_000_000

Figures = dict[str, float]


def name_of(row: int) -> str:
    """Return a name as those of ImageNet."""
    return f"n{row % 1000:08d}/n{row % 1000:08d}_{row // 1000:05d}.JPEG"


def write_rows(folder: Path, rows: int, own: dict[str, Any], named: bool = False) -> None:
    """Keep an index of tars of ``_PER_TAR`` samples each, or of a folder with names."""
    name_bytes = len(name_of(0)) if named else 0
    with new_file(folder, own["listing"]) as new_buffer:
        entries, names = new_columns(rows, rows * name_bytes, new_buffer)
        for at in range(0, rows, _AT_ONCE):
            ids = np.arange(at, min(at + _AT_ONCE, rows))
            some = entries[at : at + len(ids)]
            some["shard"], some["offset"] = ids // _PER_TAR, ids % _PER_TAR * _STRIDE + 512
            some["size"], some["width"], some["height"] = 100_000, 500, 375
            some["label"] = -1
            if named:
                text = "".join(map(name_of, ids.tolist())).encode()
                names.text[at * name_bytes :][: len(text)] = np.frombuffer(text, np.uint8)
                names.ends[at : at + len(ids)] = (ids + 1) * name_bytes
    facts = {**own, "source": "folder" if named else "webdataset", "digest": "0" * 64}
    facts |= {"images": rows, "name_bytes": rows * name_bytes}
    publish(folder, facts | {"labels": [], "excluded": [], "passed_over": []})


def shared_bytes() -> int:
    """Return this process's proportional share of memory."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def use_index(folder: Path, rows: int, named: bool, meet: Any, answers: Any) -> None:
    """Open an index, draw 100 micro-batches, the last again as a resume does, and read all rows."""
    tars = 0 if named else -(-rows // _PER_TAR)
    shards = [(f"{i}.tar", f"/data/{i}.tar") for i in range(tars)]
    meet.wait()
    before, began = shared_bytes(), time.process_time()
    meet.wait()
    index = open_kept("/data", folder, "0" * 64, shards)
    opened_s = time.process_time() - began

    def make_plan() -> Planner:
        return Planner(
            index,
            seed=0,
            scale=(0.2, 1.0),
            ratio=(0.75, 1.33),
            flip=True,
            count=None,
            shuffle="full",
        )

    plan, began = make_plan(), time.process_time()
    drawn = [plan(np.arange(step * 256, (step + 1) * 256)) for step in range(100)]
    drawn_s = time.process_time() - began
    began = time.process_time()
    again = make_plan()(np.arange(99 * 256, 100 * 256))
    resumed_s = time.process_time() - began
    if not all(np.array_equal(a, b) for a, b in zip(drawn[-1], again, strict=True)):
        raise RuntimeError("a resumed draw differs")
    for at in range(0, rows, 256):
        if (index.entries["size"][at : at + 256] != 100_000).any():
            raise RuntimeError("rows differ")
    for row in range(0, rows if named else 0, 64):  # more than one name per page of memory
        if index.names[row] != name_of(row):
            raise RuntimeError("names differ")
    meet.wait()
    held = shared_bytes() - before
    meet.wait()
    answers.put((opened_s, drawn_s / 100, resumed_s, held))


def measure_use(folder: Path, rows: int, named: bool = False) -> Figures:
    """Return the figures of the slowest process, and the memory of all."""
    write_rows(folder, rows, {"settings": [], "listing": "0" * 64, "contents": ""}, named)
    context = multiprocessing.get_context("spawn")
    meet, answers = context.Barrier(PROCESSES), context.Queue()
    facts = folder, rows, named, meet, answers
    started = [context.Process(target=use_index, args=facts) for _ in range(PROCESSES)]
    for process in started:
        process.start()
    found = np.array([answers.get() for _ in started])
    for process in started:
        process.join()
    opened, drawn, resumed = found[:, :3].max(0)
    return {
        "open s": opened,
        "draw of 256 ms": 1000 * drawn,
        "resume ms": 1000 * resumed,
        "resident bytes per row": found[:, 3].sum() / rows,
    }


def measure_launch(request: Request, folder: Path) -> Figures:
    """Return the CPU-seconds of the ranks of a node whose rank 0 is that of the run, or is not."""
    began = time.process_time()
    index, listing = find_kept(request, folder, "changed")
    first = time.process_time() - began
    if index is None or listing is None:
        raise RuntimeError("the index was not used")
    contents, shards = listing.digest(with_times=False), index.list_shards()
    began = time.process_time()
    require_files(request, contents)
    checked = time.process_time() - began
    began = time.process_time()
    open_kept(request.path, folder, index.digest, shards)
    opened = time.process_time() - began
    others = (PROCESSES - 1) * opened
    return {"first node s": first + others, "other nodes s": checked + opened + others}


def measure_tars(folder: Path, rows: int) -> Figures:
    """Launch with sparse tars."""
    data = folder / "data"
    data.mkdir(parents=True)
    for number in range(-(-rows // _PER_TAR)):
        with (data / f"{number:06d}.tar").open("wb") as file:
            file.truncate(_PER_TAR * _STRIDE)
    request = Request(data, "webdataset")
    listing = list_data(request)
    own = {"settings": [*request[2:]], "contents": listing.digest(with_times=False)}
    write_rows(folder / "index", rows, own | {"listing": listing.digest(with_times=True)})
    return measure_launch(request, folder / "index")


def image_bytes(seed: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def measure_files(folder: Path, rows: int) -> Figures:
    """Launch with a folder of images of 1,000 classes."""
    data = image_bytes(0)
    for number in range(1000):
        (folder / "data" / f"n{number:08d}").mkdir(parents=True)
    for row in range(rows):
        path = folder / "data" / f"n{row % 1000:08d}" / f"n{row % 1000:08d}_{row}.JPEG"
        path.write_bytes(data)
    request = Request(folder / "data")
    began = sum(os.times()[:4])
    load_or_build(request.path, folder / "index")
    built = sum(os.times()[:4]) - began  # with that of helper processes
    return {"build s": built, **measure_launch(request, folder / "index")}


def measure_kills(folder: Path, rows: int) -> Figures:
    """Build with kills until an index is there; its digest must be that of an undisturbed build."""
    data, per_tar = folder / "data", 100
    for tar in range(-(-rows // per_tar)):
        content = [(f"{tar}-{i}.jpg", image_bytes(tar * per_tar + i)) for i in range(per_tar)]
        write_tar(data / f"{tar:06d}.tar", content)
    expected = build_index(data).digest
    code = (
        "import sys; from dataloading.kept_index import load_or_build; load_or_build(*sys.argv[1:])"
    )
    kills, kept = 0, folder / "index"
    while not (kept / "index.json").exists():
        process = subprocess.Popen([sys.executable, "-c", code, str(data), str(kept)])
        try:
            process.wait(random.uniform(0.5, 4.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    if load_or_build(data, kept, verify="always").digest != expected:
        raise RuntimeError("the digest differs")
    return {"kills": kills}


MEASURES = {
    "use": measure_use,
    "names": functools.partial(measure_use, named=True),
    "launch": measure_tars,
    "files": measure_files,
    "kill": measure_kills,
}


def main() -> None:
    """Measure each number of rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=MEASURES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("rows", nargs="+", type=int)
    options = parser.parse_args()
    before: tuple[int, Figures] | None = None
    for rows in options.rows:
        place = options.folder / f"{options.what}-{rows}"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        try:
            found = MEASURES[options.what](place, rows)
        finally:
            shutil.rmtree(place)
        texts: list[str] = []
        for name, value in found.items():
            text = f"{name} {value:.4g}"
            if before is not None and value > 0 < before[1][name]:
                ratio = math.log(value / before[1][name]) / math.log(rows / before[0])
                text += f" (exponent {ratio:.2f})"
            texts.append(text)
        before = rows, found
        sys.stdout.write(f"{options.what} {rows}: {', '.join(texts)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
