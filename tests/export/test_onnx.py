"""The ONNX graph computes what the run computes, and is not called verified where it was not."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.export import formats, onnx_folder
from cmtmae_scale.export.formats import export_folder
from cmtmae_scale.export.onnx_folder import check_onnx, onnx_version, write_onnx
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
    remedy = "NOT verified, for onnxruntime is not installed: pip install 'cmtmae-scale[onnx]'"
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
