"""Whole tiny fine-tunings: what they learn, and that stopping changes nothing."""

import json
import os
import re
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.commands.report import write_page
from tests.engine.run_case import read_log, same, tensors
from tests.evaluation.evaluation_case import labelled_photographs
from tests.finetuning.finetune_case import (
    STEPS,
    failure_of,
    tune,
    tune_each,
    write_encoder,
    write_eva,
    write_recipe,
)
from tests.processes import run_ranks

pytestmark = pytest.mark.gloo


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, and its undisturbed run."""
    found = write_recipe(tmp_path_factory.mktemp("finetune"), classes=6)
    ((said, code),) = run_ranks(1, tune, found)
    assert code == 0 and "test:  13 images" in said
    return found


def curve(run_dir: Path, name: str = "loss/total") -> list[float]:
    return [entry[name] for entry in read_log(run_dir) if name in entry]


def test_the_result_says_what_was_done(recipe: Path) -> None:
    folder = recipe.parent
    record = json.loads((folder / "run" / "result.json").read_text())
    (row,) = record["results"]
    assert row["count"] == 13 and row["accuracy"] == row["correct"] / 13 <= row["accuracy_top5"]
    low, high = row["interval_95"]
    assert low < row["accuracy"] < high
    assert record["subject"]["arch"] == "test_vit" and record["seed"] == 0
    assert record["classes"] == 6 and record["steps"] == STEPS
    assert record["images"]["train"]["images"] == 20
    assert record["settings"]["optimizer"]["layer_decay"] == 0.65
    assert set(record["versions"]) == {"cmtmae_scale", "torch", "timm"}
    assert len(set(record["weights_sha256"].values())) == 2
    assert json.loads((folder / "run" / "exit.json").read_text())["code"] == 0
    # 20 images and 8 views per step: passes end within steps 3 and 5; the last step ends the run
    passes = [entry["eval/pass"] for entry in read_log(folder / "run") if "eval/top1" in entry]
    assert passes == [1, 2, 2]
    assert curve(folder / "run", "eval/top1")[-1] == row["accuracy"]


def test_the_report_shows_the_fine_tuning(recipe: Path) -> None:
    page = write_page([recipe.parent / "run"]).read_text()
    words = " ".join(re.sub("<[^>]*>", " ", page).split())
    record = json.loads((recipe.parent / "run" / "result.json").read_text())
    (row,) = record["results"]
    low, high = (f"{100 * end:.1f} %" for end in row["interval_95"])
    for phrase in (
        "Fine-tuning, as of",
        f"{100 * row['accuracy']:.1f} % at step {STEPS}, 95 % interval {low} to {high}, chance",
        f"encoder.safetensors (sha256 {record['subject']['sha256'][:12]}): test_vit at 64 pixels",
        f"{recipe.parent / 'train'}: 20 images",
        f"top-1 {row['accuracy']:.4g} top-5",
        f"{row['correct']}/13 result.json",
    ):
        assert phrase in words, phrase
    for phrase in ("pre-training", "not this version", "not evaluated", "Figures", "drawn:"):
        assert phrase not in words, phrase


def test_the_checkpoints_encoder_is_timms_classifier(recipe: Path) -> None:
    folder = layout.folder_of(recipe.parent / "run" / "checkpoints", STEPS)
    model = timm.create_model(
        "test_vit", num_classes=6, img_size=64, global_pool="avg", fc_norm=True
    )
    state = load_file(folder / layout.ENCODER)
    model.load_state_dict(state, strict=True)
    start = load_file(recipe.parent / "encoder.safetensors")
    for name in ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"):
        assert not torch.equal(state[name], start[name]), name


def tune_eva(recipe: Path, folder: Path) -> tuple[str, int]:
    write_eva(folder / "eva.safetensors")
    overrides = [f"run.output_dir={folder / 'run'}", "train.steps=2"]
    return tune(recipe, *overrides, words=["--checkpoint", str(folder / "eva.safetensors")])


def test_an_eva_is_fine_tuned_and_timm_loads_it(recipe: Path, tmp_path: Path) -> None:
    ((_, code),) = run_ranks(1, tune_eva, recipe, tmp_path)
    assert code == 0
    sizes = {"img_size": 64, "patch_size": 16, "embed_dim": 96, "depth": 2, "num_heads": 2}
    norms = {"global_pool": "avg", "use_fc_norm": True, "use_post_transformer_norm": False}
    model = timm.create_model("eva02_base_patch14_224", num_classes=6, **sizes, **norms)
    folder = layout.folder_of(tmp_path / "run" / "checkpoints", 2)
    state = load_file(folder / layout.ENCODER)
    model.load_state_dict(state, strict=True)
    start = load_file(tmp_path / "eva.safetensors")
    for name in ("pos_embed", "blocks.0.attn.q_proj.weight", "blocks.1.attn.proj.weight"):
        assert not torch.equal(state[name], start[name]), name


def test_an_interruption_changes_no_bit(recipe: Path, tmp_path: Path) -> None:
    place = f"run.output_dir={tmp_path}"
    first, second, third = run_ranks(
        1, tune_each, recipe, [place, "train.stop_after=3"], [place, "data.workers=1"], [place]
    )[0]
    assert first[1] == 75 and "train.stop_after=3" in first[0]
    assert second[1] == third[1] == 0
    same(recipe.parent / "run", tmp_path)
    one, two = (
        json.loads((run_dir / "result.json").read_text())
        for run_dir in (recipe.parent / "run", tmp_path)
    )
    assert one["weights_sha256"] == two["weights_sha256"] and one["results"] == two["results"]
    assert curve(tmp_path) == curve(recipe.parent / "run")


def test_two_ranks_learn_the_same_from_the_same_views(recipe: Path, tmp_path: Path) -> None:
    results = run_ranks(2, tune, recipe, f"run.output_dir={tmp_path}")
    assert [code for _, code in results] == [0, 0]
    one, two = curve(recipe.parent / "run"), curve(tmp_path)
    assert two == pytest.approx(one, rel=2e-6)  # the order of sums
    record = json.loads((tmp_path / "result.json").read_text())
    assert record["results"][0]["count"] == 13


def test_a_result_that_cannot_be_written_fails_on_every_rank(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()
    found = run_ranks(2, failure_of, recipe, f"run.output_dir={tmp_path}", "train.steps=2")
    remedy = "result.json: cannot be written (Is a directory); make it writable and try the same"
    assert all(remedy in log for log in found), found


@pytest.mark.slow
def test_a_run_goes_on_at_another_number_of_ranks(recipe: Path, tmp_path: Path) -> None:
    place = f"run.output_dir={tmp_path}"
    run_ranks(2, tune, recipe, place, "train.stop_after=2")
    run_ranks(1, tune, recipe, place)
    whole = tensors(recipe.parent / "run", STEPS)
    for key, value in tensors(tmp_path, STEPS).items():
        torch.testing.assert_close(value, whole[key], rtol=1e-3, atol=1e-4, msg=key)


def tune_until_told(recipe: Path, run_dir: Path) -> tuple[tuple[str, int], tuple[str, int]]:
    """SIGTERM after the first entry of the log, of a run that would last; then the same again."""

    def tell() -> None:
        while not (run_dir / "log.jsonl").exists() or not (run_dir / "log.jsonl").read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    overrides = [f"run.output_dir={run_dir}", "train.steps=16", "checkpoint.every=1000"]
    watcher = threading.Thread(target=tell)
    watcher.start()
    first = tune(recipe, *overrides)
    watcher.join()
    state = json.loads((run_dir / "exit.json").read_text())
    if state["code"] != 75 or state["reason"] != "SIGTERM":
        raise RuntimeError(str(state))
    return first, tune(recipe, *overrides)


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_75_and_the_same_command_goes_on(
    recipe: Path, tmp_path: Path
) -> None:
    ((first, second),) = run_ranks(1, tune_until_told, recipe, tmp_path)
    assert first[1] == 75 and "SIGTERM" in first[0]
    assert second[1] == 0
    steps = [layout.step_of(one) for one in layout.list_checkpoints(tmp_path / "checkpoints")]
    assert steps[0] == 16 and 0 < steps[1] < 16
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == "done"


REFUSED = {
    "train.micro_batch_size=4": r"train.micro_batch_size: the checkpoint has 2, the config 4",
    "augment.mixup=0.5": r"augment.mixup: the checkpoint has 0.8, the config 0.5",
    "head.pool=cls": r"head.pool: the checkpoint has mean, the config cls",
    "run.seed=3": r"run.seed: .* it never changes within a run",
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_would_change_the_run_is_refused(recipe: Path, override: str) -> None:
    with pytest.raises(AssertionError, match=REFUSED[override]):
        run_ranks(1, tune, recipe, override)


def tune_from(recipe: Path, encoder: str) -> tuple[str, int]:
    return tune(recipe, encoder=encoder)


def test_a_run_belongs_to_the_weights_that_it_started_from(recipe: Path) -> None:
    write_encoder(recipe.parent / "other.safetensors", 1)
    with pytest.raises(AssertionError, match=r"holds a fine-tuning of encoder.safetensors \(\w+\)"):
        run_ranks(1, tune_from, recipe, "other.safetensors")
    copy = recipe.parent / "copy.safetensors"
    copy.write_bytes((recipe.parent / "encoder.safetensors").read_bytes())
    ((_, code),) = run_ranks(1, tune_from, recipe, "copy.safetensors")
    assert code == 0


@pytest.mark.slow
def test_a_run_goes_on_although_what_it_started_from_is_gone(recipe: Path, tmp_path: Path) -> None:
    write_encoder(recipe.parent / "gone.safetensors", 0)
    run_ranks(1, tune_lost, recipe, f"run.output_dir={tmp_path}")
    same(recipe.parent / "run", tmp_path)


def tune_lost(recipe: Path, place: str) -> None:
    """Two starts; between them the encoder's file disappears."""
    tune(recipe, place, "train.stop_after=3", encoder="gone.safetensors")
    (recipe.parent / "gone.safetensors").unlink()
    tune(recipe, place, encoder="gone.safetensors")


