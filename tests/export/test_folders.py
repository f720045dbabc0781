"""Every folder loads into its library and computes the same, or is not written."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.export import full, hugging_face, timm_folder
from cmtmae_scale.export.compare import require_agreement
from cmtmae_scale.export.formats import export_folder
from cmtmae_scale.export.full import load_full
from cmtmae_scale.export.origin import Weights, open_origin
from cmtmae_scale.method.images import IMAGENET_MEAN, IMAGENET_STD
from dataloading.errors import DataError
from tests.engine.run_case import STEPS

pytestmark = [pytest.mark.gloo, pytest.mark.filterwarnings("ignore:Using a slow image processor")]
SIZE = 64


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


def ours(run_dir: Path, weights: Weights, pixels: torch.Tensor) -> torch.Tensor:
    return open_origin(run_dir, weights).encoder()(pixels)


def test_timm_takes_the_folder(
    run_dir: Path, tmp_path: Path, pixels: torch.Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "mine"
    options = ["--checkpoint", str(run_dir), "--weights", "momentum", "--output", str(output)]
    assert export_weights(["timm", *options]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{output}: an encoder for timm, momentum at step {STEPS}, loaded back")
    assert "on 10 images" in text and str(run_dir.parent / "photos") in text
    names = ["README.md", "config.json", "model.safetensors"]
    assert [path.name for path in sorted(tmp_path.rglob("*.*"))] == names
    call = (output / "README.md").read_text()
    origin = open_origin(run_dir, "momentum")
    model = timm_folder.load_timm(output, origin)
    expected = ours(run_dir, "momentum", pixels)
    torch.testing.assert_close(model.forward_features(pixels), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(model(pixels), expected[:, 0], rtol=0, atol=1e-5)
    older = next(line for line in call.splitlines() if line.startswith("# timm < "))
    line = older.split(": ", 1)[1].replace("FOLDER", str(output))
    by_file = eval(line, {"timm": timm}).eval()
    data = timm.data.resolve_model_data_config(by_file)
    assert (data["mean"], data["std"]) == (IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(by_file.forward_features(pixels), expected, rtol=0, atol=1e-5)


@pytest.mark.skipif(not timm_folder.reads_folders(), reason="this timm reads no such folder")
def test_timm_reads_preprocessing_and_takes_a_new_head(run_dir: Path, tmp_path: Path) -> None:
    export_folder("timm", run_dir, tmp_path / "x", "student", None)
    model: Any = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True, num_classes=7)
    assert model.head.out_features == 7
    kept = load_file(tmp_path / "x" / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], value) for name, value in kept.items())
    data = timm.data.resolve_data_config({}, pretrained_cfg=model.pretrained_cfg)
    assert tuple(data["input_size"]) == (3, SIZE, SIZE)
    assert (tuple(data["mean"]), tuple(data["std"])) == (IMAGENET_MEAN, IMAGENET_STD)
    assert (data["crop_pct"], data["interpolation"]) == (224 / 256, "bicubic")


def test_transformers_takes_the_folder(run_dir: Path, tmp_path: Path, pixels: torch.Tensor) -> None:
    transformers = pytest.importorskip("transformers")
    text = export_folder("hf", run_dir, tmp_path / "x", "momentum", None)
    assert f"loaded back by transformers {transformers.__version__}; largest difference" in text
    model = transformers.AutoModel.from_pretrained(tmp_path / "x", add_pooling_layer=False)
    assert type(model).__name__ == "ViTModel" and model.pooler is None
    found = model.eval()(pixel_values=pixels).last_hidden_state
    expected = ours(run_dir, "momentum", pixels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_both_libraries_prepare_a_photograph_alike(run_dir: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_folder("hf", run_dir, tmp_path / "hf", "student", None)
    export_folder("timm", run_dir, tmp_path / "timm", "student", None)
    cfg = json.loads((tmp_path / "timm" / "config.json").read_text())["pretrained_cfg"]
    data = timm.data.resolve_data_config({}, pretrained_cfg=cfg)
    transform: Any = timm.data.create_transform(**data)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    # 73 of 292 pixels a side, so that no library rounds the place of the centre
    photograph = Image.open(run_dir.parent / "photos" / "class0" / "000.jpg").resize((292, 292))
    theirs = processor(photograph, return_tensors="pt")["pixel_values"][0]
    level = 1 / 255 / min(IMAGENET_STD)
    torch.testing.assert_close(theirs, transform(photograph), rtol=0, atol=2.01 * level)


def test_the_full_model_predicts_as_the_run_does(run_dir: Path, tmp_path: Path) -> None:
    export_folder("full", run_dir, tmp_path / "x", "student", None)
    model = load_full(tmp_path / "x")
    states = open_origin(run_dir, "student").tensors("model.")
    assert states.keys() == model.state_dict().keys()
    assert all(torch.equal(value, states[name]) for name, value in model.state_dict().items())
    assert {name.split(".")[0] for name in states} == {"encoder", "decoder", "heads"}
    text = (tmp_path / "x" / "config.yaml").read_text()
    (tmp_path / "x" / "config.yaml").write_text(text.replace("patch_size: 8", "patch_size: 16"))
    with pytest.raises(CheckpointError, match="weights and config differ"):
        load_full(tmp_path / "x")


@pytest.mark.parametrize("what", ["timm", "hf", "full"])
def test_wrong_weights_are_never_published(
    what: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if what == "timm":
        write = timm_folder.write_encoder
        monkeypatch.setattr(timm_folder, "write_encoder", lambda a, b, _: write(a, b, "momentum"))
    elif what == "hf":
        pytest.importorskip("transformers")
        monkeypatch.setattr(hugging_face, "QKV", ("query", "value", "key"))
    else:
        monkeypatch.setattr(full, "PREFIX", "exp_avg.")
    with pytest.raises(CheckpointError, match=r"computes something else|weights and config differ"):
        export_folder(what, run_dir, tmp_path / "x", "student", None)
    assert not list(tmp_path.iterdir())


def test_nan_and_other_shapes_do_not_agree() -> None:
    one = torch.ones(2, 3)
    assert require_agreement(one, one + 5e-5, "x").difference == pytest.approx(5e-5, rel=0.01)
    for other in (one + 2e-4, one * torch.nan, one * torch.inf):
        with pytest.raises(CheckpointError, match="x computes something else"):
            require_agreement(one, other, "x")
    with pytest.raises(CheckpointError, match=r"x returns shape \[3, 2\] in place of \[2, 3\]"):
        require_agreement(one, one.T, "x")


def test_without_transformers_nothing_is_written(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    options = ["--checkpoint", str(run_dir), "--output", str(tmp_path / "x")]
    with pytest.raises(ConfigError, match=r"pip install 'cmtmae-scale\[hf\]'"):
        export_folder("hf", run_dir, tmp_path / "x", "student", None)
    assert export_weights(["hf", *options]) == 78
    assert not list(tmp_path.iterdir())


def test_photographs_are_needed_and_may_be_others(run_dir: Path, tmp_path: Path) -> None:
    photographs = run_dir.parent / "photos"
    away = photographs.with_name("away")
    photographs.rename(away)
    try:
        with pytest.raises(ConfigError, match=r"cannot be read .* name others with --images"):
            export_folder("full", run_dir, tmp_path / "x", "student", None)
        assert not list(tmp_path.iterdir())
        few = tmp_path / "few" / "a"
        few.mkdir(parents=True)
        for number in range(2):
            shutil.copy(away / "class0" / "000.jpg", few / f"{number}.jpg")
        text = export_folder("full", run_dir, tmp_path / "x", "student", few.parent)
        assert "on 2 images" in text
        assert "number of images unknown" in (tmp_path / "x" / "README.md").read_text()
        for path in few.iterdir():
            path.write_bytes(path.read_bytes()[:-400])
        with pytest.raises(DataError, match="none of 2 images could be decoded"):
            export_folder("full", run_dir, tmp_path / "y", "student", few.parent)
        assert not (tmp_path / "y").exists()
    finally:
        away.rename(photographs)


def test_an_output_is_never_overwritten(run_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "precious").touch()
    with pytest.raises(
        ConfigError, match=r"x exists; delete it, or name another place with --output"
    ):
        export_folder("full", run_dir, tmp_path / "x", "student", None)
    with pytest.raises(ConfigError, match="cannot be written"):
        export_folder("full", run_dir, tmp_path / "nowhere" / "x", "student", None)
    assert [path.name for path in tmp_path.rglob("*")] == ["x", "precious"]
