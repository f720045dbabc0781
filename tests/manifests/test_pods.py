"""The pods' own command, as the manifest has it, in two processes instead of two pods."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.runtime.processes import descendants
from tests.engine.run_case import same, write_recipe

ROOT = Path(__file__).resolve().parents[2]
STEPS = 60
FOLDER = "datasets/teachers/vit_large_patch14_clip_224.openai"
TEACHER = f"teacher.weights={FOLDER}/open_clip_model.safetensors"
OVERRIDES = [f"train.steps={STEPS}", "checkpoint.every=5"]

pytestmark = [pytest.mark.slow, pytest.mark.gloo]


def command(node: int, recipe: Path, run_dir: Path) -> list[str]:
    """The training container's command for one GPU per pod, on this machine."""
    documents = yaml.safe_load_all((ROOT / "launchers/kubernetes/train_job.yaml").read_text())
    (job,) = (one for one in documents if one["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    changes = {
        "python": sys.executable,
        "torchrun": str(Path(sys.executable).parent / "torchrun"),
        "--nproc-per-node=8": "--nproc-per-node=1",
        "--node-rank=$(NODE_RANK)": f"--node-rank={node}",
        "--master-addr=cmtmae-0.cmtmae": "--master-addr=127.0.0.1",
        "--master-port=29500": "--master-port=29517",
        "--config=configs/vit_large.yaml": f"--config={recipe}",
        TEACHER: f"run.output_dir={run_dir}",
    }
    assert changes.keys() <= set(container["command"])
    return [changes.get(part, part) for part in container["command"]] + OVERRIDES


@contextmanager
def pods(recipe: Path, run_dir: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Both pods; process 1 of each is the supervisor."""
    started = [
        subprocess.Popen(
            command(node, recipe, run_dir),
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("PET_")}
            | {"JOB_COMPLETION_INDEX": str(node), "CUDA_VISIBLE_DEVICES": ""},
            stderr=subprocess.DEVNULL,
        )
        for node in range(2)
    ]
    try:
        yield started
    finally:
        for one in started:
            for pid in [*descendants(one.pid), one.pid]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            one.wait()


def wait_for_step(run_dir: Path, step: int) -> None:
    limit = time.monotonic() + 240
    while True:
        path = run_dir / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        if any(json.loads(one).get("step", 0) >= step for one in lines if one.endswith("}")):
            return
        assert time.monotonic() < limit
        time.sleep(0.02)


def test_pods_are_stopped_and_lost_and_come_to_the_same_end(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    whole, run_dir = tmp_path / "whole", tmp_path / "run"
    with pods(recipe, whole) as both:
        assert [one.wait(300) for one in both] == [0, 0]
    with pods(recipe, run_dir) as both:  # one pod is drained: all exit with code 75
        wait_for_step(run_dir, 8)
        both[1].send_signal(signal.SIGTERM)
        assert [one.wait(60) for one in both] == [75, 75]
    stopped = json.loads((run_dir / "exit.json").read_text())["step"]
    assert layout.step_of(layout.list_checkpoints(run_dir / "checkpoints")[0]) == stopped
    with pods(recipe, run_dir) as both:  # one pod is lost: the other exits, and is retried
        wait_for_step(run_dir, stopped + 8)
        for pid in [both[0].pid, *descendants(both[0].pid)]:
            os.kill(pid, signal.SIGKILL)
        assert both[1].wait(60) == 1
    with pods(recipe, run_dir) as both:
        assert [one.wait(300) for one in both] == [0, 0]
    same(run_dir, whole, STEPS)
