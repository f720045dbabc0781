"""The notebook's code runs from top to bottom, without a network and without a Jupyter kernel."""

import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "own_images.ipynb"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    notebook = json.loads(NOTEBOOK.read_text())
    names: dict[str, Any] = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"{NOTEBOOK.name} cell {number}", "exec"), names)
    assert names["features"].patches.shape == (96, 192) and names["features"].excluded == ()
    assert len(list(Path(names["run"], "checkpoints").glob("step-*10"))) == 1
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
