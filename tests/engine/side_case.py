"""Side tasks that fail in a tiny run, and launches on a store that fills up."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch.distributed as dist

from cmtmae_scale.checkpoint.layout import list_checkpoints, step_of
from cmtmae_scale.engine.task import SideTask
from tests.engine.run_case import build


def leave_gradients(run: Any) -> None:
    """Fail between a backward and its step, as diagnostics may."""
    run.backend.micro(run.kept, last=True)
    raise RuntimeError("between backward and step")


def fail(error: Exception, ranks: tuple[int, ...]) -> Callable[[Any], None]:
    """A side task that raises on some ranks and returns on the others."""

    def work(run: Any) -> None:
        if dist.get_rank() in ranks:
            raise error

    return work


def run_with(recipe: Path, overrides: list[str], works: list[Callable[[Any], None]]) -> list[str]:
    """Run with side tasks after every step; returns the warnings of this rank."""
    from cmtmae_scale.engine.loop import train
    from tests.checkpoint.save_case import Lines

    log = Lines()
    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        prepare = built.task.prepare

        def keeping(*arguments: Any) -> Any:
            work, observed = prepare(*arguments)
            built.kept = work
            return work, observed

        built.task.prepare = keeping
        built.task.side_tasks += [
            SideTask("figures", lambda progress: True, work) for work in works
        ]
        assert train(built) is None
    return log.lines


def run_quiet_and_failing(
    recipe: Path, quiet: Path, failing: Path, steps: int, backend: list[str]
) -> list[str]:
    """Run without side tasks, then with failing ones; returns the warnings of the second run."""
    overrides = [f"train.steps={steps}", *backend]
    run_with(recipe, [*overrides, f"run.output_dir={quiet}"], [])
    works = [
        fail(ZeroDivisionError("on all"), (0, 1)),
        fail(ValueError("on the first"), (0,)),
        fail(MemoryError("on the second"), (1,)),
        leave_gradients,
    ]
    return run_with(recipe, [*overrides, f"run.output_dir={failing}"], works)


def saved_at_each_side_task(recipe: Path, every: int) -> list[int]:
    """The newest checkpoint when each step's side task begins."""
    found: list[int] = []

    def work(run: Any) -> None:
        folders = list_checkpoints(run.run_dir / "checkpoints")
        found.append((step_of(folders[0]) or 0) if folders else 0)

    run_with(recipe, [f"checkpoint.every={every}", "checkpoint.background=false"], [work])
    return found


def interrupted_by(recipe: Path, requests: list[type[BaseException]]) -> list[str]:
    """Let side tasks raise requests; returns the types that end the runs."""

    def work(run: Any) -> None:
        raise requests[len(found)]

    found: list[str] = []
    while len(found) < len(requests):
        try:
            run_with(recipe, [f"run.output_dir={recipe.parent / str(len(found))}"], [work])
            found.append("")
        except BaseException as error:
            found.append(type(error).__name__)
    return found


def fill(folder: Path) -> Path:
    """Fill a file system to the last byte; returns the ballast."""
    ballast = folder / "ballast"
    with ballast.open("ab", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError:
                continue
    return ballast


def launches_on_a_full_store(
    recipe: Path, disk: Path, steps: tuple[int, int]
) -> tuple[list[int], list[str]]:
    """Launch five times on a full store, then with room that is gone for some steps.

    Args:
        recipe: of the run, whose folder is on the store.
        disk: the store.
        steps: after the first of these steps it fills up, after the second there is room again.

    Returns:
        Exit codes and warnings.
    """
    from cmtmae_scale.engine import loop
    from tests.checkpoint.save_case import Lines
    from tests.engine.fault_case import command_on_ranks

    log = Lines()
    overrides = [f"run.output_dir={disk / 'run'}", "checkpoint.every=100", "log.images_every=8"]
    overrides.append("train.steps=16")
    (disk / "run").mkdir()
    ballast = fill(disk)
    codes = [command_on_ranks(recipe, overrides) for _ in range(5)]
    ballast.unlink()
    record = loop.record_step

    def recording(run: Any, *arguments: Any) -> None:
        record(run, *arguments)
        if run.progress.step == steps[0]:
            fill(disk)
        if run.progress.step == steps[1]:
            ballast.unlink()

    loop.record_step = recording
    codes.append(command_on_ranks(recipe, overrides))
    return codes, log.lines
