"""Class-sorted data are distinguished from shuffled data, whatever their size."""

import logging
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from dataloading.errors import DataError
from dataloading.index import build_index
from dataloading.mixing import class_mixing, expected_labels, require_mixed
from tests.dataloading.tar_case import write_tar


def sorted_labels(classes: int, each: int) -> np.ndarray:
    return np.repeat(np.arange(classes, dtype=np.int32), each)


@pytest.mark.parametrize(
    ("classes", "each"), [(1000, 1300), (1000, 20), (100, 5), (10, 30), (3, 7), (2, 1000), (2, 8)]
)
def test_sorted_and_shuffled_data_are_told_apart(classes: int, each: int) -> None:
    labels = sorted_labels(classes, each)
    found = class_mixing(labels)
    assert found is not None and found.is_sorted, found
    assert str(found).startswith("sorted by class")
    for seed in range(20):
        found = class_mixing(np.random.default_rng(seed).permutation(labels))
        assert found is not None and not found.is_sorted, found
        assert str(found).startswith("shuffled")


def test_shards_of_a_few_classes_each_count_as_sorted() -> None:
    generator = np.random.default_rng(0)
    shards = [generator.permutation(sorted_labels(10, 500)) + 10 * k for k in range(100)]
    found = class_mixing(np.concatenate(shards))
    assert found is not None and found.is_sorted
    assert found.found == pytest.approx(10, abs=0.2)
    assert found.expected == pytest.approx(1000 * (1 - (1 - 1 / 1000) ** 64), abs=0.1)


def test_the_expectation_is_the_mean_over_all_draws() -> None:
    sizes = np.array([1, 2, 4])
    labels = np.repeat(np.arange(3), sizes)
    for draws in range(1, 8):
        counts = [len(set(labels[list(some)])) for some in combinations(range(7), draws)]
        assert expected_labels(sizes, draws) == pytest.approx(np.mean(counts), abs=1e-12)


@pytest.mark.parametrize(
    "labels", [[], [-1, -1, -1], [4, 4, 4], [-1, 2, -1], [0] * 5000 + [1] * 5, list(range(300))]
)
def test_labels_that_cannot_tell_say_nothing(labels: list[int]) -> None:
    assert class_mixing(np.array(labels, dtype=np.int32)) is None


def write_shards(folder: Path, picture, labels: list[str]) -> Path:
    picture(0, 16, 16).save(folder / "one.jpg")
    data = (folder / "one.jpg").read_bytes()
    list_members: list[tuple[str, bytes]] = []
    for number, label in enumerate(labels):
        list_members.append((f"{number:03d}.jpg", data))
        list_members += [(f"{number:03d}.cls", label.encode())] * bool(label)
    write_tar(folder / "tars" / "train-0.tar", list_members)
    return folder / "tars"


def test_sorted_shards_are_refused_unless_forced(tmp_path: Path, picture, caplog) -> None:
    index = build_index(write_shards(tmp_path, picture, ["a"] * 20 + ["b"] * 20))
    with pytest.raises(DataError) as refusal:
        require_mixed(index, on_sorted=False)
    message = str(refusal.value)
    assert f"{tmp_path / 'tars'}: sorted by class: 6 neighbours have 1.2 labels" in message
    for remedy in (
        "cmtmae check-data",
        "--pack",
        "data.shuffle=full",
        "data.window_on_sorted=true",
    ):
        assert remedy in message
    require_mixed(index, on_sorted=True)
    assert "data.window_on_sorted=true allows it" in caplog.text


def test_sorted_folders_are_refused_likewise(photographs: Path) -> None:
    with pytest.raises(DataError, match="photos: sorted by class"):
        require_mixed(build_index(photographs), on_sorted=False)


def test_shuffled_and_unlabelled_shards_are_accepted(tmp_path: Path, picture, caplog) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "one").mkdir()
    require_mixed(build_index(write_shards(tmp_path / "one", picture, ["a", "b"] * 20)), False)
    assert "shuffled: 6 neighbours have 2.0 labels" in caplog.text
    (tmp_path / "two").mkdir()
    require_mixed(build_index(write_shards(tmp_path / "two", picture, [""] * 20)), False)
    assert "no labels that show" in caplog.text
