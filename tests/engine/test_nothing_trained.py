"""Runs that train nothing report it: a teacher that is not finite, steps that are all skipped."""

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.config.schema import Guard
from cmtmae_scale.engine.skips import Skips
from cmtmae_scale.engine.telemetry import Telemetry
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_DONE, CmtMaeError
from dataloading.order import sample_ids
from dataloading.stream import Batch
from tests.engine.fault_case import incidents
from tests.engine.run_case import build, read_log, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
VICTIM = int(sample_ids(20, 0, np.array([12]))[0][0])
"""Sample on which the teacher fails; drawn in step 2."""


class FailingTeacher:
    """A teacher one of whose outputs is not finite for one sample."""

    def __init__(self, teacher: Any, output: str, value: float) -> None:
        self.teacher, self.output, self.value = teacher, output, value

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def forward_batch(self, batch: Batch) -> Any:
        view = self.teacher.forward_batch(batch)
        found = getattr(view, self.output).clone()
        found[batch.sample_id == VICTIM, 3] = self.value
        return view._replace(**{self.output: found})


def undecodable(stream: Any, chosen: tuple[int, int]) -> Any:
    """A stream of which some batches have no valid view."""
    for number, batch in enumerate(stream):
        is_chosen = chosen[0] <= number < chosen[1]
        yield batch._replace(valid=batch.valid & False) if is_chosen else batch


def run_cases(recipe: Path, cases: dict[str, Any]) -> dict[str, Any]:
    """Train once per case; returns code, error and progress by case."""
    from cmtmae_scale.engine.loop import train

    seen: dict[str, Any] = {}
    for name, (overrides, fault) in cases.items():
        code, error = EXIT_DONE, ""
        with ExitStack() as stack:
            built = build(recipe, [f"run.output_dir={recipe.parent / name}", *overrides], stack)
            if name.startswith("teacher"):
                teachers = built.task.models.teachers
                teachers[""] = FailingTeacher(teachers[""], *fault)
            elif "undecodable" in name:
                built.stream = undecodable(built.stream, fault)
            else:
                micro = built.backend.micro

                def nan_micro(batch: Any, last: bool, micro: Any = micro) -> Any:
                    losses = micro(batch, last)
                    return losses | {"total": losses["total"] * math.nan}

                built.backend.micro = nan_micro
            try:
                train(built)
            except CmtMaeError as refused:
                code, error = refused.exit_code, str(refused)
            seen[name] = code, error, built.progress.step, built.progress.applied
    return seen


CASES = {
    "teacher attention": ([], ("attention", math.nan)),
    "teacher features": ([], ("features", math.inf)),
    "skipped": (["train.steps=2"], None),
    "all undecodable": (["data.max_bad_fraction=1.0", "train.steps=1"], (0, 8)),
    "undecodable": (["data.max_bad_fraction=1.0", "log.every=2", "train.steps=5"], (2, 8)),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("nothing")
    return folder, run_ranks(2, run_cases, write_recipe(folder, depth=2), CASES)


@pytest.mark.parametrize("name", ["teacher attention", "teacher features"])
def test_a_teacher_that_is_not_finite_stops_every_rank_and_names_the_sample(
    seen: Any, name: str
) -> None:
    """The attention map alone would leave every loss finite, and the masks wrong."""
    folder, ranks = seen
    code, error, step, applied = ranks[0][name]
    assert ranks[1][name] == ranks[0][name]
    assert (code, step, applied) == (EXIT_CONFIG, 1, 1)
    assert "step 2 was not taken: the output of teacher.model=test_vit is not" in error
    names = sorted(p.relative_to(folder / "photos") for p in (folder / "photos").rglob("*.jpg"))
    assert f"for samples {VICTIM} ({names[VICTIM]}), which" in error
    assert "set backend.precision=fp32" in error
    assert incidents(folder / name) == []
    saved = layout.read_state(layout.list_checkpoints(folder / name / "checkpoints")[0])
    assert saved["progress"]["step"] == 1


def test_a_run_whose_steps_were_all_skipped_is_not_done(seen: Any) -> None:
    folder, ranks = seen
    code, error, step, applied = ranks[0]["skipped"]
    assert ranks[1]["skipped"] == ranks[0]["skipped"]
    assert (code, step, applied) == (EXIT_CRASH, 2, 0)
    assert error.startswith("nothing was trained: all 2 steps were skipped; the last: step 2: ")
    assert "not finite on ranks 0, 1: loss/total" in error
    assert layout.list_checkpoints(folder / "skipped" / "checkpoints") == []
    assert len(incidents(folder / "skipped")) == 2


def test_a_run_that_decoded_nothing_is_not_done(seen: Any) -> None:
    folder, ranks = seen
    code, error, *_ = ranks[0]["all undecodable"]
    assert ranks[1]["all undecodable"] == ranks[0]["all undecodable"]
    assert code == EXIT_CONFIG
    assert error.startswith("nothing was trained: none of 8 views could be decoded; replace the ")
    assert layout.list_checkpoints(folder / "all undecodable" / "checkpoints") == []


def test_a_step_without_a_valid_row_logs_no_loss(seen: Any) -> None:
    """Steps 2 to 4 have none: the interval of steps 1 and 2 has the loss of step 1 alone."""
    folder, ranks = seen
    assert ranks[0]["undecodable"] == (EXIT_DONE, "", 5, 5)
    entries = {entry["step"]: entry for entry in read_log(folder / "undecodable") if "lr" in entry}
    assert sorted(entries) == [2, 4, 5]
    assert entries[2]["valid_rows"] == 4.0 and entries[4]["valid_rows"] == 0.0
    measured = {"loss/total", "loss/teacher", "mask/visible_mass", "attention/agreement"}
    assert measured <= entries[2].keys() and measured <= entries[5].keys()
    assert not measured & entries[4].keys()
    assert entries[2]["loss/total"] > 0.7 * entries[5]["loss/total"]  # not halved


def test_the_mean_of_an_interval_is_over_the_steps_that_have_a_value(tmp_path: Path) -> None:
    telemetry = Telemetry(tmp_path, 0, 4, 4)
    for step, values in enumerate([{"a": 1.0}, {"a": 3.0, "b": 5.0}, {"a": 2.0}, {"a": 2.0}], 1):
        telemetry.record(step, values, 8, 0.0, 8 * step)
    telemetry.close()
    (entry,) = map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines())
    assert (entry["a"], entry["b"]) == (2.0, 5.0)


def test_a_step_without_a_valid_row_does_not_lower_the_bound_of_a_spike() -> None:
    skips = Skips(Guard(spike_factor=5.0))
    skips.record_skip()
    skips.record_applied(None)
    assert skips.in_succession == 0 and not skips.losses


def test_the_check_of_a_teacher_reads_nothing_on_the_host() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from cmtmae_scale.pretraining.prepare import find_unsound
    from cmtmae_scale.teachers.base import TeacherView

    with FakeTensorMode():
        view = TeacherView(torch.empty(3, 16), torch.empty(3, 17, 8))
        unsound = find_unsound(view, torch.empty(3, dtype=torch.bool))
        assert torch.where(unsound.any(), torch.inf, torch.zeros(())).dtype == torch.float32
    assert find_unsound(TeacherView(None, None), torch.ones(2).bool()).tolist() == [False] * 2
