"""All ranks train the same run: differences are named before anything is built."""

import errno
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from cmtmae_scale.engine import agreement
from cmtmae_scale.engine.agreement import (
    MOST_NAMED,
    find_differences,
    find_unshared,
    name_ranks,
    require_shared,
    source_digest,
)
from cmtmae_scale.errors import EXIT_CONFIG, EXIT_CRASH, EXIT_STOPPED, ConfigError, StorageError
from cmtmae_scale.runtime.shared_index import identify_place
from dataloading.exchange import index_from_bytes, index_to_bytes
from dataloading.index import build_index
from tests.engine.agreement_case import (
    exchange,
    launch_each,
    launch_on_a_failing_store,
    launch_on_nodes,
    open_closed_images,
)
from tests.engine.run_case import make_photographs, write_recipe
from tests.processes import run_ranks

OVERRIDES = {
    "optimizer.base_lr=0.031": "optimizer.base_lr: 0.03 on rank 0, 0.031 on rank 1; ",
    "run.seed=5": "run.seed: 0 on rank 0, 5 on rank 1; ",
    "views.crop_scale=[0.3, 1.0]": "views.crop_scale: [0.2, 1.0] on rank 0, [0.3, 1.0] on rank 1; ",
    "train.steps=3": "train.steps: 6 on rank 0, 3 on rank 1; ",
}


@pytest.mark.gloo
def test_ranks_that_differ_leave_with_78_and_name_key_and_values(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, depth=2)
    fewer = make_photographs(tmp_path / "fewer", 20)
    next(fewer.rglob("*.jpg")).unlink()
    (tmp_path / "elsewhere").mkdir()
    cases = [
        ("overrides", [*OVERRIDES]),
        ("versions", ["9.9", "2.7.18"]),
        ("variable", "0"),
        ("index", str(fewer)),
        ("index", str(tmp_path / "absent")),
        ("teacher", "t.safetensors: there is no such file"),
        ("initial weights", "s.safetensors: there is no such file"),
        ("stream", "data.store_cache=/local/pieces: its file system has room for 0.1 GB"),
        ("folder", str(tmp_path / "elsewhere")),
    ]
    previous = Path.cwd()
    os.chdir(tmp_path)
    try:
        first, second = run_ranks(2, launch_each, recipe, cases)
    finally:
        os.chdir(previous)
    assert [code for code, _ in first + second] == [EXIT_CONFIG] * 2 * len(cases)
    expected = [
        [*OVERRIDES.values()],
        ['on rank 0, "9.9" on rank 1; ', 'on rank 0, "2.7.18" on rank 1; '],
        ['NVIDIA_TF32_OVERRIDE: null on rank 0, "0" on rank 1; '],
        ["fewer: names or sizes of the 19 files on host "],
        ["absent"],
        ["t.safetensors: there is no such file"],
        ["s.safetensors: there is no such file"],
        ["data.store_cache=/local/pieces: its file system has room for 0.1 GB"],
        ["run.output_dir=relative is not shared: a file that rank 0 on host "],
    ]
    for (_, mine), (_, other), texts in zip(first, second, expected, strict=True):
        assert all(text in mine and text in other for text in texts), (mine, other)
    assert "is not visible to rank 1 on host" in first[-1][1]
    assert not (tmp_path / "run" / "log.jsonl").exists()


@pytest.mark.gloo
def test_nodes_that_hybrid_cannot_shard_within_are_refused_on_every_rank(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, depth=2)
    unequal, mixed = [(0, 2), (1, 2), (0, 1), (0, 1)], [(0, 2), (0, 2), (1, 2), (1, 2)]
    texts = {
        "ranks on the node: 2 on ranks 0, 1, 1 on ranks 2, 3; backend.sharding=hybrid": unequal,
        "the ranks of a node are not consecutive": mixed,
        "": [(0, 2), (1, 2), (0, 2), (1, 2)],
    }
    for text, places in texts.items():
        found = run_ranks(4, launch_on_nodes, recipe, "hybrid", places)
        assert len({*found}) == 1
        assert text in found[0]
        assert bool(text) == bool(found[0])
    assert run_ranks(4, launch_on_nodes, recipe, "full", unequal) == [""] * 4


