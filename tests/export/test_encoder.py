"""The exported encoder is timm's: strict names, equal output, one line that confirms it."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader
from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.config.load import config_from_dict
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.export.encoder import export_encoder, load_strictly
from cmtmae_scale.method.build import build_student
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from tests.engine.run_case import STEPS

pytestmark = pytest.mark.gloo


@pytest.mark.parametrize(
    ("weights", "prefix"), [("student", "model.encoder."), ("momentum", "momentum.")]
)
def test_timms_model_computes_what_our_encoder_computes(
    run_dir: Path, tmp_path: Path, weights: str, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "encoder.safetensors"
    options = ["--checkpoint", str(run_dir), "--weights", weights, "--output", str(output)]
    assert export_weights(["encoder", *options]) == 0
    text, call = capsys.readouterr().out.splitlines()
    theirs = eval(call, {"timm": timm}).eval()
    data = timm.data.resolve_model_data_config(theirs)
    assert (data["input_size"], data["crop_pct"]) == ((3, 64, 64), 224 / 256)
    assert (data["mean"], data["std"]) == (IMAGENET_MEAN, IMAGENET_STD)
    tensors = load_file(output)
    theirs.load_state_dict(tensors, strict=True)
    numbers = f"{len(tensors)} tensors, {sum(p.numel() for p in theirs.parameters())} parameters"
    assert text == (
        f"{output}: {weights} encoder at step {STEPS}, {numbers}, loaded back strictly into"
    )
    folder = layout.folder_of(run_dir / "checkpoints", STEPS)
    ours = build_student(config_from_dict(layout.read_state(folder)["config"], "x")).eval()
    reader = ChunkReader(folder)
    states = {
        k.removeprefix(prefix): reader.read_tensor(k) for k in reader.index if k.startswith(prefix)
    }
    ours.load_state_dict(states, strict=True)
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(
            ours(images), theirs.forward_features(images), rtol=1e-5, atol=1e-5
        )
    assert [path.name for path in tmp_path.iterdir()] == [output.name]


def test_it_stands_beside_every_kept_checkpoint(run_dir: Path, tmp_path: Path) -> None:
    folders = layout.list_checkpoints(run_dir / "checkpoints")
    assert [layout.step_of(folder) for folder in folders] == [STEPS, STEPS - 2]
    for folder in folders:
        done = export_encoder(folder, tmp_path / f"{folder.name}.safetensors", "student")
        assert done.file.read_bytes() == (folder / layout.ENCODER).read_bytes()


def test_a_runs_newest_intact_checkpoint_is_taken(
    run_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(run_dir, tmp_path / "run")
    broken = layout.folder_of(tmp_path / "run" / "checkpoints", STEPS)
    (broken / layout.rank_file(1)).unlink()
    done = export_encoder(tmp_path / "run", None, "momentum")
    name = f"cmtmae-momentum-step-{STEPS - 2:08d}-encoder.safetensors"
    assert done.file == tmp_path / "run" / "export" / name
    assert done.step == STEPS - 2
    assert f"BROKEN CHECKPOINT {broken}" in caplog.text
    with pytest.raises(CheckpointError, match=r"is broken: rank-00001.safetensors is absent"):
        export_encoder(broken, tmp_path / "x", "student")


def test_a_draft_of_a_run_that_goes_on_is_left_alone(run_dir: Path, tmp_path: Path) -> None:
    draft = run_dir / "checkpoints" / ".draft-00000008-0000000000000007-1"
    draft.mkdir()
    export_encoder(run_dir, tmp_path / "x", "student")
    assert draft.exists()
    draft.rmdir()


def test_wrong_places_and_outputs_are_clear_errors(run_dir: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent", run_dir / "index"):
        with pytest.raises(CheckpointError, match=r"neither a run .* nor a checkpoint"):
            export_encoder(place, tmp_path / "x", "student")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="no checkpoint yet; train first"):
        export_encoder(tmp_path / "empty", tmp_path / "x", "student")
    (tmp_path / "x").write_text("precious")
    with pytest.raises(
        ConfigError, match=r"x exists; delete it, or name another place with --output"
    ):
        export_encoder(run_dir, tmp_path / "x", "student")
    assert (tmp_path / "x").read_text() == "precious"
    with pytest.raises(ConfigError, match="cannot be written"):
        export_encoder(run_dir, tmp_path / "nowhere" / "x", "student")
    assert export_weights(["encoder", "--checkpoint", str(tmp_path)]) == 78


def test_weights_that_do_not_fit_timm_leave_no_file(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = timm.create_model("test_vit", num_classes=0, img_size=64)
    monkeypatch.setattr("cmtmae_scale.export.encoder.build_timm", lambda config: (model, ""))
    with pytest.raises(CheckpointError, match=r"does not fit timm .*size mismatch"):
        export_encoder(run_dir, tmp_path / "x", "student")
    assert not list(tmp_path.iterdir())
    assert load_strictly(model, save_of(model, tmp_path / "y")) == len(model.state_dict())


def save_of(model: torch.nn.Module, path: Path) -> Path:
    from safetensors.torch import save_file

    save_file(model.state_dict(), path)
    return path
