"""Diagnostics of a run: what they measure, and that they change nothing."""

import math
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.engine.run_case import build, read_log, run, same, write_recipe
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo
ZERO = [
    pytest.mark.deepspeed,
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]
BACKENDS = [
    pytest.param(["backend.sharding=full"], id="fsdp"),
    pytest.param(["backend.name=deepspeed"], id="zero1", marks=[*ZERO, pytest.mark.slow]),
    pytest.param(
        ["backend.name=deepspeed", "backend.zero_stage=3"],
        id="zero3",
        marks=[*ZERO, pytest.mark.slow],
    ),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_diagnostics_change_no_bit_and_are_logged(tmp_path: Path, backend: list[str]) -> None:
    recipe = write_recipe(tmp_path)
    for name, every in (("without", "null"), ("with", "2")):
        own = [f"run.output_dir={tmp_path / name}", f"log.diagnostics_every={every}"]
        run_ranks(2, run, recipe, [*own, *backend])
    same(tmp_path / "without", tmp_path / "with")
    found = [
        entry for entry in read_log(tmp_path / "with") if "diagnostics/effective_rank" in entry
    ]
    assert [entry["step"] for entry in found] == [2, 4, 6]
    for entry in found:
        assert 1 <= entry["diagnostics/effective_rank"] <= 256
        cosine = entry["diagnostics/pairwise_cosine"]
        assert -1 <= cosine <= 1
        # unit tokens: their mean has the squared norm 1 / n + (1 - 1 / n) cosine
        n = 2 * 16  # views of a micro-batch, patches
        expected = 2 - 2 * math.sqrt(1 / n + (1 - 1 / n) * cosine)
        assert entry["diagnostics/constant_loss"] == pytest.approx(expected, abs=1e-4)
        shares = [entry[f"diagnostics/gradient/{term}"] for term in ("teacher", "student")]
        assert sum(shares) == pytest.approx(1) and min(shares) > 0
    assert not any(
        "diagnostics" in key for entry in read_log(tmp_path / "without") for key in entry
    )


def shares_two_ways(recipe: Path) -> tuple[dict[str, float], dict[str, float], dict[str, float]]:
    """Gradient shares of a micro-batch as the run measures them, and by ``autograd.grad``.

    The third are the diagnostics of the same micro-batch if no view of it can be decoded.
    """
    from cmtmae_scale.backends.initial import materialise
    from cmtmae_scale.method.initialisation import initialise
    from cmtmae_scale.method.targets import objective, term_weights
    from cmtmae_scale.pretraining.build import build_model

    with ExitStack() as stack:
        built = build(recipe, ["loss.pixel=0.5", "backend.sharding=replicate"], stack)
        task, config = built.task, built.task.config
        batch = next(built.stream)
        fixed = task.prepare_fixed(batch)
        micro_batch, _ = task.prepare(batch, fixed, task.scalars(built.progress))
        measured = task.diagnostics.measure_gradients(built, micro_batch)
        grey = micro_batch._replace(valid=torch.zeros_like(micro_batch.valid))
        diagnostics = task.diagnostics
        nothing = diagnostics.measure_tokens(built, grey)
        nothing |= diagnostics.measure_gradients(built, grey)
        model = materialise(build_model(config, task.models.teachers)[0], torch.device("cpu"))
        initialise(model, config.run.seed)
        losses = objective(
            model(*micro_batch.inputs),
            micro_batch.targets,
            micro_batch.valid,
            task.models.layout,
            config.loss,
            term_weights(config, micro_batch.alpha_target),
        )
        alpha = float(micro_batch.alpha_target)
        norms = {}
        for name, weight in (("teacher", alpha), ("student", 1 - alpha), ("pixel", 0.5)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(
                weight * losses[name], parameters, retain_graph=True, allow_unused=True
            )
            squares = [float(g.double().square().sum()) for g in gradients if g is not None]
            norms[f"diagnostics/gradient/{name}"] = math.sqrt(sum(squares))
    total = sum(norms.values())
    return measured, {name: norm / total for name, norm in norms.items()}, nothing


def test_gradient_shares_are_those_of_each_terms_own_gradient(tmp_path: Path) -> None:
    ((measured, expected, nothing),) = run_ranks(1, shares_two_ways, write_recipe(tmp_path))
    assert measured == pytest.approx(expected, rel=1e-4)
    assert nothing == {}


def run_collapsed(recipe: Path, overrides: list[str]) -> list[str]:
    """A run whose momentum encoder gives every patch nearly the same token; its last warnings."""
    from cmtmae_scale.engine.loop import train
    from cmtmae_scale.pretraining import diagnostics
    from tests.checkpoint.save_case import Lines

    log = Lines()

    def collapsed(tokens: torch.Tensor) -> tuple[float, float]:
        return 1.2, 0.99

    diagnostics.token_diagnostics = collapsed  # type: ignore[assignment]
    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        train(built)
        log.lines.clear()
        built.task.conclude(built)
    return log.lines


def test_collapsing_tokens_are_reported_once_with_a_remedy(tmp_path: Path) -> None:
    overrides = ["log.diagnostics_every=1"]
    (last,) = run_ranks(1, run_collapsed, write_recipe(tmp_path), overrides)
    (incident,) = [entry for entry in read_log(tmp_path / "run") if "incident" in entry]
    assert (incident["step"], incident["incident"]) == (3, "target tokens collapse")
    assert incident["why"].startswith("for 3 intervals, most recently effective rank 1.2, mean ")
    assert "loss/student is then no sign of learning" in incident["why"]
    assert "raise collaboration.alpha_target" in incident["why"]
    (line,) = last
    assert (
        "at step 6 the momentum encoder's target tokens are nearly alike: effective rank 1.2"
        in line
    )


def test_a_run_without_a_momentum_encoder_has_no_token_diagnostics(tmp_path: Path) -> None:
    mae = ["mask.sampler=random", "teacher.mode=none", "loss.teacher=0", "loss.student=0"]
    mae += ["loss.pixel=1", "log.diagnostics_every=1", "train.stop_after=1"]
    run_ranks(1, run, write_recipe(tmp_path), mae)
    assert not any(
        "diagnostics/g" in key or "effective" in key for key in read_log(tmp_path / "run")[0]
    )
