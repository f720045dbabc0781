"""The next micro-batch is drawn before a step is applied, and changes nothing but the order."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.engine.fault_case import incidents, run_changed
from tests.engine.run_case import STEPS, build, read_losses, same, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
NAN = float("nan")
ROLLS_BACK = ["guard.skip_limit=2", "checkpoint.keep=9"]


def note_order(recipe: Path) -> list[str]:
    """Run three steps of one micro-batch each; returns what the host does, in order."""
    from cmtmae_scale.backends import adamw
    from cmtmae_scale.engine.loop import train

    events: list[str] = []

    def noting(name: str, function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            events.append(name)
            return function(*arguments, **options)

        return call

    @contextmanager
    def noted_lap() -> Iterator[None]:
        events.append("lap")
        yield
        events.append("end")

    start_read = adamw.start_read
    with ExitStack() as stack:
        one_batch = ["train.global_batch_size=2", "train.steps=3"]
        built = build(recipe, one_batch, stack)
        for place, method, name in (
            (built.task.models.teachers[""], "forward_batch", "teacher"),
            (built.backend, "momentum_forward", "momentum"),
            (built.backend.optimizer, "step", "update"),
        ):
            changed = noting(name, getattr(place, method))
            stack.enter_context(mock.patch.object(place, method, changed))
        reading = mock.patch.object(
            adamw, "start_read", lambda values: noting("read", start_read(values))
        )
        stack.enter_context(reading)
        stack.enter_context(mock.patch.object(built.stragglers, "own_time", noted_lap))
        train(built)
    return events


def test_the_teacher_runs_before_the_host_waits_and_alone_is_own_time(tmp_path: Path) -> None:
    """The momentum encoder may wait for other ranks. After the last step nothing is drawn."""
    (events,) = run_ranks(1, note_order, write_recipe(tmp_path, depth=2))
    drawn, applied = ["lap", "teacher", "end"], ["read", "update"]
    step = ["momentum", *drawn, *applied]
    assert events == [*drawn, *step, *step, "momentum", *applied]


def run_both_ways(recipe: Path, folders: tuple[Path, Path]) -> list[Any]:
    """Run with the draw ahead and without it; steps 3 and 4 are not finite on rank 1."""
    from cmtmae_scale.engine import loop

    found = []
    for folder, ahead in zip(folders, (loop.draw_ahead, lambda *_: None), strict=True):
        with mock.patch.object(loop, "draw_ahead", ahead):
            overrides = [f"run.output_dir={folder}", *ROLLS_BACK]
            found.append(run_changed(recipe, overrides, {3: NAN, 4: NAN}, 1))
    return found


def test_a_batch_drawn_ahead_changes_nothing(tmp_path: Path) -> None:
    """Weights, moments, EMA, log, skipped steps and the data after a roll-back are the same."""
    folders = tmp_path / "ahead", tmp_path / "usual"
    for ahead, usual in run_ranks(2, run_both_ways, write_recipe(tmp_path, depth=2), folders):
        assert ahead["error"] == "" and ahead["progress"] == usual["progress"]
    same(*folders)
    logs = [read_losses(folder) for folder in folders]
    assert logs[0] == logs[1] and len(logs[0]) == STEPS
    assert [line["incident"] for line in incidents(folders[0])][-1] == "rolled back"
