"""Stopped, killed and resumed: the loss stays on the curve of an undisturbed run.

On a GPU with ViT-L/16, its photographs decoded there; prints seconds from signal to exit:

    python -m pytest -m 'gpu and slow' -s tests/pretraining/test_curve.py
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.engine.run_case import make_photographs, write_recipe

ROOT = Path(__file__).parents[2]
STEPS, EVERY = 60, 10
COMMON = [f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "log.every=1"]
LARGE = ["train.epochs=null", "train.global_batch_size=128", "train.micro_batch_size=128"]
LARGE += ["teacher.weights=random", "data.expected_images=null", "data.decode=dali"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


class Starts:
    """Starts of one run, one after the other."""

    def __init__(self, recipe: Path, run_dir: Path, overrides: list[str]) -> None:
        script = str(ROOT / "launchers" / "pretrain.py")
        own = [*COMMON, *overrides, f"run.output_dir={run_dir}"]
        self.line = [sys.executable, script, "--config", str(recipe), *own]
        self.run_dir = run_dir

    def start(self) -> subprocess.Popen[bytes]:
        # DS_ACCELERATOR is the tests' own; a run on a GPU does without.
        environment = {k: v for k, v in os.environ.items() if k != "DS_ACCELERATOR"}
        return subprocess.Popen(self.line, env=environment, stderr=subprocess.DEVNULL)

    def losses(self) -> dict[int, float]:
        path = self.run_dir / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        entries = [json.loads(line) for line in lines if line.endswith("}")]
        return {one["step"]: one["loss/total"] for one in entries if "loss/total" in one}

    def until(self, step: int, number: int) -> tuple[int, float]:
        """Start, send a signal at a step; returns exit code and seconds from there to the end."""
        child = self.start()
        limit = time.monotonic() + 600
        while max(self.losses(), default=0) < step:
            assert child.poll() is None and time.monotonic() < limit
            time.sleep(0.02)
        sent = time.monotonic()
        child.send_signal(number)
        return child.wait(600), time.monotonic() - sent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "overrides", "tolerance"),
    [
        pytest.param(None, [], 0.0, id="tiny"),
        pytest.param("vit_large", LARGE, 0.02, id="vit_large", marks=[pytest.mark.gpu, GPU]),
    ],
)
def test_a_run_stopped_and_killed_stays_on_the_curve(
    tmp_path: Path, recipe: str | None, overrides: list[str], tolerance: float
) -> None:
    path = write_recipe(tmp_path)
    if recipe is not None:
        path = ROOT / "configs" / f"{recipe}.yaml"
        overrides = [*overrides, f"data.path={make_photographs(tmp_path / 'many', 400)}"]
    undisturbed = Starts(path, tmp_path / "undisturbed", overrides)
    assert undisturbed.start().wait(1200) == 0
    disturbed = Starts(path, tmp_path / "disturbed", overrides)
    code, stop_s = disturbed.until(STEPS // 4, signal.SIGTERM)
    assert code == 75
    stopped_at = json.loads((disturbed.run_dir / "exit.json").read_text())["step"]
    code, _ = disturbed.until(stopped_at + EVERY + 2, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert disturbed.start().wait(1200) == 0
    expected, found = undisturbed.losses(), disturbed.losses()
    assert found.keys() == expected.keys() == set(range(1, STEPS + 1))
    largest = max(abs(found[step] / expected[step] - 1) for step in expected)
    print(f"\nSIGTERM to exit {stop_s:.1f} s; largest difference of a loss {largest:.2e}")
    assert largest <= tolerance