@pytest.mark.gloo
def test_a_store_that_fails_for_rank_0_is_known_to_all(tmp_path: Path) -> None:
    found = run_ranks(2, launch_on_a_failing_store, tmp_path)
    text = "75 Input/output error; see that the storage works and try the same command again"
    assert found == [["16", text], ["16", text]]


@pytest.mark.gloo
def test_bytes_failures_and_weights_are_compared_over_ranks() -> None:
    results = run_ranks(3, exchange)
    for rank, (gathered, empty, sent, own, failure, crash, unread, weights) in enumerate(results):
        assert gathered == [b"", b"\0", b"\0\0"] and empty == [b""] * 3
        assert (sent, own) == (b"\x80\0x", rank)
        assert failure == (EXIT_CONFIG, "gone" if rank == 1 else "rank 1: gone")
        told = "no such thing" if rank == 2 else "rank 2: TypeError: no such thing"
        assert crash == (EXIT_CRASH, told)
        assert unread == (EXIT_STOPPED, "not now")
        assert 'digest: "abc" on ranks 0, 1, "other" on rank 2; ' in weights


def test_every_value_is_named_with_its_ranks() -> None:
    everyone = [{"a": 1, "b": None}, {"a": 1, "b": None}, {"a": float("nan")}]
    assert find_differences(everyone) == [
        "a: 1 on ranks 0, 1, NaN on rank 2",
        "b: null on ranks 0, 1, absent on rank 2",
    ]
    assert find_differences([{"a": float("nan")}] * 2) == []
    many = find_differences([{"a": rank} for rank in range(100)])
    assert len(many) == 1 and many[0].count(" on rank ") == MOST_NAMED
    assert many[0].endswith("other values")
    assert name_ranks(range(100)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7 and 92 more"


def test_checkpoints_that_link_to_other_storage_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agreement, "SHARED_WAIT_S", 0.0)
    (tmp_path / "own").mkdir()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "own")
    (tmp_path / "token").touch()
    folders = [tmp_path, tmp_path / "checkpoints"]
    assert find_unshared(folders, "token") == str(tmp_path / "checkpoints")
    (tmp_path / "own" / "token").touch()
    assert find_unshared(folders, "token") is None


def test_a_store_that_fails_is_not_called_unshared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has lost its mount may see the folder at the next launch."""
    monkeypatch.setattr(agreement, "SHARED_WAIT_S", 0.0)
    for number, error in ((errno.ESTALE, StorageError), (errno.EACCES, ConfigError)):
        fails = mock.Mock(side_effect=OSError(number, os.strerror(number)))
        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(os, "listdir", fails)
            require_shared(tmp_path, 0)


@pytest.mark.gloo
def test_images_that_one_rank_may_not_look_up_are_named_on_every_rank(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path / "images", 4)
    for code, text in run_ranks(2, open_closed_images, folder, tmp_path / "index"):
        assert code == EXIT_CONFIG
        assert f"{folder}: cannot be looked up (Permission denied)" in text


def test_the_place_of_a_long_list_of_tars_is_their_folder(tmp_path: Path) -> None:
    names = ",".join(f"train-{number:06d}" for number in range(40))
    assert identify_place(tmp_path / f"{{{names}}}.tar") == identify_place(tmp_path)


def test_the_digest_of_the_code_is_that_of_every_file() -> None:
    assert source_digest() == source_digest()
    assert len(source_digest()) == 64


def test_an_index_survives_the_exchange_without_a_pickle(tmp_path: Path) -> None:
    folder = make_photographs(tmp_path / "images", 4)
    (folder / "class0" / os.fsdecode(b"caf\xe9.jpg")).write_bytes(
        (folder / "class0" / "000.jpg").read_bytes()
    )
    (folder / "broken.jpg").write_text("no image")
    index = build_index(folder)
    data = index_to_bytes(index)
    again = index_from_bytes(data)
    assert b"\x80\x04" not in data[: data.index(b"\n")]
    assert list(again.names) == list(index.names) and len(again) == 5
    assert np.array_equal(again.entries, index.entries)
    assert (again.root, again.source, again.labels, again.excluded, again.digest, again.shards) == (
        *(index.root, index.source, index.labels, index.excluded, index.digest, index.shards),
    )
    with pytest.raises(ValueError, match="."):  # noqa: RUF043
        index_from_bytes(b"[\x80\x04.\n")
