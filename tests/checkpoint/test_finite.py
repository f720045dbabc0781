"""Weights that are not finite: no file of them is loaded, no checkpoint of them is published."""

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import chunks, layout
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.init_weights import load_init_weights
from cmtmae_scale.checkpoint.shards import write_encoder
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.config.load import load_config, save_config
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import EXIT_CONFIG, CheckpointError, ConfigError, SaveError, TeacherError
from cmtmae_scale.evaluation.subject import subject_from_file
from cmtmae_scale.export import full
from cmtmae_scale.method.model import CollaborativeMAE
from cmtmae_scale.teachers.weights import read_weights
from tests.checkpoint.save_case import STATE, fragments, save
from tests.engine.run_case import BASE
from tests.processes import run_ranks

SOUND = {"norm.weight": torch.ones(4), "steps": torch.tensor(3)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (math.nan, torch.float32),
        (math.inf, torch.bfloat16),
        (-math.inf, torch.float16),
        (1e300, torch.float64),  # finite here, infinite in the float32 of the model
    ],
)
def test_a_file_is_refused_with_its_name_and_the_tensors(
    tmp_path: Path, suffix: str, value: float, dtype: torch.dtype
) -> None:
    file = tmp_path / f"weights{suffix}"
    bad = torch.zeros(3, 5, dtype=dtype)
    bad[1, :2] = value
    state = SOUND | {"blocks.3.attn.qkv.weight": bad}
    (save_file if suffix == ".safetensors" else torch.save)(state, file)
    with pytest.raises(TeacherError) as caught:
        read_weights(file, "student.init_weights")
    assert str(caught.value).startswith(
        f"student.init_weights={file}: blocks.3.attn.qkv.weight holds 2 values of 15 that are not "
        "finite; "
    )
    assert caught.value.exit_code == EXIT_CONFIG


def test_an_additive_attention_mask_may_hold_infinities(tmp_path: Path) -> None:
    mask = torch.full((3, 3), -math.inf).triu(1)
    save_file(SOUND | {"attn_mask": mask}, tmp_path / "x.safetensors")
    assert len(read_weights(tmp_path / "x.safetensors")) == 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("finite")
    paths = {"run": {"output_dir": "run"}, "data": {"path": "images"}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(BASE | paths))
    return load_config(folder / "recipe.yaml")


@pytest.fixture(scope="module")
def model(config: Config) -> CollaborativeMAE:
    return CollaborativeMAE(config, {"teacher": 8})


def test_initial_weights_that_are_not_finite_change_nothing(model: CollaborativeMAE) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {k: v.clone() + 1 for k, v in model.encoder.state_dict().items()}
    state["blocks.1.mlp.fc2.bias"][5] = math.nan
    state["cls_token"][:] = math.inf
    with pytest.raises(
        ConfigError, match=r"init_weights=x.pth: cls_token holds 64 values of 64 .* 1 more tensors;"
    ):
        load_init_weights(model, state, "x.pth")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_exported_file_that_is_not_finite_is_not_evaluated(
    tmp_path: Path, model: CollaborativeMAE
) -> None:
    state = {k: v.clone() for k, v in model.encoder.state_dict().items()}
    state["norm.bias"][2] = math.nan
    file = tmp_path / "encoder.safetensors"
    save_file(state, file)
    with pytest.raises(CheckpointError, match=rf"--checkpoint={file}: norm.bias holds 1 values of"):
        subject_from_file(file, "test_vit", torch.device("cpu"))


def test_an_exported_model_that_is_not_finite_is_not_loaded(tmp_path: Path, config: Config) -> None:
    save_config(config, tmp_path / full.CONFIG)
    save_file({"heads.pixel.bias": torch.full((2,), math.nan)}, tmp_path / full.WEIGHTS)
    with pytest.raises(CheckpointError, match=rf"{full.WEIGHTS}: heads.pixel.bias holds 2 values"):
        full.load_full(tmp_path)


def with_bad(key: str, parts: int = 1, part: int = 0) -> dict[str, Fragment]:
    """Fragments of which the last value of a tensor is NaN."""
    found = fragments(parts, part)
    own = found[key]
    if own.offset + own.local.numel() == math.prod(own.shape):
        own.local[-1] = math.nan
    return found


@pytest.mark.parametrize("key", ["model.decoder.b", "momentum.w"])
def test_no_checkpoint_is_published_that_is_not_finite(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = save(tmp_path / "c", 3)
    writer = Writer(tmp_path / "c", 0, 1, 1, True, token=7)
    writer.attempts = 1
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(SaveError, match=f"step 4 could not .* \\({key} holds 1 values of"),
    ):
        writer.finish(4, with_bad(key), STATE)
    assert f"could not be written ({key} holds 1 values of" in caplog.text
    assert layout.list_checkpoints(tmp_path / "c") == [sound]
    assert layout.find_damage(sound) is None


@pytest.fixture
def bad_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of two ranks whose encoder is not finite, written without the check."""
    with monkeypatch.context() as without:
        without.setattr(chunks, "find_non_finite", lambda tensors: "")
        without.setattr(
            "tests.checkpoint.save_case.fragments",
            lambda ranks, rank, version: with_bad("model.encoder.w", ranks, rank),
        )
        return save(tmp_path / "bad", ranks=2)


def load_share(folder: Path) -> str:
    """Load this rank's half; returns the error."""
    import torch.distributed as dist

    with pytest.raises(CheckpointError) as caught:
        load_fragments(folder, fragments(2, dist.get_rank(), fill=False))
    return str(caught.value)


@pytest.mark.gloo
def test_every_rank_refuses_a_checkpoint_of_which_one_reads_values_that_are_not_finite(
    bad_checkpoint: Path,
) -> None:
    assert layout.find_damage(bad_checkpoint) is None
    texts = run_ranks(2, load_share, bad_checkpoint)
    assert texts[0] == texts[1]
    assert texts[0].startswith(
        f"{bad_checkpoint}: model.encoder.w holds 1 values of 7 that are not"
    )


def test_nothing_is_exported_from_a_checkpoint_that_is_not_finite(
    bad_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=r"model.encoder.w holds 1 values of 15 .* older"):
        write_encoder(bad_checkpoint, tmp_path / "x.safetensors", "student")
    write_encoder(bad_checkpoint, tmp_path / "y.safetensors", "momentum")
    stored: dict[str, Any] = load_file(tmp_path / "y.safetensors")
    assert stored["w"].isfinite().all()
