"""Faults put into a tiny run: losses that are not finite or jump, ranks that hang, die or lag."""

import dataclasses
import json
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import yaml

from dataloading import folders
from tests.engine.run_case import build, is_finetuning, read_log, this_world

Change = Callable[[int, Any], Any]
"""From the step that is being taken and a micro-batch's losses to other losses."""


def scaled(by_step: dict[int, float], rank: int | None = None) -> Change:
    """Multiply the losses of some positions' steps, counted in steps of data since the start."""

    def change(number: int, losses: Any) -> Any:
        if rank is not None and dist.get_rank() != rank:
            return losses
        factor = by_step.get(number, 1.0)
        return {name: term * factor for name, term in losses.items()}

    return change


def run_changed(
    recipe: Path, overrides: list[str], by_step: dict[int, float], rank: int | None = None
) -> dict[str, Any]:
    """Run with changed losses; returns the result, or the error.

    ``by_step`` counts steps of data, from 1: it continues where the run rolls back.
    """
    from cmtmae_scale.engine.loop import train
    from cmtmae_scale.errors import CmtMaeError

    change = scaled(by_step, rank)
    seen: dict[str, Any] = {"error": "", "states": {}}
    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        backend = built.backend
        micro, update = backend.micro, backend.step

        def changed_micro(batch: Any, last: bool) -> Any:
            losses = micro(batch, last)
            number = built.progress.position // built.plan.global_batch_size + 1
            return change(number, losses)

        def noting_step(*arguments: Any) -> Any:
            before = digest(backend)
            outcome = update(*arguments)
            number = built.progress.position // built.plan.global_batch_size + 1
            seen["states"][number] = (outcome.applied, before == digest(backend))
            return outcome

        backend.micro, backend.step = changed_micro, noting_step  # type: ignore[method-assign]
        try:
            train(built)
        except CmtMaeError as error:
            seen["error"] = str(error)
        seen["progress"] = dataclasses.asdict(built.progress)
    return seen


def run_each(
    recipe: Path, cases: list[tuple[list[str], dict[int, float]]], rank: int
) -> list[dict[str, Any]]:
    """``run_changed`` for several overrides and changes, in the same processes."""
    return [run_changed(recipe, overrides, change, rank) for overrides, change in cases]


def run_with_a_flipped_bit(recipe: Path, overrides: list[str], step: int) -> str:
    """Run, with a bit of rank 1's weights flipped after a step; returns the error."""
    from cmtmae_scale.engine.loop import train
    from cmtmae_scale.errors import CmtMaeError

    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        backend = built.backend
        update = backend.momentum_update

        def flipping(momentum: float) -> None:
            update(momentum)
            if dist.get_rank() == 1 and built.progress.step + 1 == step:
                held = (part.local for part in backend.fragments().values())
                next(part for part in held if part.numel()).view(torch.int32)[0] ^= 1

        backend.momentum_update = flipping  # type: ignore[method-assign]
        try:
            train(built)
        except CmtMaeError as error:
            return str(error)
    return ""


def digest(backend: Any) -> list[int]:
    """A number for each state of the models and the optimizer."""
    return [
        hash(part.local.detach().cpu().numpy().tobytes()) for part in backend.fragments().values()
    ]


def incidents(run_dir: Path) -> list[dict[str, Any]]:
    return [entry for entry in read_log(run_dir) if "incident" in entry]


@contextmanager
def ready_group(*_: Any) -> Iterator[None]:
    """Replace it: the test's own process group is open already."""
    yield


def resume_with_a_readable_image(recipe: Path) -> tuple[int, int]:
    """Train while one image cannot be read, and again when it can; returns both exit codes.

    Between the launches other commands open the index of the run.
    """
    data = yaml.safe_load(recipe.read_text())["data"]
    locked = min(Path(data["path"]).rglob("*.jpg"))
    read = folders.header_of_file

    def refuse(path: Path) -> Any:
        if path == locked:
            raise PermissionError(13, "Permission denied")
        return read(path)

    with mock.patch.object(folders, "header_of_file", refuse):
        first = command_on_ranks(recipe, ["train.stop_after=1"])
    if not is_finetuning(recipe):
        open_from_outside(recipe)
    return first, command_on_ranks(recipe, [])


