"""The command: what may be fine-tuned, which recipes there are, mistakes and their names."""

import re
from pathlib import Path

import pytest
import timm
import yaml
from safetensors.torch import save_file

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.commands.finetune import finetune
from cmtmae_scale.config.finetune import Finetune, load_finetune
from cmtmae_scale.errors import ConfigError
from tests.engine.run_case import STEPS, run
from tests.engine.run_case import write_recipe as write_pretraining
from tests.finetuning.finetune_case import arguments, tune, write_recipe
from tests.processes import run_ranks

ROOT = Path(__file__).resolve().parents[2]
SHORT = ["train.stop_after=2"]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished pre-training."""
    folder = tmp_path_factory.mktemp("pretrained")
    run_ranks(1, run, write_pretraining(folder), [f"train.steps={STEPS}"])
    return folder / "run"


def tune_named(recipe: Path, words: list[str], overrides: list[str]) -> str:
    """Fine-tune the encoder that ``words`` name; returns the reason of the stop."""
    return tune(recipe, *overrides, words=words)[0].strip()


@pytest.mark.gloo
def test_students_and_models_of_timm_are_fine_tuned(
    recipe: Path, pretrained: Path, tmp_path: Path
) -> None:
    file = tmp_path / "weights.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), file)
    starts = {
        "momentum": ["--checkpoint", str(pretrained)],
        "student": ["--checkpoint", str(pretrained), "--weights", "student"],
        "teacher": ["--checkpoint", str(pretrained), "--weights", "teacher"],
        "random": ["--checkpoint", str(pretrained), "--weights", "random"],
        "timm": ["--timm", "test_vit", "--file", str(file), "--size", "48"],
    }
    digests = set()
    for name, words in starts.items():
        place = tmp_path / name
        said = run_ranks(1, tune_named, recipe, words, [f"run.output_dir={place}", *SHORT])
        assert said == ["train.stop_after=2"]
        start = layout.read_state(layout.folder_of(place / "checkpoints", 2))["encoder"]
        assert start["size"] == (48 if name == "timm" else 64)
        assert start["facts"].get("weights", "timm") == name
        digests.add(start["facts"]["sha256"])
    assert len(digests) == 5


@pytest.mark.gloo
def test_a_fine_tuning_and_a_pre_training_are_not_taken_for_each_other(
    recipe: Path, pretrained: Path, tmp_path: Path
) -> None:
    words = ["--checkpoint", str(pretrained)]
    run_ranks(1, tune_named, recipe, words, [f"run.output_dir={tmp_path}", *SHORT])
    with pytest.raises(AssertionError, match=r"is of a fine-tuning run; .* encoder.safetensors of"):
        run_ranks(1, tune_named, recipe, ["--checkpoint", str(tmp_path)], SHORT)
    with pytest.raises(AssertionError, match=r"holds checkpoints of pre-training"):
        run_ranks(1, tune_named, recipe, words, [f"run.output_dir={pretrained}", *SHORT])


MISTAKES = {
    "augment.mixupp=1": "augment.mixupp is not a key of augment; did you mean mixup?",
    "train.micro_batch_size=1": "train.micro_batch_size=1: mixup and cutmix pair the views",
    "train.global_batch_size=9": "train.global_batch_size=9 cannot be shared by 1 rank, an even",
    "train.epochs=0.5": "optimizer.warmup_epochs=0.5 must be below train.epochs=0.5",
    "train.steps=1": "optimizer.warmup_epochs=0.5: the run has only 0.4 passes over 20 images",
    "head.drop_path=1": r"head.drop_path=1.0 must lie in \[0, 1\)",
    "head.pool=max": "head.pool='max' is not one of mean, cls",
    "optimizer.layer_decay=1.5": r"optimizer.layer_decay=1.5 must lie in \(0, 1\]",
    "augment.magnitude=11": r"augment.magnitude=11.0 must lie in \[0, 10\]",
    "data.test_path=nowhere": "nowhere",
    "--weights student": "--weights belongs to --checkpoint|--weights belongs to a checkpoint",
    "--size 32": "--size belongs to --timm",
    "--arch vit_tiny_patch16_224": "does not fit vit_tiny_patch16_224",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_mistakes_are_named_and_leave_with_78(
    recipe: Path,
    words: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("cmtmae_scale.commands.finetune.set_up_logging", lambda *_: None)
    assert finetune(arguments(recipe, f"run.output_dir={tmp_path}", *words.split())) == 78
    assert re.search(MISTAKES[words], caplog.text)


RECIPES = {
    "base": {"layer_decay": 0.65, "drop_path": 0.1, "base_lr": 5e-4, "epochs": 100},
    "large": {"layer_decay": 0.75, "drop_path": 0.2, "base_lr": 1e-3, "epochs": 50},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_recipes_are_maes(name: str) -> None:
    config = load_finetune(ROOT / "configs" / f"finetune_{name}.yaml")
    found = {
        "layer_decay": config.optimizer.layer_decay,
        "drop_path": config.head.drop_path,
        "base_lr": config.optimizer.base_lr,
        "epochs": config.train.epochs,
    }
    assert found == RECIPES[name]
    assert (config.augment, config.data.path) == (Finetune().augment, "datasets/imagenet-1k/train")
    shared = config.optimizer
    assert (shared.weight_decay, shared.betas, shared.grad_clip) == (0.05, (0.9, 0.999), None)
    assert (shared.warmup_epochs, shared.min_lr, config.train.global_batch_size) == (5, 1e-6, 1024)


def test_the_defaults_are_those_of_the_base_recipe() -> None:
    config = load_finetune(ROOT / "configs" / "finetune_base.yaml")
    default = Finetune()
    assert (config.head, config.augment, config.optimizer) == (
        *(default.head, default.augment, default.optimizer),
    )


def test_an_override_of_one_length_clears_the_other(tmp_path: Path) -> None:
    tree = {
        "run": {"output_dir": "x"},
        "data": {"path": "a", "test_path": "b"},
        "train": {"epochs": 9},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    config = load_finetune(file, ["train.steps=7"])
    assert (config.train.epochs, config.train.steps) == (None, 7)
    del tree["data"]["test_path"]
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"recipe.yaml: data.test_path must be given"):
        load_finetune(file)