def test_a_picture_that_cannot_be_decoded_is_left_out(recipe: Path, tmp_path: Path) -> None:
    paths = []
    for name, seed, count in (("train", 0, 20), ("test", 1, 13)):
        photographs = labelled_photographs(tmp_path / name, count, seed, 6)
        broken = photographs / "class1" / "007.jpg"
        broken.write_bytes(broken.read_bytes()[:-300])
        paths.append(str(photographs))
    overrides = [f"run.output_dir={tmp_path / 'run'}", f"data.path={paths[0]}"]
    overrides += [f"data.test_path={paths[1]}", "data.max_bad_fraction=0.2"]
    ((said, code),) = run_ranks(1, tune, recipe, *overrides)
    assert code == 0 and "excluded: 1 images that cannot be decoded" in said
    rows = curve(tmp_path / "run", "valid_rows")
    # the pair of each of its two or three draws is not learnt from
    assert 8 * STEPS - sum(rows) in (4.0, 6.0)
    with pytest.raises(AssertionError, match=r"views .* could not be decoded, more than data.max"):
        bad = [*overrides[1:3], f"run.output_dir={tmp_path / 'other'}", "data.max_bad_fraction=0"]
        run_ranks(1, tune, recipe, *bad)


@pytest.mark.slow
@pytest.mark.deepspeed
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_learns_what_fsdp_learns_and_takes_over_its_run(
    recipe: Path, tmp_path: Path, stage: int
) -> None:
    zero = ["backend.name=deepspeed", f"backend.zero_stage={stage}"]
    run_ranks(2, tune, recipe, f"run.output_dir={tmp_path / 'whole'}", *zero)
    expected = curve(recipe.parent / "run")
    assert curve(tmp_path / "whole") == pytest.approx(expected, rel=1e-5)
    run_ranks(1, tune, recipe, f"run.output_dir={tmp_path / 'moved'}", "train.stop_after=2")
    run_ranks(2, tune, recipe, f"run.output_dir={tmp_path / 'moved'}", *zero)
    assert curve(tmp_path / "moved") == pytest.approx(expected, rel=1e-5)


