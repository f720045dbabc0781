"""The ONNX graph computes what the run computes, and is called verified only if it was."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from cmtmae_scale.commands.export import export_weights
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.export import formats, onnx_folder
from cmtmae_scale.export.formats import export_folder
from cmtmae_scale.export.onnx_folder import check_onnx, onnx_version, write_onnx
from cmtmae_scale.export.timm_folder import reads_folders
from tests.export.test_architectures import noise, saved
from tests.export.test_sizes import save_run


def hide(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    found = importlib.util.find_spec
    hidden: Any = lambda name: None if name in names else found(name) or object()  # noqa: E731
    monkeypatch.setattr(onnx_folder, "find_spec", hidden)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    ("arch", "size", "patch"), [("test_vit", 56, 14), ("test_vit2", 64, 16), ("test_vit3", 64, 16)]
)
def test_onnxruntime_computes_what_the_run_computes(
    arch: str, size: int, patch: int, tmp_path: Path
) -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)
    origin = saved(tmp_path, arch, size, patch)
    (tmp_path / "x").mkdir()
    write_onnx(tmp_path / "x", origin)
    found = check_onnx(tmp_path / "x", origin, noise(size))
    assert found is not None and found.difference < 1e-4 * found.largest
    graph = (tmp_path / "x" / "model.onnx").read_bytes()
    assert str(Path(onnx_folder.__file__).parents[2]).encode() not in graph
    assert str(Path(torch.__file__).parents[1]).encode() not in graph
    if arch == "test_vit":
        (tmp_path / "y").mkdir()
        other = saved(tmp_path / "y", "test_vit", size, patch, seed=3)
        with pytest.raises(CheckpointError, match=r"onnxruntime .* computes something else"):
            check_onnx(tmp_path / "x", other, noise(size))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("arch", ["deit_tiny_patch16_224", "vit_base_patch16_dinov3"])
def test_a_graph_of_another_size_computes_what_timm_computes_there(
    arch: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    if not reads_folders():
        pytest.skip("this timm reads no such folder")
    save_run(tmp_path, {"arch": arch, "width": 48, "depth": 2, "heads": 2})
    options = ["--checkpoint", str(tmp_path / "run")]
    assert export_weights(["timm", *options]) == 0
    export = tmp_path / "run" / "export"
    for more, size in (([], 64), (["--image-size", "96"], 96)):
        assert export_weights(["onnx", *options, *more]) == 0
        name = f"cmtmae-student-step-00000002-onnx{f'-{size}' if more else ''}"
        assert f"{export / name}: an encoder as an ONNX graph" in capsys.readouterr().out
        card = (export / name / "README.md").read_text()
        assert "at 64 pixels, trained by" in card
        assert ("exported for images of 96 pixels" in card) == bool(more)
        timms: Any = timm.create_model(
            f"local-dir:{export / 'cmtmae-student-step-00000002-timm'}",
            pretrained=True,
            img_size=size,
        ).eval()
        images = torch.randn(3, 3, size, size, generator=torch.manual_seed(0))
        session = onnxruntime.InferenceSession(export / name / "model.onnx")
        (tokens, _) = session.run(None, {"images": images.numpy()})
        with torch.no_grad():
            expected = timms.forward_features(images)
        torch.testing.assert_close(torch.as_tensor(tokens), expected, rtol=0, atol=1e-4)


def test_a_size_that_patches_do_not_fill_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    save_run(tmp_path, {})
    options = ["onnx", "--checkpoint", str(tmp_path / "run"), "--image-size"]
    with pytest.raises(ConfigError, match=r"--image-size=100 is not a multiple .* use 96 or 112"):
        export_folder("onnx", tmp_path / "run", None, "student", None, image_size=100)
    with pytest.raises(SystemExit) as error:
        export_weights([*options, "0"])
    assert error.value.code == 78 and "number of pixels, such as 448" in capsys.readouterr().err


def test_without_onnxruntime_the_graph_is_called_unverified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_run(tmp_path, {})
    hide(monkeypatch, "onnxruntime")

    def write(draft: Path, _: Any) -> None:  # the exporter takes ten seconds; see above
        (draft / "model.onnx").touch()

    monkeypatch.setitem(formats.FORMATS, "onnx", formats.FORMATS["onnx"]._replace(write=write))
    text = export_folder("onnx", tmp_path / "run", None, "student", None)
    folder = tmp_path / "run" / "export" / "cmtmae-student-step-00000002-onnx"
    card = (folder / "README.md").read_text()
    remedy = "NOT verified, because onnxruntime is not installed: pip install 'cmtmae-scale[onnx]'"
    assert remedy in text and remedy in card
    assert "Checked when exported" not in card and "loaded back" not in text


def test_without_an_exporter_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hide(monkeypatch, "onnxscript")
    with pytest.raises(ConfigError, match=r"needs onnxscript, which is not installed: pip install"):
        export_folder("onnx", tmp_path, None, "student", None)
    hide(monkeypatch, "onnxruntime")
    assert onnx_version() == "no onnxruntime"
