"""A run whose images are behind a web server that fails is the run from files."""

import random
import threading
from pathlib import Path

import pytest

from tests.dataloading.store_case import RangeServer, Request
from tests.dataloading.tar_case import write_tar
from tests.engine.run_case import run, run_twice, same, write_recipe
from tests.processes import run_ranks

pytest.importorskip("obstore", reason="the extra stores is not installed")
pytestmark = [pytest.mark.gloo, pytest.mark.slow]


def test_a_run_from_a_store_stops_resumes_and_ends_as_one_from_files(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, depth=2)
    images = [(f"{p.stem}.jpg", p.read_bytes()) for p in sorted((tmp_path / "photos").rglob("*.*"))]
    for shard in range(2):
        write_tar(tmp_path / "tars" / f"train-{shard}.tar", images[shard::2])
    local = [f"data.path={tmp_path / 'tars'}", f"run.output_dir={tmp_path / 'local'}"]
    assert run_ranks(2, run, recipe, local) == [None] * 2

    server, draws, lock = RangeServer(tmp_path / "tars"), random.Random(3), threading.Lock()
    failed: list[str | int] = []

    def fail(request: Request) -> str | int | None:
        with lock:
            if request.method != "GET" or draws.random() > 0.2:
                return None
            failed.append(draws.choice([503, 429, "truncate", "hang up", "wrong range"]))
            return failed[-1]

    server.fault = fail
    remote = [f"data.path={server.url}/train-{{0..1}}.tar", f"run.output_dir={tmp_path / 'remote'}"]
    first = [*remote, "train.stop_after=3"]
    then = [*remote, f"data.store_cache={tmp_path / 'kept'}"]
    assert run_ranks(2, run_twice, recipe, first, then) == [("train.stop_after=3", None)] * 2
    server.stop()
    same(tmp_path / "remote", tmp_path / "local")
    assert len(failed) > 5
    assert not (tmp_path / "remote" / "quarantine.jsonl").exists()
