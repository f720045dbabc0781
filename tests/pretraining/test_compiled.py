"""With ``backend.compile`` a step runs as graphs of static shapes, all compiled in the first."""

import shutil
from typing import Any

import numpy as np
import pytest
import torch

from cmtmae_scale.config.schema import NamedTeacher, StudentTarget, TeacherTarget
from cmtmae_scale.runtime.collectives import process_group
from tests.pretraining import compiled_case as case
from tests.processes import run_ranks

# Dynamo hides this warning from users, but pytest raises it before.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def several_teachers() -> list[NamedTeacher]:
    vit = {"library": "timm", "model": "test_vit", "weights": "random", "feature": "block"}
    return [
        NamedTeacher(**vit, name="first", depth=1),
        NamedTeacher(**vit, name="second", depth=2, image_size=96, norm="channel", loss=0.5),
        NamedTeacher(**vit, name="map", depth=2, loss=0, attention_source="mean_query"),
    ]


DECODERS: dict[str, dict[str, Any]] = {
    "prompt": {},
    "full": {"decoder__type": "full"},
    "full, masked patches alone": {"decoder__type": "full", "loss__tokens": "masked"},
    "cross": {"decoder__type": "cross", "decoder__predict_ratio": 0.3},
    "none": {"decoder__type": "none", "loss__tokens": "visible"},
}
OTHERS: dict[str, dict[str, Any]] = {
    "hints": {"mask__hint_fraction": 0.1, "mask__hint_pool": 0.5, "mask__prob": 0.5},
    "a sampled mask": {"mask__sampler": "hide_salient_sample"},
    "ranks of attention": {"attention__norm": "rank", "attention__clip_quantile": 0.9},
    "statistics per channel": {
        "target__teacher": TeacherTarget(norm="channel"),
        "target__student": StudentTarget(norm="instance"),
    },
    "pixels": {"loss__pixel": 1.0},
    "random masks alone": {"mask__sampler": "random", "loss__teacher": 0.0, "loss__student": 0.0}
    | {"loss__pixel": 1.0, "teacher__mode": "none", "decoder__type": "full"},
    "the student alone": {"teacher__mode": "none", "loss__teacher": 0.0}
    | {"collaboration__alpha_attention": 0.0, "collaboration__alpha_target": 0.0},
    "rotary positions": {"student__arch": "vit_small_patch16_dinov3"},
    "several layers": {"attention__layers": [-1, -2], "teacher__depth": 2},
    "several teachers": {"teachers": several_teachers(), "loss__include_cls": False},
    "recomputed activations": {"backend__activation_checkpointing": True},
    "fp8": {
        "backend__precision": "bf16",
        "teacher__precision": "fp8",
        "momentum__precision": "fp8",
    },
}


def alone(task: str, changes: dict[str, Any]) -> case.Seen:
    with process_group(case.World(0, 1, 0, 1, "none"), case.CPU):
        return case.watch(task, changes)


def check(seen: case.Seen) -> None:
    assert seen.breaks == {}
    assert seen.inputs == []
    assert seen.counts[0] > 0
    assert seen.counts == seen.counts[:1] * case.STEPS


def test_a_step_is_compiled_once_without_graph_breaks() -> None:
    check(alone("pretrain", {}))


@pytest.mark.slow
@pytest.mark.parametrize("masks_per_view", [1, 2, 4])
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_is_compiled_once(decoder: str, masks_per_view: int) -> None:
    changes = DECODERS[decoder] | {"mask__masks_per_view": masks_per_view}
    compiled = alone("pretrain", changes)
    check(compiled)
    eager = alone("pretrain", changes | {"backend__compile": False})
    assert eager.counts == [0] * case.STEPS
    np.testing.assert_array_equal(compiled.results, eager.results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_run_is_compiled_once(kind: str) -> None:
    check(alone("pretrain", OTHERS[kind]))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_fine_tuning_is_compiled_once(recompute: bool) -> None:
    check(alone("finetune", {"backend__activation_checkpointing": recompute}))


@pytest.mark.slow
@pytest.mark.gloo
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("backend__sharding", "replicate"),
        ("backend__sharding", "full"),
        pytest.param("backend__name", "deepspeed", marks=pytest.mark.deepspeed),
    ],
)
def test_every_backend_is_compiled_once(key: str, value: str) -> None:
    for seen in run_ranks(2, case.watch, "pretrain", {key: value}, timeout_s=300):
        check(seen)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs g++")
def test_the_real_compiler_computes_the_same() -> None:
    with process_group(case.World(0, 1, 0, 1, "none"), case.CPU):
        torch.compiler.reset()
        compiled = list(case.pretrain(case.make_config()))
        torch.compiler.reset()
        eager = list(case.pretrain(case.make_config(backend__compile=False)))
    # Sums in another order, over ten updates; a mask that differs would shift the losses more.
    np.testing.assert_allclose(compiled, eager, rtol=1e-4, atol=1e-6)
