"""The cost of a checkpoint does not grow with the number of ranks that own nothing."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cmtmae_scale.checkpoint import encoder_copy, layout, tensor_file
from cmtmae_scale.checkpoint.chunks import load_fragments
from cmtmae_scale.checkpoint.encoder_copy import copy_encoder_apart
from cmtmae_scale.checkpoint.index import INDEX, Span, rank_file
from cmtmae_scale.checkpoint.shards import ENCODERS, Shard, build_index, hash_shapes, write_encoder
from cmtmae_scale.errors import CheckpointError
from tests.checkpoint.owner_case import (
    find_where_one_rank_cannot_list,
    load_counted,
    save_and_verify,
)
from tests.checkpoint.save_case import fragments, save, values
from tests.checkpoint.test_foreign import change
from tests.processes import run_ranks

METADATA = {"format": "pt"}


@pytest.mark.gloo
def test_owners_write_and_rank_0_verifies_for_all(tmp_path: Path) -> None:
    first, second, third = run_ranks(3, save_and_verify, tmp_path)
    assert rank_file(0) in str(first[0])
    assert second[0] == third[0] == []  # neither a shard nor a mark, and no folder
    for _, _, names, _ in (first, second, third):
        assert names == ["step-00000002", "step-00000001"]
    assert first[3] == 3 and second[3] == third[3] == 0  # whole folders examined
    folder = layout.folder_of(tmp_path / "checkpoints", 1)
    files = layout.load_manifest(folder)
    for rank, names in enumerate((first[1], second[1], third[1])):
        mine = [block.name for block in layout.share_blocks(files, rank, 3)]
        assert names[-len(mine) :] == mine  # each its share of the bytes
        assert not rank or names == mine


@pytest.mark.gloo
def test_a_store_that_cannot_be_listed_is_no_new_run_and_no_hang(tmp_path: Path) -> None:
    """Only rank 0 lists checkpoints; where there are none, every rank searches for ``latest``."""
    save(tmp_path / "c")
    first, second = run_ranks(2, find_where_one_rank_cannot_list, tmp_path / "c", [0, 1])
    assert first[1] == second[1] == "step-00000003"
    assert first[0].startswith("75 ") and "Input/output error" in first[0]
    assert second[0] == first[0]
    shutil.rmtree(tmp_path / "c" / "step-00000003")
    (found, _), (other, _) = run_ranks(2, find_where_one_rank_cannot_list, tmp_path / "c", [1, -1])
    assert found.startswith("75 rank 1: ") and other.startswith("75 ")


@pytest.mark.gloo
def test_what_several_ranks_hold_is_read_once_and_sent_to_the_others(tmp_path: Path) -> None:
    """37 values, of which every rank holds the 7 of a frozen tensor whole."""
    folder = save(tmp_path / "c", ranks=2)
    held_by_shards = {1: 4 * 37, 2: 2 * 37 + 2 * 7, 4: 37 + 3 * 7}  # replicate, hybrid, full
    by_rank = run_ranks(4, load_counted, folder, list(held_by_shards))
    for results, expected in zip(zip(*by_rank, strict=True), held_by_shards.values(), strict=True):
        assert all(is_right for _, _, is_right, _ in results)
        assert sum(held for _, held, _, _ in results) == expected  # was read before
        assert sum(read for read, _, _, _ in results) == 37
        assert max(read for read, _, _, _ in results) <= 15
        for rank, (_, _, _, error) in enumerate(results):
            assert error.endswith(": not there") and error.startswith("rank 1: ") == (rank != 1)


@pytest.mark.parametrize("world_size", [1, 2, 5, 64])
def test_all_ranks_together_verify_each_byte_once_and_equally_many(
    tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)
    folder = save(tmp_path / "c", ranks=2)
    files = layout.load_manifest(folder)
    read: list[tuple[str, int]] = []
    digest, most = layout.digest, 0

    def note(path: Path, offset: int, size: int, report: Any) -> str:
        read.extend((path.name, offset + k) for k in range(size))
        return digest(path, offset, size, report)

    monkeypatch.setattr(layout, "digest", note)
    for rank in range(world_size):
        before = len(read)
        assert layout.find_altered(folder, layout.share_blocks(files, rank, world_size)) is None
        most = max(most, len(read) - before)
    total = sum(facts["size"] for facts in files.values())
    assert len(read) == len(set(read)) == total
    largest = max(block.size for block in layout.list_blocks(files))
    assert most <= total / world_size + largest
    last = folder / rank_file(1)
    data = bytearray(last.read_bytes())
    data[-1] ^= 1
    last.write_bytes(data)
    found = [
        layout.find_altered(folder, layout.share_blocks(files, rank, world_size))
        for rank in range(world_size)
    ]
    assert [text for text in found if text] == [f"{rank_file(1)} differs from its SHA-256"]


def test_a_manifest_with_one_digest_per_file_still_verifies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "BLOCK_BYTES", 64)
    folder = save(tmp_path / "c", ranks=2)
    assert isinstance(layout.load_manifest(folder)[rank_file(1)]["sha256"], list)
    change(folder, layout.STATE, lambda tree: None)  # signs every file as a whole
    assert isinstance(layout.load_manifest(folder)[rank_file(1)]["sha256"], str)
    assert layout.find_damage(folder) is None


def spans_of(rows: int, shards: dict[int, list[tuple[int, int]]]) -> list[Span]:
    """The index of one tensor from offset and length of its chunks by rank."""
    shapes = {"w": (rows,)}
    sealed = {
        rank: Shard(
            {},
            hash_shapes(shapes),
            np.array([(0, *chunk) for chunk in chunks], np.int64).reshape(-1, 3),
        )
        for rank, chunks in shards.items()
    }
    return [Span(*span) for span in build_index(sealed, shapes)["w"]["chunks"]]


@pytest.mark.parametrize("rows", [1, 7, 2048, 4095, 100_000])
def test_the_index_of_a_tensor_does_not_grow_with_the_ranks(rows: int) -> None:
    size = -(-rows // 2048)
    chunks = [(at, min(size, rows - at)) for at in range(0, rows, size)]
    spans = spans_of(rows, {rank: [chunk] for rank, chunk in reversed([*enumerate(chunks)])})
    assert len(spans) <= 2
    want = [(at, rank_file(rank)) for rank, (at, _) in enumerate(chunks)]
    assert [place for span in spans for place in span.overlap(0, rows)] == want
    low, high = rows // 3, rows // 3 + max(1, rows // 5)
    found = [place for span in spans for place in span.overlap(low, high)]
    assert found == [place for place in want if place[0] < high and place[0] + size > low]


def test_chunks_are_joined_in_the_order_of_ranks_alone() -> None:
    apart = [Span(0, 4, rank_file(1)), Span(4, 4, rank_file(0)), Span(8, 4, rank_file(2), 2)]
    assert spans_of(16, {0: [(4, 4)], 1: [(0, 4)], 2: [(8, 4)], 3: [(12, 4)]}) == apart
    own = [Span(0, 4, rank_file(0)), Span(4, 4, rank_file(0))]
    assert spans_of(8, {0: [(0, 4), (4, 4)]}) == own


@pytest.mark.parametrize(
    "chunks",
    [[], [(0, 4)], [(1, 8)], [(0, 4), (5, 4)], [(0, 5), (4, 5)], [(0, 9), (0, 9)], [(0, 10)]],
)
def test_shards_that_do_not_hold_each_value_once_make_no_index(
    chunks: list[tuple[int, int]],
) -> None:
    with pytest.raises(CheckpointError, match="every value of w exactly once; the save"):
        spans_of(9, {0: [], **{rank: [chunk] for rank, chunk in enumerate(chunks)}})


def test_ranks_that_number_other_tensors_make_no_index() -> None:
    shapes = {"a": (4,), "b": (4,)}
    rows = [np.array([(k, 2 * rank, 2) for k in (0, 1)]) for rank in (0, 1)]
    other = {"b": (4,), "a": (4,)}
    shards = {0: Shard({}, hash_shapes(shapes), rows[0]), 1: Shard({}, hash_shapes(other), rows[1])}
    with pytest.raises(CheckpointError, match="rank 1 holds other tensors than rank 0"):
        build_index(shards, shapes)


def test_the_process_that_copies_the_encoder_writes_the_same_file(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", ranks=4)
    write_encoder(folder, tmp_path / "here.safetensors", "student")
    assert (folder / layout.ENCODER).read_bytes() == (tmp_path / "here.safetensors").read_bytes()
    few_files = f"import resource; resource.setrlimit(7, (66, 66)); {encoder_copy.CHILD}"
    with pytest.MonkeyPatch.context() as patch:  # two shards stay open, the others are reopened
        patch.setattr(encoder_copy, "CHILD", few_files)
        copy_encoder_apart(folder, tmp_path / "few.safetensors", ENCODERS["student"], METADATA)
    assert (folder / layout.ENCODER).read_bytes() == (tmp_path / "few.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("import torch", "No module named 'torch'"),
    ],
)
def test_rank_0_copies_the_encoder_itself_where_the_process_fails(
    tmp_path: Path,
    code: str,
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(encoder_copy, "CHILD", code)
    folder = save(tmp_path / "c", ranks=2)
    assert reason in caplog.text and "rank 0 copies it" in caplog.text
    assert torch.equal(load_file(folder / layout.ENCODER)["w"].view(-1), values("model.encoder.w"))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    save(tmp_path / "d", ranks=2)
    assert "No such file" in caplog.messages[-1]


def test_a_copy_of_the_encoder_that_the_store_or_a_shard_refuses(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", ranks=2)
    prefix = ENCODERS["student"]
    with pytest.raises(FileNotFoundError) as raised:
        copy_encoder_apart(folder, tmp_path / "no" / "x", prefix, METADATA)
    assert raised.value.filename == str(tmp_path / "no" / "x")
    (folder / rank_file(1)).write_bytes((folder / rank_file(0)).read_bytes())
    with pytest.raises(CheckpointError, match=r"model\.encoder\.w@8"):
        copy_encoder_apart(folder, tmp_path / "x", prefix, METADATA)


def test_an_index_with_one_entry_per_chunk_still_loads(tmp_path: Path) -> None:
    folder = save(tmp_path / "c", ranks=4)
    key, written = "momentum.w", json.loads((folder / INDEX).read_text())
    assert written[key]["chunks"] == [[0, 4, rank_file(0), 3], [12, 3, rank_file(3)]]
    one_by_one = [[4 * rank, min(4, 15 - 4 * rank), rank_file(rank)] for rank in range(4)]
    change(folder, INDEX, lambda tree: tree[key].update(chunks=one_by_one))
    assert layout.find_damage(folder) is None
    for part in range(3):
        blank = fragments(3, part, fill=False)
        load_fragments(folder, blank)
        low = blank[key].offset
        want = values(key)[low : low + len(blank[key].local)]
        assert torch.equal(blank[key].local, want)
