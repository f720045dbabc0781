"""The benchmark measures what it reports: parts, ratios, the same work in another library."""

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from cmtmae_scale.commands.benchmark import measure_training, parse_options, run_benchmark
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_CONFIG, ConfigError
from cmtmae_scale.runtime import collectives
from cmtmae_scale.runtime.collectives import process_group
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.tools.benchmark import against, decoding, table, training
from cmtmae_scale.tools.benchmark.clock import Spread, Stopwatch
from cmtmae_scale.tools.benchmark.training import Protocol, make_variants, measure_variants
from tests.engine.run_case import make_photographs, write_recipe
from tests.evaluation.evaluation_case import world
from tests.pretraining.several_case import TEACHERS, write_several
from tests.processes import run_ranks

CPU = torch.device("cpu")
ALONE = World(0, 1, 0, 1, "none")
PARTS = ("teacher", "momentum encoder", "student", "decoder and loss", "optimizer", "EMA update")
MAE = ["decoder.type=full", "mask.sampler=random", "loss.tokens=masked", "loss.include_cls=false"]
MAE += ["loss.teacher=0", "loss.student=0", "loss.pixel=1", "teacher.mode=none"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


def test_a_step_is_measured_by_part_and_parts_add_up(recipe: Path) -> None:
    cached = ["teacher.mode=cached", "views.views_per_image=2", "cache.dir=not-read"]
    variants = make_variants(str(recipe), cached, ["mask.masks_per_view=2"], 2, 1)
    assert [one.label for one in variants] == ["as given", "mask.masks_per_view=2"]
    assert {one.config.train.global_batch_size for one in variants} == {
        4
    }  # 2 micro x 2 accumulation
    with process_group(ALONE, CPU):
        results = measure_variants(variants, Protocol(1, 2, 1), False, ALONE, CPU)
    for one in results:
        assert one.fault is None and one.step_s is not None
        assert set(one.parts_s) == {*PARTS, "masks, targets, rest"}
        assert all(value >= 0 for value in one.parts_s.values())
        assert sum(one.parts_s.values()) == pytest.approx(one.step_s.median, rel=0.5)
        assert one.images_s == pytest.approx(4 / one.step_s.median)
        assert all(share > 0 for share in one.mfu.values())
        (name,) = one.mfu
        assert name == "float32 matrix product here"
        assert one.student_mfu[name] < one.mfu[name]
        assert one.calls > 0 and one.peak_gib is None and one.estimate_gib > 0
    assert results[1].masked_samples_s == 2 * results[1].images_s
    text = table.training_tables(results, False)
    assert all(part in text for part in (*PARTS, "student MFU", "images/CPU-s"))
    assert "bf16: " in table.provenance(CPU, 1)["device"]


def test_cublas_has_its_workspace_before_the_first_product(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the products that measure the peak would otherwise refuse the steps that follow."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "restored afterwards")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    variants = make_variants(str(recipe), [], ["run.deterministic=true"], 1, 1)

    def first_product(device: torch.device, dtype: torch.dtype) -> None:
        raise InterruptedError(os.environ["CUBLAS_WORKSPACE_CONFIG"])

    monkeypatch.setattr(training, "peak_flops", first_product)
    with pytest.raises(InterruptedError, match=r"^:4096:8$"):
        measure_variants(variants, Protocol(0, 1, 1), False, ALONE, CPU)


def failure_of(recipe: Path, output: Path) -> str:
    """The failure on this rank of a benchmark that has measured nothing yet, but saves it."""

    def measure(*given: Any) -> list[Any]:
        given[-1]([])
        return []

    options = parse_options(["train", "--config", str(recipe), "--output", str(output)])
    with (
        mock.patch.object(training, "measure_variants", measure),
        mock.patch.object(collectives, "process_group", lambda *_: nullcontext()),
    ):
        try:
            measure_training(options, world())
        except Exception as error:
            return str(error)
    return "none"


@pytest.mark.gloo
def test_tables_that_cannot_be_saved_fail_on_every_rank(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "tables.json").mkdir()
    found = run_ranks(2, failure_of, recipe, tmp_path / "tables")
    assert all("Is a directory" in failure for failure in found), found


@pytest.mark.slow
def test_real_images_can_be_measured(recipe: Path) -> None:
    variants = make_variants(str(recipe), [], [], 1, 1)
    with process_group(ALONE, CPU):
        (result,) = measure_variants(variants, Protocol(0, 1, 1), True, ALONE, CPU)
    assert result.step_s is not None and result.data_wait_fraction >= 0


def test_our_mae_and_transformers_do_the_same_work(recipe: Path) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    config = load_config(recipe, MAE)
    outcome = against.compare_with_transformers(config, Protocol(0, 2, 1), CPU)
    assert outcome.our_loss == pytest.approx(outcome.their_loss, rel=1e-5)
    assert outcome.ratio.low <= outcome.ratio.median <= outcome.ratio.high
    assert "ours / transformers" in against.render_mae_comparison(outcome, False)


def test_another_method_is_not_compared_with_mae(recipe: Path) -> None:
    with pytest.raises(ConfigError, match=r"decoder\.type=prompt, but MAE has full"):
        against.compare_with_transformers(load_config(recipe), Protocol(0, 1, 1), CPU)


def test_decoders_alternate_over_the_same_views(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs = make_photographs(tmp_path / "photos")
    monkeypatch.setattr(decoding, "BUSY_S", 0.01)
    results = decoding.compare_decoders(str(photographs), 32, 32, 2, 1, CPU, ["thread"])
    assert [one.name for one in results][:3] == ["PIL", "torchvision", "ours, torch"]
    assert results[0].of_pil == Spread(1.0, 1.0, 1.0)
    assert all(one.per_core_s.low > 0 and one.per_s.low > 0 for one in results)
    assert [one.held_up_ms is None for one in results][:3] == [True, True, False]
    assert "of PIL's" in decoding.decoders_table(results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "mask.ratio"], "expected key=value,value"),
        (["--sweep", "sdpa=fast"], "fast is not one of auto, math, flash"),
        (["mask.samplr=random"], "did you mean sampler?"),
    ],
)
def test_wrong_requests_exit_with_code_78(
    recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run_benchmark(["train", "--config", str(recipe), *arguments]) == EXIT_CONFIG
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "more", [["--sweep", "mask.ratio=0.5"], ["--data", "real"], ["--accumulation", "2"]]
)
def test_options_that_a_comparison_would_pass_over_are_refused(more: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_options(["train", "--config", "a.yaml", "--against", "hf_mae", *more])
    assert stop.value.code == EXIT_CONFIG


def test_arguments_have_the_defaults_of_the_protocol() -> None:
    options = parse_options(["train", "--config", "a.yaml"])
    assert (options.windows, options.steps, options.warm_up) == (5, None, None)


def test_a_stopwatch_sums_parts_and_forgets_them() -> None:
    watch = Stopwatch(CPU)
    watch.timed("one", lambda: sum(range(100_000)))
    watch.timed("one", lambda: sum(range(100_000)))
    assert watch.collect()["one"] > 0
    assert watch.collect() == {}
    assert Spread.of([3.0, 1.0, 2.0]) == Spread(2.0, 1.0, 3.0)


def test_the_weights_of_teachers_are_not_needed(tmp_path: Path) -> None:
    recipe = write_several(tmp_path, [one | {"weights": "tag"} for one in TEACHERS])
    own = ["teachers.second.weights=mine"]
    (given,) = make_variants(str(recipe), own, [], 1, 1)
    assert [one.weights for one in given.config.teachers] == ["random", "mine"]
