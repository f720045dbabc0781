"""The cache's benchmark reads what it built, and measures rounding as one would by hand."""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from cmtmae_scale.cache.codecs import calibrate
from cmtmae_scale.commands.benchmark import run_benchmark
from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.runtime.launch import World
from cmtmae_scale.teachers.build import build_teacher
from cmtmae_scale.tools.benchmark import cached, rounding
from cmtmae_scale.tools.benchmark.training import Protocol
from dataloading.index import build_index
from dataloading.stream import Stream
from tests.cache import cache_case as case

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write_cache_recipe(tmp_path_factory.mktemp("case"))


@pytest.mark.slow
def test_the_command_builds_reads_and_trains_and_leaves_nothing(
    recipe: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "store"))
    (tmp_path / "store").mkdir()
    output = tmp_path / "out" / "cache"
    line = ["cache", "--config", str(recipe), "--rows", "6", "--rounds", "2", "--windows", "2"]
    assert run_benchmark([*line, "--output", str(output), "cache.dir=unused"]) == 0
    found = json.loads(output.with_suffix(".json").read_text())["results"]
    ways = [
        *("read int8 from storage", "read int8 from memory", "decode int8"),
        *("read bf16 from storage", "read bf16 from memory", "decode bf16", "online teacher"),
    ]
    assert [one["name"] for one in found["speeds"]] == ways
    assert found["speeds"][-1]["of_online"] == {"median": 1, "low": 1, "high": 1}
    assert all(one["per_s"]["low"] > 0 and one["per_core_s"]["low"] > 0 for one in found["speeds"])
    assert 0 < found["speeds"][0]["row_bytes"] < found["speeds"][3]["row_bytes"]
    labels = ["synthetic teacher", "cache, int8", "cache, bf16", "online teacher"]
    assert [one["label"] for one in found["steps"]] == labels
    assert list(found["of_synthetic"]) == labels[1:]
    synthetic, *others = (one["windows_s"] for one in found["steps"])
    for name, own in zip(labels[1:], others, strict=True):
        ratios = sorted(a / b for a, b in zip(synthetic, own, strict=True))
        spread = found["of_synthetic"][name]
        assert [spread["low"], spread["high"]] == pytest.approx(ratios)
    assert not list((tmp_path / "store").iterdir()) and not Path("unused").exists()
    out = capsys.readouterr().out
    for text in ("of online, views/s", "relative to a synthetic teacher", "gradient of weights"):
        assert text in out


def test_what_cannot_be_measured_is_named(recipe: Path) -> None:
    two, alone = World(0, 2, 0, 2, "torchrun"), World(0, 1, 0, 1, "none")
    short = Protocol(0, 1, 1)
    with pytest.raises(ConfigError, match="by one process; start it without torchrun"):
        cached.compare_cache(str(recipe), [], 4, 1, short, two, CPU)
    with pytest.raises(ConfigError, match="--rows, --rounds, --windows and --steps must be at"):
        cached.compare_cache(str(recipe), [], 0, 1, short, alone, CPU)
    with pytest.raises(ConfigError, match=r"the loss does not use the teacher's features"):
        cached.compare_cache(str(recipe), ["loss.teacher=0"], 4, 1, short, alone, CPU)


@pytest.fixture(scope="module")
def found(recipe: Path) -> list[rounding.Rounding]:
    config = load_config(recipe, [])
    teacher = build_teacher(config, CPU, torch.float32)
    assert teacher is not None
    index = build_index(config.data.path)
    with Stream(index, seed=0, micro_batch=4, sizes=(64,), threads=1) as stream:
        views = [next(stream) for _ in range(6)]
    calibration = calibrate(teacher.forward_batch(one).features for one in views[:3])  # pyright: ignore
    return rounding.measure_codecs(config, views[3:], teacher, calibration, CPU)  # pyright: ignore


def test_rounding_moves_gradients_by_what_it_moves_directions(
    found: list[rounding.Rounding],
) -> None:
    int8, bf16, bare = found
    assert [one.codec for one in found] == ["int8", "bf16", "int8, channels not standardised"]
    # bf16 keeps 8 bits: 2^-9 of a value at most, evenly spread: 2^-9 / sqrt(3) = 0.0011 and up.
    assert 0.0005 < bf16.at_start < 0.004
    # 127 levels up to some 3.5 deviations: 3.5 / 127 / sqrt(12) = 0.008.
    assert bf16.at_start < int8.at_start < 0.02
    for one in (int8, bf16, bare):
        assert abs(one.loss) < 1e-3 and one.weights < 2 * one.at_start
        # Near its target a gradient is shorter: sin of the angle, 0.6, against 1.
        assert one.near == pytest.approx(one.at_start / 0.6, rel=0.2)


def test_a_gradient_error_is_the_relative_length_of_the_difference() -> None:
    exact = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]
    moved = [torch.tensor([3.0, 0.3]), torch.tensor([0.4, 4.0])]
    assert rounding.relative_error(moved, exact) == pytest.approx(0.5 / 5)
    assert rounding.relative_error(exact, exact) == 0


def test_predictions_near_their_targets_have_the_cosine_that_is_stated() -> None:
    targets = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(1))
    near = rounding.predictions_near(targets, 0)
    cosine = torch.cosine_similarity(near, targets, dim=-1)
    torch.testing.assert_close(cosine, torch.full((3, 5), 0.8))
    torch.testing.assert_close(near.norm(dim=-1), targets.norm(dim=-1))
