"""Fine-tune, or continue to, and write down what came of it."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from cmtmae_scale.config.finetune import Finetune
from cmtmae_scale.config.load import config_to_dict, save_config
from cmtmae_scale.engine.ending import Ending
from cmtmae_scale.evaluation.images import Sets
from cmtmae_scale.evaluation.result import Row, Score, as_json, table
from cmtmae_scale.finetuning.build import OpenStart, build_parts, versions
from cmtmae_scale.finetuning.loop import Parts, note, tune
from cmtmae_scale.finetuning.start import Start
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.runtime.lock import hold_run
from cmtmae_scale.runtime.storage import write_text

RESULT = "result.json"


def finetune(
    config: Finetune,
    words: dict[str, str | None],
    open_start: OpenStart,
    world: World,
    device: torch.device,
) -> tuple[str, int]:
    """Fine-tune under an open process group, and measure the last weights.

    Args:
        config: checked settings.
        words: how the command line names the encoder.
        open_start: opens the encoder.
        world: this process's place.
        device: this rank's device.

    Returns:
        What is to be said, and the exit code: 0 done, 75 stopped on request.
        The same call continues. A collective.

    Raises:
        ConfigError, DataError, CheckpointError, NonFiniteError: see ``build_parts`` and ``tune``.
    """
    run_dir = Path(config.run.output_dir)
    with ExitStack() as stack:
        stack.enter_context(hold_run(run_dir, world.rank))
        ending = stack.enter_context(Ending(run_dir, world.rank))
        parts, start, sets = build_parts(config, words, open_start, world, device, stack)
        ending.progress = parts.progress
        if world.rank == 0:
            save_config(config, run_dir / "config.yaml")
        ending.stopped = reason = tune(parts)
        if reason is None:
            said = conclude(parts, start, sets, world)
        else:
            said = f"stopped at step {parts.progress.step} of {parts.progress.end_step}: {reason}"
    return said, ending.code


def conclude(parts: Parts, start: Start, sets: Sets, world: World) -> str:
    """Measure the last weights, write the result; returns what is to be said. A collective."""
    score, digest = parts.accuracy(parts.backend)
    note(parts, score, 0.0)
    pool = {"mean": "patches", "cls": "cls"}[parts.config.head.pool]
    row = Row(start.name, pool, "fine-tuned", score)
    file = parts.run_dir / RESULT
    if world.rank == 0:
        found = record(parts, start, sets, row, digest)
        write_text(file, json.dumps(found, indent=1) + "\n")
    return "\n".join(describe(parts, start, sets, row, score, file))


def describe(
    parts: Parts, start: Start, sets: Sets, row: Row, score: Score, file: Path
) -> Sequence[str]:
    """Lines for people."""
    data = parts.config.data
    lost = len(sets.test) - score.total
    return [
        f"{start.name}: {start.arch} at {start.size} pixels, {parts.progress.end_step} steps of "
        f"{parts.plan.global_batch_size}",
        f"train: {len(sets.train)} images of {len(sets.classes)} classes ({data.path})",
        f"test:  {score.total} images ({data.test_path})",
        *([f"left out: {lost} images that cannot be decoded"] if lost else []),
        "",
        table([row], len(sets.classes)),
        "",
        "the interval takes the test images as independent of each other",
        f"written to {file}",
    ]


def record(parts: Parts, start: Start, sets: Sets, row: Row, digest: str) -> dict[str, Any]:
    """Everything about a fine-tuning, as JSON values."""
    config = parts.config
    return {
        "method": "finetune",
        "subject": start.facts,
        "size": start.size,
        "weights_sha256": {start.name: start.facts["sha256"], "fine-tuned": digest},
        "results": [as_json(row, len(sets.classes))],
        "steps": parts.progress.end_step,
        "passes": parts.progress.position / parts.num_images,
        "images": {
            "train": {
                "path": config.data.path,
                "images": len(sets.train),
                "digest": sets.train.index.digest,
            },
            "test": {
                "path": config.data.test_path,
                "images": len(sets.test),
                "used": row.score.total,
                "digest": sets.test.index.digest,
            },
        },
        "classes": len(sets.classes),
        "settings": config_to_dict(config),
        "seed": config.run.seed,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
