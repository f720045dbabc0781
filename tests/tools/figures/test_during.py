"""Figures during a run: weights of every backend, and not a bit of the training changed."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from cmtmae_scale.config.load import load_config
from cmtmae_scale.errors import ConfigError
from tests.engine.run_case import STEPS, build, run, same, tensors, write_recipe
from tests.processes import run_ranks

MAE = [
    *("teacher.mode=none", "mask.sampler=random", "loss.teacher=0", "loss.student=0"),
    *("loss.pixel=1", "decoder.type=full", "loss.tokens=masked"),
]
ASKED = "log.images_every=4"


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("figures"))


def figures(run_dir: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run_dir / "figures").iterdir())}


def run_and_collect(recipe: Path, overrides: list[str]) -> dict[str, NDArray[np.float32]] | None:
    """As ``run``; returns the weights of the last sheet on rank 0."""
    from cmtmae_scale.engine.loop import train
    from cmtmae_scale.tools.figures.during import PREFIXES, open_figures

    with ExitStack() as stack:
        built = build(recipe, overrides, stack)
        (side_task,) = open_figures(built)
        built.task.side_tasks.append(side_task)
        assert train(built) is None
        networks = side_task.run.__self__.networks
        if networks is None:
            return None
        return {
            prefix + name: value.numpy().copy()
            for prefix in PREFIXES
            if prefix == "model." or networks.momentum is not None
            for name, value in networks.trained(prefix).state_dict().items()
        }


@pytest.mark.gloo
@pytest.mark.parametrize(
    ("ranks", "more"),
    [
        (1, []),
        pytest.param(2, ["backend.sharding=full"], marks=pytest.mark.slow),
        pytest.param(2, ["backend.sharding=replicate", *MAE], marks=pytest.mark.slow),
        pytest.param(
            *(2, ["backend.name=deepspeed", "backend.zero_stage=1"]),
            marks=[pytest.mark.deepspeed, pytest.mark.slow],
        ),
        pytest.param(
            *(2, ["backend.name=deepspeed", "backend.zero_stage=3", *MAE]),
            marks=[pytest.mark.deepspeed, pytest.mark.slow],
        ),
    ],
)
def test_training_is_the_same_bit_for_bit_and_the_weights_are_the_checkpoints(
    recipe: Path, tmp_path: Path, ranks: int, more: list[str]
) -> None:
    if any("zero" in one for one in more):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    quiet, asked = tmp_path / "quiet", tmp_path / "asked"
    assert run_ranks(ranks, run, recipe, [f"run.output_dir={quiet}", *more]) == [None] * ranks
    drawn, *others = run_ranks(
        ranks, run_and_collect, recipe, [f"run.output_dir={asked}", ASKED, *more]
    )
    assert others == [None] * (ranks - 1)
    same(quiet, asked)
    assert not (quiet / "figures").exists()
    assert list(figures(asked)) == ["step-00000004.png", f"step-{STEPS:08d}.png"]
    saved = tensors(asked, STEPS)
    assert {key for key in saved if key.startswith(("model.", "momentum."))} == set(drawn)
    assert all(np.array_equal(drawn[key], saved[key].numpy()) for key in drawn)


@pytest.mark.slow
@pytest.mark.gloo
def test_a_resumed_run_draws_as_an_undisturbed_one_and_drops_what_lies_ahead(
    recipe: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(1, run, recipe, [f"run.output_dir={whole}", "log.images_every=2"])
    stopped = [f"run.output_dir={parts}", "log.images_every=2", "train.stop_after=2"]
    run_ranks(1, run, recipe, stopped)
    ahead = parts / "figures" / "step-00000005.png"
    ahead.write_bytes(b"of a start that was not saved")
    run_ranks(1, run, recipe, [f"run.output_dir={parts}", "log.images_every=2"])
    assert figures(parts) == figures(whole)
    assert not ahead.exists()
    board = EventAccumulator(str(whole / "tensorboard"))
    board.Reload()
    assert [image.step for image in board.Images("figures")] == [2, 4, 6]


@pytest.mark.gloo
def test_figures_change_with_the_weights_but_not_their_images(recipe: Path, tmp_path: Path) -> None:
    from cmtmae_scale.tools.figures.sheet import HEAD, MARGIN, SIDE, TITLE

    run_ranks(1, run, recipe, [f"run.output_dir={tmp_path}", "log.images_every=3"])
    sheets = [np.asarray(Image.open(tmp_path / "figures" / name)) for name in figures(tmp_path)]
    assert len(sheets) == 2
    below = MARGIN + TITLE + HEAD
    views = [sheet[below:-MARGIN, MARGIN : MARGIN + SIDE] for sheet in sheets]
    drawn = views[0][: len(views[0]) - 30]
    assert drawn.std() > 20
    assert all((view[: len(drawn)] == drawn).all() for view in views)
    assert (sheets[0] != sheets[-1]).any(axis=-1).sum() > 10_000


def run_without_images(recipe: Path, overrides: list[str], photographs: Path) -> list[str]:
    """A run whose images are gone when they are to be drawn; its warnings."""
    from cmtmae_scale.tools.figures import during
    from tests.checkpoint.save_case import Lines

    log, read = Lines(), during.read_crops

    def gone(*arguments: Any) -> Any:
        for path in photographs.glob("*/*.jpg"):
            path.rename(path.with_suffix(".away"))
        try:
            return read(*arguments)
        finally:
            for path in photographs.glob("*/*.away"):
                path.rename(path.with_suffix(".jpg"))

    during.read_crops = gone
    assert run(recipe, overrides) is None
    return log.lines


@pytest.mark.gloo
def test_images_that_cannot_be_read_skip_the_figures(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    overrides = [f"run.output_dir={tmp_path / 'run'}", "log.images_every=6", "data.workers=1"]
    (lines,) = run_ranks(1, run_without_images, recipe, overrides, tmp_path / "photos")
    (line,) = [line for line in lines if ": no figures: " in line]
    assert line.startswith(f"step {STEPS}: no figures: ") and ".jpg" in line
    assert not (tmp_path / "run" / "figures").exists()


def full_disk(recipe: Path, overrides: list[str]) -> list[str]:
    """A run that cannot write its figures; its warnings."""
    from cmtmae_scale.engine import telemetry
    from tests.checkpoint.save_case import Lines

    def fail(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    log = Lines()
    telemetry.Image = type("Full", (), {"fromarray": staticmethod(fail)})
    assert run(recipe, overrides) is None
    return log.lines


@pytest.mark.gloo
def test_a_full_disk_skips_the_figures(recipe: Path, tmp_path: Path) -> None:
    (lines,) = run_ranks(1, full_disk, recipe, [f"run.output_dir={tmp_path}", "log.images_every=6"])
    (line,) = [line for line in lines if ": no figures: " in line]
    assert "No space left on device" in line


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["log.images_every=0"], "log.images_every=0 must be above 0"),
        (
            [
                ASKED,
                "teacher.mode=cached",
                "cache.dir=c",
                "cache.on_miss=stop",
                "views.views_per_image=1",
            ],
            "log.images_every=4 runs the teacher on images that no cache holds, and the run builds "
            "no teacher; set cache.on_miss=online, or log.images_every=null",
        ),
    ],
)
def test_figures_that_cannot_be_drawn_are_refused(
    recipe: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(recipe, overrides)