MILD = ["augment.mixup=0", "augment.cutmix=0", "augment.erase=0", "augment.magnitude=3"]


@pytest.mark.slow
@pytest.mark.parametrize("augmentation", [[], MILD], ids=["full", "mild"])
@pytest.mark.parametrize("pool", ["mean", "cls"])
def test_it_learns(tmp_path: Path, pool: str, augmentation: list[str]) -> None:
    learns(tmp_path, pool, [*augmentation, "train.steps=150"], 0.55)


def test_it_learns_in_a_few_steps(tmp_path: Path) -> None:
    learns(tmp_path, "mean", [*MILD, "train.steps=40"], 0.5)  # by chance: 0.3 %


def learns(folder: Path, pool: str, overrides: list[str], at_least: float) -> None:
    """The loss falls, and accuracy on other photographs is beyond chance, a third."""
    recipe = write_recipe(folder, train=96, test=60)
    options = [f"head.pool={pool}", "train.global_batch_size=16", "train.micro_batch_size=16"]
    options += ["optimizer.base_lr=0.03", "optimizer.layer_decay=0.9", "head.drop_path=0.1"]
    options += ["checkpoint.every=1000"]
    run_ranks(1, tune, recipe, *options, *overrides)
    losses = curve(folder / "run")
    assert sum(losses[-10:]) / 10 < 0.95 * losses[0]
    record = json.loads((folder / "run" / "result.json").read_text())
    assert record["results"][0]["accuracy"] > at_least
    assert record["results"][0]["interval_95"][0] > 1 / 3


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(recipe: Path, tmp_path: Path) -> None:
    run_ranks(1, tune, recipe, f"run.output_dir={tmp_path}", "backend.compile=true", timeout_s=400)
    assert curve(tmp_path) == pytest.approx(curve(recipe.parent / "run"), rel=1e-4)
