"""The first and last lines of a launch, and the outcome of a finished run."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

from cmtmae_scale.config.schema import Config
from cmtmae_scale.engine.build import describe_steps
from cmtmae_scale.engine.ending import Ending
from cmtmae_scale.engine.progress import Progress, fresh_progress
from cmtmae_scale.engine.summary import log_launch, log_result
from cmtmae_scale.errors import EXIT_CRASH, EXIT_DONE, EXIT_STOPPED, ConfigError
from cmtmae_scale.runtime import bf16
from cmtmae_scale.runtime.launch import World

WORLD = World(0, 16, 0, 8, "srun")
CPU = torch.device("cpu")


def lines(caplog: pytest.LogCaptureFixture, level: int = logging.INFO) -> str:
    return "\n".join(one.getMessage() for one in caplog.records if one.levelno == level)


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level(logging.INFO, "cmtmae_scale")
    monkeypatch.setattr(logging.getLogger("cmtmae_scale"), "propagate", True)
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cmtmae", "pretrain"])


def test_the_first_lines_name_what_the_run_uses(caplog) -> None:
    config = Config()
    config.run.output_dir, config.log.images_every = "runs/x", 500
    config.backend.precision = "fp32"
    log_launch(config, WORLD, CPU, lambda: 3 * 2.0**29)
    text = lines(caplog)
    for part in (
        "launcher: srun, world size 16; rank 0 on host ",
        "device cpu",
        "backend: fsdp, sharding hybrid: 8 ranks per copy of weights; precision fp32",
        "memory: modelled 1.50 GiB per rank at the peak, of ",
        "figures every 500 steps in runs/x/figures",
        "cmtmae report runs/x writes runs/x/report.html",
    ):
        assert part in text, part
    assert lines(caplog, logging.WARNING) == ""


@pytest.mark.parametrize("cost", [0.2, 1.5])
def test_a_recipe_for_gpus_on_a_cpu_and_a_run_that_does_not_fit_are_warned_of(
    cost: float, caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bf16, "bf16_cost", lambda: cost)
    config = Config()
    config.run.output_dir, config.backend.name = "runs/x", "deepspeed"
    log_launch(config, WORLD, CPU, lambda: 2.0**60)
    text = lines(caplog, logging.WARNING)
    assert "no GPU is used" in text and "nvidia-smi" in text
    assert ("set backend.precision=fp32" in text) == (cost > 1)
    assert "may not fit; lower train.micro_batch_size" in text
    assert "backend: deepspeed, ZeRO stage 1 over 16 ranks; precision bf16" in lines(caplog)
    assert "no figures (log.images_every is off)" in lines(caplog)


def test_the_last_lines_say_what_came_out_and_what_to_type_next(tmp_path: Path, caplog) -> None:
    config = Config()
    config.run.output_dir = str(tmp_path)
    (tmp_path / "checkpoints" / "step-00000006").mkdir(parents=True)
    entries = [
        {"step": 4, "loss/total": 2.0},
        {"step": 4, "eval/knn10": 0.25, "eval/cls/linear": 0.5, "eval/time_fraction": 0.1},
        {"step": 5, "incident": "step skipped", "why": "spike", "loss/total": 99},
        {"step": 6, "loss/total": 1.5},
    ]
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (tmp_path / "log.jsonl").write_text(f"{text}{{half a li")
    log_result(config, "pre-training", Progress(6, 48, 0, 0, 6, 6, 48))
    text = lines(caplog)
    assert "done: 6 of 6 steps; loss/total 1.5 at step 6\n" in text
    assert "evaluation at step 4: knn10 0.25, cls/linear 0.5\n" in text
    assert f"checkpoint: {tmp_path}/checkpoints/step-00000006" in text
    assert f"knn --checkpoint {tmp_path} --train IMAGES --test IMAGES" in text
    assert f"next: cmtmae report {tmp_path}; cmtmae evaluate knn" in text


def test_a_finished_run_has_no_steps_to_name() -> None:
    progress = fresh_progress(4, 8)
    assert describe_steps(progress) == "steps 1 to 4"
    progress.step = 4
    assert describe_steps(progress).startswith("all 4 steps are done; to train longer, raise")


def outcome(run_dir: Path) -> tuple[int, int]:
    record = json.loads((run_dir / "exit.json").read_text())
    return record["code"], record["step"]


def launch(
    run_dir: Path, progress: Progress | None, error: Exception | None, trained: int = 0
) -> tuple[int, int]:
    """A launch that ends with this progress, after so many steps, and with this error."""
    try:
        with Ending(run_dir, 0) as ending:
            assert not (run_dir / "exit.json").exists()
            ending.progress = progress
            ending.first_step = 0 if progress is None else progress.step - trained
            if error is not None:
                raise error
    except type(error or OSError()):
        pass
    return outcome(run_dir)


def test_a_failed_launch_keeps_the_outcome_of_a_finished_run(tmp_path: Path) -> None:
    done = Progress(4, 32, 0, 0, 4, 4, 32)
    assert launch(tmp_path, done, None) == (EXIT_DONE, 4)
    assert launch(tmp_path, None, ConfigError("mask.ratio differs")) == (EXIT_DONE, 4)
    assert launch(tmp_path, done, ValueError("a bug")) == (EXIT_DONE, 4)
    longer = Progress(9, 72, 4, 32, 9, 9, 72)  # it trained, and could not be saved
    assert launch(tmp_path, longer, ValueError("a bug"), trained=5) == (EXIT_CRASH, 9)
    assert launch(tmp_path, done, None) == (EXIT_DONE, 4)
    longer = Progress(4, 32, 4, 32, 4, 9, 72)
    assert launch(tmp_path, longer, ValueError("a bug")) == (EXIT_CRASH, 4)
    assert launch(tmp_path, None, ConfigError("mask.ratio differs")) == (78, 0)


def test_a_launch_that_had_nothing_to_train_is_no_finished_run(tmp_path: Path) -> None:
    with Ending(tmp_path, 0) as ending:
        ending.progress, ending.done = Progress(2, 16, 0, 0, 2, 4, 32), "train.stop_after=2 is ..."
    assert outcome(tmp_path) == (EXIT_DONE, 2)
    assert launch(tmp_path, None, ConfigError("mask.ratio differs")) == (78, 0)


def test_a_stopped_run_has_the_outcome_of_its_last_launch(tmp_path: Path) -> None:
    with Ending(tmp_path, 0) as ending:
        ending.progress, ending.stopped = Progress(2, 16, 0, 0, 2, 4, 32), "SIGTERM"
    assert outcome(tmp_path) == (EXIT_STOPPED, 2)
    assert launch(tmp_path, None, ConfigError("mask.ratio differs")) == (78, 0)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    assert launch(tmp_path, None, ConfigError("mask.ratio differs")) == (78, 2)
