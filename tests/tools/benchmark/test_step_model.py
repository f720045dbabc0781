"""The model of the step counts what the step does."""

from pathlib import Path

import pytest
import torch

from cmtmae_scale.commands.benchmark import run_benchmark
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import EXIT_CONFIG
from cmtmae_scale.tools.benchmark.step_model import (
    CASTS,
    DECODER,
    LOSS,
    MOMENTUM,
    PARTS,
    STUDENT,
    TEACHER,
    Operation,
    Rates,
    Recorder,
    find_last_uses,
    fuse,
    model_table,
    record_step,
    sum_step,
    sum_work,
)
from cmtmae_scale.tools.estimate import build_meta_networks, count_flops
from tests.engine.run_case import write_recipe

RATES = Rates(flops_s=100.0, bytes_s=10.0, launch_s=0.5, stall_s=2.0)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


def test_an_operation_reads_its_inputs_and_writes_its_outputs_and_views_are_free() -> None:
    a, b = torch.zeros(4, 8), torch.zeros(8, 3)
    with Recorder() as recorder:
        recorder.enter("one")
        product = a.t().t() @ b
        recorder.enter("two")
        product.view(-1).add_(1.0)
        torch._foreach_mul_([a, b], 2.0)  # pyright: ignore[reportPrivateImportUsage]
    product_, add, multiply = recorder.operations
    assert (product_.name, product_.part, product_.flops) == ("mm", "one", 2 * 4 * 8 * 3)
    assert sorted(product_.reads.values()) == [96, 128] and list(product_.writes.values()) == [48]
    assert (add.part, list(add.reads.values()), list(add.writes.values())) == ("two", [48], [48])
    assert multiply.reads == multiply.writes and sorted(multiply.reads.values()) == [96, 128]


def test_a_fused_kernel_moves_only_what_leaves_or_enters_it() -> None:
    operations = [
        Operation("mm", "a", 500, {0: 10, 1: 10}, {2: 20}),
        Operation("add", "a", 0, {2: 20}, {3: 20}),
        Operation("gelu", "a", 0, {3: 20}, {4: 20}),
        Operation("sort", "a", 0, {4: 20}, {5: 20}),
        Operation("mul", "a", 0, {5: 20, 2: 20}, {6: 20}),
    ]
    kernels = fuse(list(enumerate(operations)), find_last_uses(operations))
    assert [one.name for one in kernels] == ["mm", "fused", "sort", "fused"]
    assert kernels[1].reads == {2: 20} and kernels[1].writes == {4: 20}
    assert kernels[3].reads == {5: 20, 2: 20} and kernels[3].writes == {6: 20}  # a result
    eager = sum_work("a", False, operations, RATES)
    assert (eager.flops, eager.bytes, eager.launches) == (500, 40 + 40 + 40 + 40 + 60, 5)
    assert eager.device_s == 5 + 4 + 4 + 4 + 6 and eager.host_s == 2.5
    assert sum_work("a", True, kernels, RATES).bytes == 40 + 40 + 40 + 60


def test_flops_are_those_of_the_dry_run_and_compilation_saves_traffic(recipe: Path) -> None:
    config = load_config(recipe, ["train.micro_batch_size=2"])
    operations = record_step(config)
    eager = sum_step(config, operations, RATES, ())
    found = {one.part: one for one in eager.parts}
    assert set(found) == {*PARTS} - {CASTS}  # nothing to cast in float32
    flops = count_flops(config, build_meta_networks(config))
    assert found[TEACHER].flops == pytest.approx(2 * flops.teacher, rel=0.02)
    assert found[MOMENTUM].flops == pytest.approx(2 * flops.momentum, rel=0.02)
    student = found[STUDENT].flops + found[DECODER].flops + found[LOSS].flops
    assert student == pytest.approx(2 * flops.student, rel=0.05)
    config.backend.compile = True
    compiled = sum_step(config, operations, RATES, (LOSS,))
    for one in compiled.parts:
        before = found[one.part]
        assert one.flops == before.flops and one.bytes <= before.bytes
        if one.part in (TEACHER, STUDENT):
            assert one.compiled and one.launches < before.launches and one.bytes < before.bytes
        if one.part == LOSS:
            assert one == before and not one.compiled
    device_s, host_s = (
        sum(getattr(one, name) for one in compiled.parts) for name in ("device_s", "host_s")
    )
    assert compiled.step_s == max(device_s, host_s) + RATES.stall_s
    text = model_table(compiled)
    assert "modelled: " in text and "A lower bound. Assumed: matrix products at 1e-10 TFLOP" in text
    assert "| loss | eager |" in text and "| student | compiled |" in text


def test_an_unknown_part_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark(["model", "--config", str(recipe), "--eager", "teachr"]) == EXIT_CONFIG
    assert "--eager teachr: the parts are teacher, momentum encoder" in capsys.readouterr().err
