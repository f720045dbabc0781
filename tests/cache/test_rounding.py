"""Codecs on the data of ``make demo``: a real ViT-S/14 and real images."""

import shutil
from pathlib import Path

import pytest
import torch

from cmtmae_scale.cache.codecs import calibrate
from cmtmae_scale.commands import precompute
from cmtmae_scale.config.load import load_config
from cmtmae_scale.teachers.base import view_sizes
from cmtmae_scale.teachers.build import build_teacher
from cmtmae_scale.tools.benchmark import rounding
from dataloading.index import build_index
from dataloading.stream import Stream
from tests.pretraining.cached_run_case import observe_each
from tests.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "configs" / "demo.yaml"
DEMO = ROOT / "datasets" / "demo"
PLACES = [f"data.path={DEMO / 'photos'}", f"teacher.weights={DEMO / 'teacher.safetensors'}"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (DEMO / "teacher.safetensors").exists(), reason="make demo has not been run"
    ),
]


@pytest.mark.parametrize(("norm", "factor"), [("none", 1.0), ("instance", 2.0)])
def test_rounding_hardly_turns_the_gradient(norm: str, factor: float) -> None:
    """What patches have in common is exact, so a target without it has a larger relative error."""
    config = load_config(RECIPE, [*PLACES, f"target.teacher.norm={norm}"])
    teacher = build_teacher(config, "cpu", torch.float32)
    assert teacher is not None
    index = build_index(config.data.path)
    sizes = view_sizes(config.views.image_size, {"": teacher})
    with Stream(index, seed=0, micro_batch=16, sizes=sizes, threads=1) as stream:
        views = [next(stream) for _ in range(16)]
    calibration = calibrate(teacher.forward_batch(one).features for one in views[:8])  # pyright: ignore
    found = rounding.measure_codecs(
        config,
        views[8:],
        teacher,  # pyright: ignore
        calibration,
        torch.device("cpu"),
    )
    print(f"\n{norm}\n{rounding.rounding_table(found, 128)}")
    int8, bf16, bare = found
    for one, scale in ((int8, 4 * factor), (bf16, factor)):
        assert one.at_start < 0.0025 * scale and one.near < 0.004 * scale
        assert one.weights < 0.0006 * scale
    assert abs(int8.loss) < 1e-4 and abs(bf16.loss) < 1e-4
    assert bare.at_start > 1.5 * int8.at_start  # why channels are standardised


@pytest.mark.gloo
def test_fifty_steps_on_a_cache_have_the_losses_of_the_online_teacher(tmp_path: Path) -> None:
    for number, path in enumerate(sorted((DEMO / "photos").rglob("*.jpg"))[::6]):
        (tmp_path / "photos" / "all").mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "photos" / "all" / f"{number}.jpg")
    own = [*PLACES, f"data.path={tmp_path / 'photos'}", "views.views_per_image=2", "train.steps=50"]
    own += ["train.global_batch_size=8", "checkpoint.every=50", "log.every=1", "eval.every=null"]
    own += ["log.images_every=null"]
    caches = {codec: tmp_path / codec for codec in ("int8", "bf16")}
    for codec, folder in caches.items():
        line = ["--config", str(RECIPE), *own, f"cache.codec={codec}", f"cache.dir={folder}"]
        assert precompute.precompute_teacher(line) == 0
    ways = [(tmp_path / "run-online", [*own, "teacher.mode=online"], "")]
    for codec, folder in caches.items():
        read = ["teacher.mode=cached", f"cache.dir={folder}", "cache.on_miss=stop"]
        ways.append((tmp_path / f"run-{codec}", [*own, *read], "alone"))
    ((online, *others),) = run_ranks(1, observe_each, RECIPE, ways, timeout_s=900)
    for codec, seen in zip(caches, others, strict=True):
        assert (seen.error, len(seen.log), len(online.log)) == ("", 50, 50)
        worst = {
            name: max(
                abs(a[name] - b[name]) / abs(b[name])
                for a, b in zip(seen.log, online.log, strict=True)
            )
            for name in ("loss/total", "loss/teacher", "grad_norm")
        }
        same = "the same masks" if seen.masks == online.masks else "other masks"
        print(f"\n{codec}, {same}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
        assert worst["loss/total"] < 5e-4 and worst["grad_norm"] < 2e-3
