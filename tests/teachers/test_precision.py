"""What fp8 does to a real teacher, on the data of ``make demo``; its products are emulated."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from cmtmae_scale.cache.codecs import calibrate, measure_fidelity
from cmtmae_scale.config.load import load_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.method.initialisation import initialise
from cmtmae_scale.method.masking import choose_masks, token_counts
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.method.targets import TokenLayout
from cmtmae_scale.teachers.base import view_sizes
from cmtmae_scale.teachers.build import build_teacher
from cmtmae_scale.tools.benchmark import rounding
from cmtmae_scale.tools.benchmark.table import markdown_table
from dataloading.index import build_index
from dataloading.stream import Batch, Stream

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "datasets" / "demo"
PLACES = [f"data.path={DEMO / 'photos'}", f"teacher.weights={DEMO / 'teacher.safetensors'}"]
HEADER = ["linear layers", "standardised cosine: mean", "1st percentile", "minimum"]
HEADER += ["distance of maps", "masks that change", "visible patches that change"]
HEADER += ["loss", "gradient of predictions", "at a cosine of 0.8", "gradient of weights"]


class Precision(NamedTuple):
    """Outputs in some precision against those in float32."""

    cosine: tuple[float, float, float]
    """Of standardised features: mean, 1st percentile, minimum."""
    distance: float
    """Mean total variation distance of the attention maps."""
    masks: float
    """Fraction of the masks that differ in any patch."""
    patches: float
    """Fraction of the visible patches that differ."""
    gradient: rounding.Rounding

    def row(self, name: str) -> list[str]:
        wrong = self.gradient
        errors = (wrong.loss, wrong.at_start, wrong.near, wrong.weights)
        cells = [f"{value:.5f}" for value in (*self.cosine, self.distance)]
        cells += [f"{100 * value:.1f} %" for value in (self.masks, self.patches)]
        return [name, *cells, *(f"{value:.1e}" for value in errors)]


def draw_batches(config: Config, count: int) -> list[Batch]:
    teacher = build_teacher(config, "cpu", torch.float32)
    sizes = view_sizes(config.views.image_size, {"": teacher})
    index = build_index(config.data.path)
    with Stream(index, seed=0, micro_batch=16, sizes=sizes, threads=1) as stream:
        return [next(stream) for _ in range(count)]


def measure_precisions(config: Config, batches: Sequence[Batch]) -> dict[str, Precision]:
    """Compare bf16 and fp8 with float32; the first half of the views standardises the features."""
    ways: dict[str, Any] = {"float32": build_teacher(config, "cpu", torch.float32)}
    ways["bf16"] = build_teacher(config, "cpu", torch.bfloat16)
    rounded = copy.deepcopy(config)
    rounded.teacher.precision = "fp8"
    ways["fp8"] = build_teacher(rounded, "cpu", torch.bfloat16)
    exact = ways.pop("float32")
    half = len(batches) // 2
    calibration = calibrate(exact.forward_batch(one).features for one in batches[:half])
    model = CollaborativeMAE(config, {"teacher": exact.width})
    initialise(model, config.run.seed)
    length = model.encoder.grid[0] * model.encoder.grid[1]
    counts = token_counts(length, config.mask.ratio, config.mask.throw_ratio)
    layout = TokenLayout.from_config(config, *counts)
    gradients: dict[str, list[Any]] = {name: [] for name in ("float32", *ways)}
    outputs: dict[str, list[Any]] = {name: [] for name in gradients}
    for batch in batches[half:]:
        case = rounding.make_case(config, batch, exact, length)
        views = {"float32": exact.forward_batch(batch)}
        views |= {name: one.forward_batch(batch) for name, one in ways.items()}
        for name, view in views.items():
            features = view.features.float()
            gradients[name].append(
                rounding.teacher_gradients(config, model, layout, case, features)
            )
            visible = choose_masks(config.mask, view.attention, batch.position, 0, 0.0).ids_keep
            outputs[name].append((features, view.attention, visible))
    wanted = [torch.cat(parts) for parts in zip(*outputs["float32"], strict=True)]
    found: dict[str, Precision] = {}
    for name in ways:
        features, attention, visible = map(torch.cat, zip(*outputs[name], strict=True))
        lost = (~is_among(wanted[2], visible)).float().mean(dim=1)
        found[name] = Precision(
            measure_fidelity(wanted[0], features, calibration).standardised,
            float((attention - wanted[1]).abs().sum(-1).mean()) / 2,
            float((lost > 0).float().mean()),
            float(lost.mean()),
            rounding.relative_errors(name, gradients[name], gradients["float32"]),
        )
    return found


def is_among(ids: Tensor, others: Tensor) -> Tensor:
    """Whether each of ``ids`` ``[R, K]`` is one of its row of ``others`` ``[R, K]``."""
    return (ids[:, :, None] == others[:, None, :]).any(dim=-1)


@pytest.mark.slow
@pytest.mark.skipif(not DEMO.exists(), reason="make demo has not been run")
def test_fp8_keeps_a_real_teachers_outputs() -> None:
    config = load_config(ROOT / "configs" / "demo.yaml", PLACES)
    found = measure_precisions(config, draw_batches(config, 16))
    print("\n" + markdown_table(HEADER, [one.row(name) for name, one in found.items()]))
    bf16, fp8 = found["bf16"], found["fp8"]
    assert fp8.cosine[1] > 0.98
    assert bf16.cosine[1] > fp8.cosine[1]
    assert fp8.patches < 0.1
