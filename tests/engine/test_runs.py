"""The whole loop: exact resumption, stopping, and the files that a run writes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cmtmae_scale.checkpoint import layout
from tests.backends.backend_case import trained
from tests.engine.fault_case import leave
from tests.engine.run_case import STEPS, read_log, run, run_twice, same, tensors, write_recipe
from tests.processes import run_ranks, started

pytestmark = pytest.mark.gloo
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("case"))


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> dict[int, Path]:
    """The run from start to end, at one and at two processes."""
    folders = {size: recipe.parent / f"whole{size}" for size in (1, 2)}
    for size, folder in folders.items():
        assert run_ranks(size, run, recipe, [f"run.output_dir={folder}"]) == [None] * size
    return folders


@pytest.mark.parametrize("size", [1, 2])
def test_stopping_and_going_on_is_bit_identical(
    recipe: Path, undisturbed: dict[int, Path], tmp_path: Path, size: int
) -> None:
    where = f"run.output_dir={tmp_path / 'run'}"
    first = [where, "train.stop_after=3", "log.profile_steps=[2, 3]"]
    reasons = run_ranks(size, run_twice, recipe, first, [where])
    assert reasons == [("train.stop_after=3", None)] * size
    same(tmp_path / "run", undisturbed[size])
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "steps-00000002-00000003.json.gz"
    entries = [
        entry for entry in read_log(tmp_path / "run") if "profile/time_fraction" not in entry
    ]
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))


def test_an_interval_of_the_log_is_whole_after_a_stop_within_it(
    recipe: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    where = [f"run.output_dir={tmp_path / 'run'}", "log.every=4"]
    run_ranks(1, run_twice, recipe, [*where, "train.stop_after=3"], where)
    losses = {entry["step"]: entry["loss/total"] for entry in read_log(undisturbed[1])}
    found = {
        one["step"]: one["loss/total"] for one in read_log(tmp_path / "run") if "loss/total" in one
    }
    assert found == {
        last: pytest.approx(sum(losses[step] for step in steps) / len(steps), rel=1e-6)
        for last, steps in ((4, (1, 2, 3, 4)), (6, (5, 6)))
    }


def test_other_world_sizes_continue_the_same_run(
    recipe: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    where = f"run.output_dir={tmp_path / 'run'}"
    run_ranks(2, run, recipe, [where, "train.stop_after=4", "backend.sharding=full"])
    run_ranks(1, run, recipe, [where, "train.micro_batch_size=4"])
    one, two = tensors(tmp_path / "run", STEPS), tensors(undisturbed[1], STEPS)
    for key, value in one.items():
        ours, theirs = (trained(key, one.numpy()) for one in (value, two[key]))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5, err_msg=key)


def test_the_log_holds_every_term(undisturbed: dict[int, Path]) -> None:
    entries = read_log(undisturbed[1])
    assert [entry["step"] for entry in entries] == list(range(1, STEPS + 1))
    for entry in entries:
        assert 0 < entry["loss/teacher"] < 4
        assert entry["loss/total"] == pytest.approx(
            0.7 * entry["loss/teacher"] + 0.3 * entry["loss/student"], rel=1e-5
        )
        assert 0 < entry["mask/visible_mass"] < 1
        assert -1 <= entry["attention/agreement"] <= 1
        assert entry["valid_rows"] == 8
    assert entries[0]["lr"] == 0.0
    assert entries[0]["momentum"] == 0.9
    assert {"grad_norm", "images_s", "data_wait_fraction", "memory_gib"} <= entries[0].keys()
    assert list((undisturbed[1] / "tensorboard").glob("events*"))


def test_what_a_run_does_not_have_is_not_logged(recipe: Path, tmp_path: Path) -> None:
    (reason,) = run_ranks(
        1, run, recipe, [f"run.output_dir={tmp_path}", "mask.sampler=random", "train.stop_after=1"]
    )
    assert reason == "train.stop_after=1"
    (entry,) = read_log(tmp_path)
    assert "loss/teacher" in entry
    absent = {"loss/pixel", "mask/visible_mass", "attention/agreement", "cache/hit"}
    assert not absent & entry.keys()


def test_losses_do_not_depend_on_the_number_of_processes(undisturbed: dict[int, Path]) -> None:
    for one, two in zip(read_log(undisturbed[1]), read_log(undisturbed[2]), strict=True):
        assert one["loss/total"] == pytest.approx(two["loss/total"], rel=1e-5)


def test_the_exported_encoder_is_timms(undisturbed: dict[int, Path]) -> None:
    import timm
    from safetensors.torch import load_file

    folder = layout.folder_of(undisturbed[1] / "checkpoints", STEPS)
    model = timm.create_model("test_vit", img_size=64, num_classes=0)
    model.load_state_dict(load_file(folder / layout.ENCODER), strict=True)


def test_changed_keys_are_refused_unless_allowed(recipe: Path, tmp_path: Path) -> None:
    where = f"run.output_dir={tmp_path / 'run'}"
    run_ranks(1, run, recipe, [where, "train.stop_after=2"])
    with pytest.raises(AssertionError, match=r"mask.ratio: the checkpoint has 0.75"):
        run_ranks(1, run, recipe, [where, "mask.ratio=0.5"])
    with pytest.raises(AssertionError, match=r"run.seed: .* it never changes"):
        run_ranks(1, run, recipe, [where, "run.seed=1", "run.allow_change=[run.seed]"])
    allowed = ["train.steps=4", "run.allow_change=[train.steps]"]
    assert run_ranks(1, run, recipe, [where, *allowed]) == [None]
    assert layout.list_checkpoints(tmp_path / "run" / "checkpoints")[0].name == "step-00000004"


def test_a_batch_that_the_ranks_cannot_share_is_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="7 cannot be shared by 2 ranks"):
        run_ranks(
            2, run, recipe, [f"run.output_dir={tmp_path / 'run'}", "train.global_batch_size=7"]
        )


@pytest.mark.slow
def test_a_micro_batch_that_does_not_divide_trains_the_same_run(
    recipe: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    where = f"run.output_dir={tmp_path / 'run'}"
    run_ranks(1, run, recipe, [where, "train.micro_batch_size=3"])
    same(tmp_path / "run", undisturbed[1])  # 2 is the largest divisor of 8 up to 3


def test_bad_images_are_counted_and_too_many_stop_the_run(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    pictures = sorted((tmp_path / "photos").rglob("*.jpg"))
    for path in pictures[:10]:
        path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(
        AssertionError, match=r"could not be decoded, more than data.max_bad_fraction"
    ):
        run_ranks(1, run, recipe, [])
    lines = (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()
    assert {"sample_id", "name", "reason"} <= json.loads(lines[0]).keys()
    relaxed = ["data.max_bad_fraction=0.9", f"run.output_dir={tmp_path / 'relaxed'}"]
    assert run_ranks(1, run, recipe, relaxed) == [None]
    assert min(entry["valid_rows"] for entry in read_log(tmp_path / "relaxed")) < 8


def wait_for(path: Path, child: Any) -> None:
    limit = time.monotonic() + 120
    while not path.exists():
        assert child.exitcode is None and time.monotonic() < limit
        time.sleep(0.01)


def test_killed_after_a_checkpoint_and_started_again_is_bit_identical(
    recipe: Path, undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    line = [f"run.output_dir={run_dir}", "checkpoint.every=1"]
    with started(1, leave, recipe, line) as ((child,), _):
        wait_for(run_dir / "checkpoints" / layout.LATEST, child)
        child.kill()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    assert run_ranks(1, run, recipe, [f"run.output_dir={run_dir}"]) == [None]
    same(run_dir, undisturbed[1])


def test_sigterm_saves_and_leaves_with_75(recipe: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    line = [f"run.output_dir={run_dir}", "train.steps=100000"]
    with started(1, leave, recipe, line) as ((child,), _):
        wait_for(run_dir / "log.jsonl", child)
        child.terminate()
        child.join(60)
        assert child.exitcode == 75
    record = json.loads((run_dir / "exit.json").read_text())
    assert record["code"] == 75 and record["reason"] == "SIGTERM"
    assert layout.list_checkpoints(run_dir / "checkpoints")[0].name == f"step-{record['step']:08d}"


def test_a_misspelt_key_leaves_with_78_and_one_line(recipe: Path) -> None:
    script = str(ROOT / "launchers" / "pretrain.py")
    line = [sys.executable, script, "--config", str(recipe), "mask.samplr=random"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 78
    assert "mask.samplr is not a key of mask; did you mean sampler?" in done.stderr
    assert "Traceback" not in done.stderr
