"""An export without --output is beside its run, whatever the run is called."""

from pathlib import Path
from typing import Any

import pytest

from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import ConfigError
from cmtmae_scale.export import place
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.place import default_output, publish


@pytest.mark.parametrize(
    ("name", "expected"),
    [("photos-2", "photos-2"), ("../a b/c:d", "a-b-c-d"), ("...", "run"), ("", "run")],
)
def test_names_of_runs_become_names_of_files(name: str, expected: str, tmp_path: Path) -> None:
    config = Config()
    config.run.name = name
    state: dict[str, Any] = {"progress": {"step": 30}}
    origin = Origin(tmp_path / "checkpoints" / "step-00000030", state, config, "momentum")
    file = f"{expected}-momentum-step-00000030-timm"
    assert default_output(origin, "timm") == tmp_path / "export" / file
    moved = origin._replace(folder=tmp_path / "best")
    assert default_output(moved, "timm") == tmp_path / "export" / file


def test_an_export_that_fails_leaves_no_folder(tmp_path: Path) -> None:
    output = tmp_path / "export" / "x"
    with pytest.raises(ValueError, match="refused"), publish(output) as draft:
        draft.write_text("half")
        raise ValueError("refused")
    assert not list(tmp_path.iterdir())
    with publish(output) as draft:
        draft.write_text("whole")
    assert [path.name for path in tmp_path.rglob("*")] == ["export", "x"]


def test_a_run_that_cannot_be_written_names_the_option(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(place, "atomic_path", refuse)  # root may write everywhere
    remedy = "x cannot be written .*Permission denied.; name another place with --output"
    with pytest.raises(ConfigError, match=remedy), publish(tmp_path / "export" / "x"):
        pass
    assert not list(tmp_path.iterdir())
