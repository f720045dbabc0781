import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader, load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.tensor_file import Entry, write_tensors
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.errors import EXIT_CONFIG, CheckpointError
from cmtmae_scale.runtime.storage import digest
from tests.checkpoint.save_case import STATE, fragments, save, values


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_just_its_ranges(tmp_path: Path, parts: int) -> None:
    folder = save(tmp_path / "c", ranks=2)
    for part in range(parts):
        blank = fragments(parts, part, fill=False)
        load_fragments(folder, blank)
        for key, want in fragments(parts, part).items():
            assert torch.equal(blank[key].local, want.local)


def test_the_encoder_stands_beside_under_timm_names(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", ranks=2)
    encoder = load_file(folder / layout.ENCODER)
    assert list(encoder) == ["w"]
    assert torch.equal(encoder["w"], values("model.encoder.w").reshape(5, 3))


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", ranks=2)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert not list(tmp_path.glob("c/.draft*"))


def test_another_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path / "c")
    folder = layout.folder_of(tmp_path / "c", 3)
    other = fragments(1, 0, fill=False)
    del other["momentum.w"]
    with pytest.raises(CheckpointError, match=r"not expected \['momentum.w'\]"):
        load_fragments(folder, other)
    other = fragments(1, 0, fill=False)
    other["momentum.w"] = other["momentum.w"]._replace(shape=(3, 5))
    with pytest.raises(CheckpointError, match=r"momentum.w has shape \(5, 3\), the model \(3, 5\)"):
        load_fragments(folder, other)
    assert not any(part.local.any() for part in other.values())


def test_only_the_newest_are_kept_and_latest_names_one(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path / "c", step, keep=2)
    names = [folder.name for folder in layout.list_checkpoints(tmp_path / "c")]
    assert names == ["step-00000003", "step-00000002"]
    assert (tmp_path / "c" / layout.LATEST).read_text() == "step-00000003"


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, 0, 1) is None


def test_a_gap_between_chunks_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("c").mkdir()
    writer = Writer(tmp_path / "c", 0, 1, 9, False, token=7)
    writer.save(1, fragments(2, 1), STATE)  # the second half alone
    assert not layout.list_checkpoints(tmp_path / "c")


def test_state_and_whole_tensors_read_back(tmp_path: Path) -> None:
    save(tmp_path / "c")
    folder = layout.folder_of(tmp_path / "c", 3)
    assert layout.read_state(folder) == STATE | {"format": layout.FORMAT}
    assert json.loads((folder / "index.json").read_text())["momentum.w"]["shape"] == [5, 3]
    assert ChunkReader(folder).read_tensor("momentum.w").shape == (5, 3)


@pytest.mark.parametrize(
    ("state", "version"),
    [
        ({"versions": {"cmtmae_scale": "0.1.0"}}, "0.1.0"),
        ({"format": 3, "versions": {"cmtmae_scale": "9.0"}}, "9.0"),
        ({}, "of an unknown version"),
    ],
)
def test_another_format_is_refused_with_the_version_that_wrote_it(
    tmp_path: Path, state: dict[str, Any], version: str
) -> None:
    (tmp_path / layout.STATE).write_text(json.dumps(state))
    with pytest.raises(CheckpointError) as raised:
        layout.read_state(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path} was written by cmtmae_scale {version}, whose checkpoints this version does "
        "not read; finish the run with that version, or export its encoder with that version and "
        "start a new run with student.init_weights=FILE"
    )
    assert raised.value.exit_code == EXIT_CONFIG


def test_folders_are_ordered_by_step_and_other_names_do_not_count(tmp_path: Path) -> None:
    names = ["step-99999999", "step-100000000", "step-00000002"]
    for name in [*names, "step-2", "step-00000003.bak", "step-000000004", "best"]:
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000009").write_text("a file")
    found = [folder.name for folder in layout.list_checkpoints(tmp_path)]
    assert found == ["step-100000000", "step-99999999", "step-00000002"]


def test_a_fallback_never_deletes_what_it_has_just_written(tmp_path: Path) -> None:
    root = tmp_path / "c"
    save(root, 4)
    (save(root, 6) / layout.MANIFEST).unlink()
    assert find_checkpoint(root, 0, 1) == layout.folder_of(root, 4)
    save(root, 5, keep=1)
    assert find_checkpoint(root, 0, 1) == layout.folder_of(root, 5)


def test_only_drafts_are_a_fresh_start_but_lost_checkpoints_are_not(tmp_path: Path) -> None:
    (tmp_path / ".draft-00000001-0000000000000007-1").mkdir()
    assert find_checkpoint(tmp_path, 0, 1) is None
    folder = save(tmp_path, 1)
    folder.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="latest names a checkpoint, but there is none"):
        find_checkpoint(tmp_path, 0, 1)


def test_a_linked_run_folder_and_a_linked_checkpoint_work(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    root = tmp_path / "link" / "checkpoints"
    save(root, 1)
    layout.folder_of(root, 1).rename(tmp_path / "store")
    layout.folder_of(root, 1).symlink_to(tmp_path / "store")
    assert find_checkpoint(root, 0, 1) == layout.folder_of(root, 1)
    save(root, 2, keep=1)
    assert layout.list_checkpoints(root) == [layout.folder_of(root, 2)]
    assert (tmp_path / "store" / layout.MANIFEST).exists()


def test_the_stream_writes_what_the_library_would(tmp_path: Path) -> None:
    tensors = {"a": torch.rand(3, 2), "b": torch.rand(5), "scalar": torch.tensor(1.5)}
    entries = [Entry(name, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()]
    facts = write_tensors(tmp_path / "x", entries, {"format": "pt"})
    assert facts == {"size": (tmp_path / "x").stat().st_size, "sha256": digest(tmp_path / "x")}
    back = load_file(tmp_path / "x")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="a has 6 values"):
        write_tensors(tmp_path / "y", [Entry("a", (2, 2), lambda: tensors["a"])], {})
