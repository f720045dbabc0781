"""An export without --output is beside its run, whatever the run is called."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from cmtmae_scale.api.encoders import load_encoder
from cmtmae_scale.api.features import save_features
from cmtmae_scale.commands.init import refuse_existing, write_new
from cmtmae_scale.config.schema import Config
from cmtmae_scale.errors import CheckpointError, ConfigError
from cmtmae_scale.evaluation.saved import locate_checkpoint, run_of_checkpoint
from cmtmae_scale.export import place
from cmtmae_scale.export.origin import Origin
from cmtmae_scale.export.place import default_output, publish
from dataloading.index import Index
from tests.checkpoint.save_case import save


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


def test_checkpoints_behind_a_link_belong_to_their_run(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    save(tmp_path / "store", 3)
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "store")
    folder = locate_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000003")
    assert run_of_checkpoint(folder) == tmp_path / "run"
    moved = locate_checkpoint(tmp_path / "store" / "step-00000003")
    assert run_of_checkpoint(moved) is None


@pytest.fixture
def locked(tmp_path: Path) -> Iterator[Path]:
    """A folder that this user cannot search."""
    folder = tmp_path / "locked"
    folder.mkdir(0)
    user = os.geteuid()
    if not user:  # root can search every folder
        os.seteuid(65534)
    yield folder
    os.seteuid(user)


def write_recipe_to(file: Path) -> None:
    refuse_existing(file)
    write_new(file, "")


def export_to(folder: Path) -> None:
    with publish(folder):
        raise AssertionError


@pytest.mark.parametrize("write", [write_recipe_to, export_to])
def test_an_output_where_this_user_may_not_look_is_one_error(
    locked: Path, write: Callable[[Path], None]
) -> None:
    with pytest.raises(ConfigError, match=f"{locked / 'x'} cannot be written .*Permission denied"):
        write(locked / "x")


def test_features_that_cannot_be_written_are_one_error(locked: Path) -> None:
    with pytest.raises(ConfigError, match=r"x cannot be written .*Permission denied.*; name anoth"):
        save_features(locked / "x", torch.nn.Identity(), Index.__new__(Index))


def test_a_run_where_this_user_may_not_look_is_one_error(locked: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Permission denied|no such folder"):
        load_encoder(locked / "run")
