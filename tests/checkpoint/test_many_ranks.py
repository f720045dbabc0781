"""What a checkpoint costs does not grow with the number of ranks that own nothing."""

import json
from pathlib import Path

import pytest
import torch

from cmtmae_scale.checkpoint import layout
from cmtmae_scale.checkpoint.chunks import INDEX, Span, join_chunks, load_fragments, rank_file
from tests.checkpoint.owner_case import save_and_verify
from tests.checkpoint.save_case import fragments, save, values
from tests.checkpoint.test_foreign import change
from tests.processes import run_ranks


@pytest.mark.gloo
def test_owners_write_and_rank_0_verifies_for_all(tmp_path: Path) -> None:
    first, second, third = run_ranks(3, save_and_verify, tmp_path)
    assert rank_file(0) in str(first[0])
    assert second[0] == third[0] == []  # neither a shard nor a mark, and no folder
    for _, _, names, _ in (first, second, third):
        assert names == ["step-00000002", "step-00000001"]
    assert first[3] == 3 and second[3] == third[3] == 0  # whole folders examined
    folder = layout.folder_of(tmp_path / "checkpoints", 1)
    files = sorted({path.name for path in folder.iterdir()} - {layout.MANIFEST})
    assert second[1] == files[1::3] and third[1] == files[2::3]  # each its share of the digests


@pytest.mark.parametrize("rows", [1, 7, 2048, 4095, 100_000])
def test_the_index_of_a_tensor_does_not_grow_with_the_ranks(rows: int) -> None:
    size = -(-rows // 2048)
    chunks = [
        Span(at, min(size, rows - at), rank_file(rank))
        for rank, at in enumerate(range(0, rows, size))
    ]
    spans = join_chunks(reversed(chunks))
    assert len(spans) <= 2
    found = [place for span in spans for place in span.overlap(0, rows)]
    assert found == [(chunk.offset, chunk.file) for chunk in chunks]
    low, high = rows // 3, rows // 3 + max(1, rows // 5)
    found = [place for span in spans for place in span.overlap(low, high)]
    assert found == [(c.offset, c.file) for c in chunks if c.offset < high and c.end > low]


def test_chunks_are_joined_in_the_order_of_ranks_alone() -> None:
    chunks = [Span(0, 4, rank_file(1)), Span(4, 4, rank_file(0)), Span(8, 4, "other.safetensors")]
    assert join_chunks(chunks) == chunks
    apart = [Span(0, 4, rank_file(0)), Span(5, 4, rank_file(1))]
    assert join_chunks(apart) == apart


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
