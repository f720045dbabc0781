"""The first and last log lines of a launch: where it runs, its results, and the next commands."""

import logging
import os
import shlex
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale.checkpoint.layout import ENCODER, folder_of, is_finite
from cmtmae_scale.config.schema import Trained
from cmtmae_scale.engine.progress import Progress
from cmtmae_scale.engine.sinks import LOG_FILE
from cmtmae_scale.engine.telemetry import FIGURES
from cmtmae_scale.runtime.bf16 import slow_bf16_warning
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.log import TRAIN_LOG
from cmtmae_scale.runtime.storage import read_json
from dataloading.passed_over import format_count

logger = logging.getLogger(__name__)

GIB = 2**30
REPORT = "report.html"


def log_launch(
    config: Trained, world: World, device: torch.device, model_memory: Callable[[], float | None]
) -> None:
    """Log launcher, device, backend, precision, memory and output folder.

    Args:
        config: checked settings.
        world: place of this process.
        device: device of this rank.
        model_memory: returns the modelled bytes per device at the peak; ``None``: not modelled.
    """
    logger.info(
        "launcher: %s, world size %d; rank 0 on host %s, device %s",
        world.launcher,
        world.world_size,
        socket.gethostname(),
        describe_device(device),
    )
    if device.type == "cpu" and config.backend.precision == "bf16":
        slower = slow_bf16_warning(device, "bf16")
        logger.warning(
            "device: no GPU is used (%s), and the recipe is for GPUs: a step may take hours; "
            "launch it where nvidia-smi shows a GPU%s",
            why_no_gpu(),
            "" if slower is None else f"; for a trial: {slower}",
        )
    logger.info("%s; precision %s", describe_backend(config, world), config.backend.precision)
    needed, available = model_memory(), device_bytes(world, device)
    if needed is not None:
        per = "rank" if device.type == "cpu" else "GPU"
        text = f"{needed / GIB:.2f} GiB per {per} at the peak, of {available / GIB:.1f} GiB"
        logger.info("memory: modelled %s", text)
        if needed > available:
            logger.warning(
                "memory: modelled %s: the run may not fit; lower train.micro_batch_size, which "
                "keeps the global batch, or set backend.activation_checkpointing=true",
                text,
            )
    logger.info("%s", describe_output(config))


def describe_device(device: torch.device) -> str:
    """Return a device with its name."""
    if device.type != "cuda":
        return str(device)
    return f"{device} ({torch.cuda.get_device_name(device)})"


def device_bytes(world: World, device: torch.device) -> float:
    """Return the memory of this rank's device; of a CPU, its share of the host's memory."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / world.local_world_size


def why_no_gpu() -> str:
    """Return why torch sees no GPU."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None:
        return f"torch sees none; CUDA_VISIBLE_DEVICES={hidden!r}"
    return "torch sees none"


def describe_backend(config: Trained, world: World) -> str:
    """Return the backend and over how many ranks it shards."""
    backend, ranks = config.backend, world.world_size
    if backend.name == "deepspeed":
        count = format_count(ranks, "rank")
        return f"backend: deepspeed, ZeRO stage {backend.zero_stage} over {count}"
    copies = {"replicate": 1, "hybrid": world.local_world_size, "full": ranks}
    count = format_count(copies[backend.sharding], "rank")
    return f"backend: fsdp, sharding {backend.sharding}: {count} per copy of weights"


def describe_output(config: Trained) -> str:
    """Return where the files of the run are, and how its report is written."""
    run_dir = Path(config.run.output_dir)
    every = getattr(config.log, "images_every", None)
    figures = "no figures (log.images_every is off)"
    if every is not None:
        figures = f"figures every {every} steps in {run_dir / FIGURES}"
    elif not hasattr(config.log, "images_every"):
        figures = "no figures"
    return (
        f"output: {run_dir} with {LOG_FILE}, {TRAIN_LOG}, tensorboard, checkpoints; {figures}; "
        f"report: {command_line('report', run_dir)} writes {run_dir / REPORT}"
    )


def command_line(name: str, *words: str | Path) -> str:
    """Return a command of ``cmtmae`` as it is typed."""
    return shlex.join(["cmtmae", name, *(str(word) for word in words)])


def log_result(config: Trained, task: str, progress: Progress) -> None:
    """Log the results of a complete run, its newest checkpoint, and the next commands."""
    run_dir = Path(config.run.output_dir)
    values = last_values(run_dir / LOG_FILE)
    done = f"done: {progress.step} of {progress.end_step} steps"
    if "loss/total" in values:
        step, loss = values["loss/total"]
        done += f"; loss/total {loss:.4g} at step {step}"
    logger.info("%s", done)
    results: dict[int, list[str]] = {}
    for name, (step, value) in values.items():
        if name.startswith("eval/") and name not in NOT_RESULTS:
            results.setdefault(step, []).append(f"{name.removeprefix('eval/')} {value:.4g}")
    for step, shown in sorted(results.items()):
        logger.info("evaluation at step %d: %s", step, ", ".join(shown))
    folder = folder_of(run_dir / "checkpoints", progress.step)
    if os.path.isdir(folder):  # False where the store fails
        logger.info("checkpoint: %s; weights under timm's names: %s", folder, folder / ENCODER)
    commands = [command_line("report", run_dir)]
    if task == "pre-training":
        sets: list[str] = []
        evaluation = getattr(config, "eval", None)
        if evaluation is None or not (evaluation.train_path and evaluation.test_path):
            sets = ["--train", "IMAGES", "--test", "IMAGES"]
        commands += [
            command_line("evaluate", "knn", "--checkpoint", run_dir, *sets),
            command_line("export", "timm", "--checkpoint", run_dir),
        ]
    logger.info("next: %s", "; ".join(commands))


NOT_RESULTS = ("eval/time_fraction", "eval/pass")
"""Entries of an evaluation that are not accuracies."""


def last_values(file: Path) -> dict[str, tuple[int, float]]:
    """Return the last value of each name in a log, with its step."""
    found: dict[str, tuple[int, float]] = {}
    for entry in read_entries(file):
        step = entry.pop("step", None)
        if isinstance(step, int) and "incident" not in entry:
            numbers = {k: v for k, v in entry.items() if is_finite(v)}
            found |= {name: (step, float(value)) for name, value in numbers.items()}
    return found


def read_entries(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the readable lines of a log; none where there is no log."""
    try:
        lines = file.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        try:
            entry = read_json(line.encode())
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry
