import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmtmae_scale.backends.base import Fragment
from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import ChunkReader, load_fragments
from cmtmae_scale.checkpoint.find import find_checkpoint
from cmtmae_scale.checkpoint.writer import Writer
from cmtmae_scale.errors import CheckpointError

SHAPES = {"model.encoder.w": (5, 3), "model.decoder.b": (7,), "momentum.w": (5, 3)}
STATE = {"progress": {"step": 3}}


def values(key: str) -> torch.Tensor:
    shape = SHAPES[key]
    return torch.arange(float(np.prod(shape))) + len(key)


def fragments(parts: int, part: int, fill: bool = True) -> dict[str, Fragment]:
    found = {}
    for key, shape in SHAPES.items():
        whole = values(key)
        size = -(-len(whole) // parts)
        low = min(part * size, len(whole))
        local = whole[low : low + size].clone()
        found[key] = Fragment(low, shape, local if fill else torch.zeros_like(local), True)
    return found


def save(root: Path, step: int = 3, keep: int = 9, background: bool = False) -> Writer:
    root.mkdir(exist_ok=True)
    writer = Writer(root, 0, 1, keep, background, token=7)
    assert writer.save(step, fragments(1, 0), STATE)
    writer.settle()
    return writer


def save_in_two(root: Path, step: int) -> Path:
    """Two ranks' parts, written one after the other by one process."""
    root.mkdir(exist_ok=True)
    for rank in (1, 0):
        writer = Writer(root, rank, 2, 9, False, token=7)
        writer.save(step, fragments(2, rank), STATE)
    return layout.folder_of(root, step)


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_just_its_ranges(tmp_path: Path, parts: int) -> None:
    folder = save_in_two(tmp_path / "c", 3)
    for part in range(parts):
        blank = fragments(parts, part, fill=False)
        load_fragments(folder, blank)
        for key, want in fragments(parts, part).items():
            assert torch.equal(blank[key].local, want.local)


def test_the_encoder_stands_beside_under_timm_names(tmp_path: Path) -> None:
    folder = save_in_two(tmp_path / "c", 3)
    encoder = load_file(folder / layout.ENCODER)
    assert list(encoder) == ["w"]
    assert torch.equal(encoder["w"], values("model.encoder.w").reshape(5, 3))


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    folder = save_in_two(tmp_path / "c", 3)
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
    names = [folder.name for folder in layout.candidates(tmp_path / "c")]
    assert names == ["step-00000003", "step-00000002"]
    assert (tmp_path / "c" / layout.LATEST).read_text() == "step-00000003"


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    save(tmp_path / "c")
    folder = layout.folder_of(tmp_path / "c", 3)
    assert layout.fault(folder) is None
    generator = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        original = path.read_bytes()
        for _ in range(20):
            changed = bytearray(original)
            changed[generator.integers(len(changed))] ^= 1 << generator.integers(8)
            path.write_bytes(changed)
            if path.name != layout.MANIFEST:
                assert layout.fault(folder) is not None, path
        path.write_bytes(original)


@pytest.mark.parametrize("damage", ["absent", "truncated", "no manifest", "empty manifest"])
def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "c"
    save(root, 1)
    save(root, 2)
    broken = layout.folder_of(root, 2)
    part = broken / layout.rank_file(0)
    if damage == "absent":
        part.unlink()
    elif damage == "truncated":
        part.write_bytes(part.read_bytes()[:-1])
    elif damage == "no manifest":
        (broken / layout.MANIFEST).unlink()
    else:
        (broken / layout.MANIFEST).write_text("")
    assert find_checkpoint(root, 0, 1) == layout.folder_of(root, 1)
    assert f"BROKEN CHECKPOINT {broken}" in caplog.text
    (layout.folder_of(root, 1) / layout.MANIFEST).write_text("[]")
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is intact"):
        find_checkpoint(root, 0, 1)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, 0, 1) is None


def test_an_interrupted_save_leaves_nothing_that_counts(tmp_path: Path) -> None:
    root = tmp_path / "c"
    save(root, 1)
    writer = Writer(root, 1, 2, 9, False, token=8)
    writer.save(2, fragments(2, 1), STATE)
    assert list(root.glob(".draft-*"))
    assert find_checkpoint(root, 0, 1) == layout.folder_of(root, 1)
    layout.sweep(root)
    assert not list(root.glob(".draft-*"))


def test_a_part_that_does_not_arrive_is_reported_and_the_run_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tmp_path.joinpath("c").mkdir()
    writer = Writer(tmp_path / "c", 0, 2, 9, True, token=7)
    writer.timeout_s = 0.1
    assert writer.save(1, fragments(2, 0), STATE)
    writer.settle()
    assert "rank-00001.safetensors did not arrive" in caplog.text
    assert not layout.candidates(tmp_path / "c")


def test_a_store_that_refuses_does_not_end_the_run_but_the_last_save_must_succeed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "c"
    root.write_text("a file where a folder should be")
    writer = Writer(root, 0, 1, 9, True, token=7)
    writer.save(1, fragments(1, 0), STATE)
    writer.settle()
    assert "could not be written" in caplog.text
    with pytest.raises(CheckpointError, match="step 2 could not be saved"):
        writer.finish(2, fragments(1, 0), STATE)


def test_finish_does_not_save_twice(tmp_path: Path) -> None:
    writer = save(tmp_path / "c", 3, background=True)
    before = (layout.folder_of(tmp_path / "c", 3) / layout.MANIFEST).stat().st_mtime_ns
    writer.finish(3, fragments(1, 0), STATE)
    assert (layout.folder_of(tmp_path / "c", 3) / layout.MANIFEST).stat().st_mtime_ns == before


def test_a_gap_between_chunks_is_refused(tmp_path: Path) -> None:
    tmp_path.joinpath("c").mkdir()
    writer = Writer(tmp_path / "c", 0, 1, 9, False, token=7)
    writer.save(1, fragments(2, 1), STATE)
    assert not layout.candidates(tmp_path / "c")


def test_state_and_whole_tensors_read_back(tmp_path: Path) -> None:
    save(tmp_path / "c")
    folder = layout.folder_of(tmp_path / "c", 3)
    assert layout.read_state(folder) == STATE
    assert json.loads((folder / "index.json").read_text())["momentum.w"]["shape"] == [5, 3]
    assert ChunkReader(folder).read_whole("momentum.w").shape == (5, 3)