def open_from_outside(recipe: Path) -> None:
    """Open the index of a run as ``--dry-run``, an export and a sidecar do."""
    from cmtmae_scale.cache.build import open_or_build_index
    from cmtmae_scale.commands.dry_run import dry_run
    from cmtmae_scale.config.load import load_config
    from cmtmae_scale.export.origin import open_origin
    from cmtmae_scale.export.views import open_run_index

    run_dir = recipe.parent / "run"
    text, code = dry_run(load_config(recipe), this_world())
    assert code == 0, text
    open_run_index(open_origin(run_dir, "student"))
    config = load_config(run_dir / "config.yaml")
    open_or_build_index(config, run_dir / "index", "positions")


def command_on_ranks(recipe: Path, overrides: list[str], fault: str = "", victim: int = 0) -> int:
    """The command's own code on every rank of an open group; ``fault`` befalls one rank.

    Returns:
        The exit code.
    """
    from cmtmae_scale.commands.finetune import finetune
    from cmtmae_scale.commands.pretrain import pretrain
    from tests.finetuning.finetune_case import arguments

    torch.set_num_threads(1)
    name, command = ("finetune", finetune) if is_finetuning(recipe) else ("pretrain", pretrain)
    line = ["--config", str(recipe), *overrides]
    with ExitStack() as stack:
        for place, stand_in in (
            (f"commands.{name}.find_world", this_world),
            (f"commands.{name}.set_up_logging", lambda *_: None),
            ("engine.run.process_group", ready_group),
        ):
            stack.enter_context(mock.patch(f"cmtmae_scale.{place}", stand_in))
        if fault and dist.get_rank() == victim:
            befall(fault, run_dir_of(recipe, overrides))
        return command(arguments(recipe, *overrides) if name == "finetune" else line)


def run_dir_of(recipe: Path, overrides: list[str]) -> Path:
    given = [text for text in overrides if text.startswith("run.output_dir=")]
    return Path(given[-1].partition("=")[2]) if given else recipe.parent / "run"


def commands_on_ranks(recipe: Path, launches: list[list[str]]) -> list[int]:
    """Launch after launch in the same processes; their exit codes."""
    return [command_on_ranks(recipe, overrides) for overrides in launches]


def take_over(run_dir: Path) -> None:
    """Take over the lock as a launch does that believes its process dead."""
    folder = run_dir / "lock"
    other = {"host": "far", "pid": 7, "since": "today", "started": 1, "pids": "another"}
    (folder / "00000009.json").write_text(json.dumps(other))
    for path in folder.glob("*1.json"):
        path.unlink()


def leave(*arguments: Any) -> None:
    """``command_on_ranks``; the process exits with its code at once, as the command does."""
    os._exit(command_on_ranks(*arguments))


def befall(fault: str, run_dir: Path) -> None:
    """Cause an event in this process after some steps."""
    if fault in ("interrupt", "stall"):
        from cmtmae_scale.engine import build

        def struck(*_: Any) -> Any:
            if fault == "interrupt":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1000)

        build.find_progress = struck
        return
    if fault == "takeover":
        from cmtmae_scale.engine import loop

        usual_batch = loop.next_batch

        def taking(run: Any) -> Any:
            take_over(run_dir)
            return usual_batch(run)

        loop.next_batch = taking
        return
    kinds = {"kill": signal.SIGKILL, "freeze": signal.SIGSTOP, "stop": signal.SIGTERM}
    if fault == "sleep":
        from cmtmae_scale.engine import loop

        usual, taken = loop.next_batch, [0]

        def slow(run: Any) -> Any:
            taken[0] += 1
            if taken[0] > 2:  # from the second step on
                time.sleep(1000)
            return usual(run)

        loop.next_batch = slow
        return

    def strike() -> None:
        limit = time.monotonic() + 60
        while not (run_dir / "log.jsonl").exists() and time.monotonic() < limit:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.3))
        os.kill(os.getpid(), kinds[fault])

    threading.Thread(target=strike, daemon=True).start()


def build_after_takeover(recipe: Path) -> str:
    """Build while another launch takes the folder over after the sweep; returns the error."""
    from cmtmae_scale.errors import LockLostError

    lock = mock.Mock()
    lock.require.side_effect = [None, LockLostError("taken over")]
    with ExitStack() as stack:
        try:
            build(recipe, [], stack, lock)
        except LockLostError as error:
            return str(error)
    return ""
