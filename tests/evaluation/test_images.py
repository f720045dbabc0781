"""Sets of labelled images: labels by name, splits by class, clear refusals."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from cmtmae_scale.evaluation.images import open_pair, open_split, stratified_sample
from dataloading.errors import DataError
from tests.evaluation.evaluation_case import labelled_photographs


def test_labels_of_two_sets_are_matched_by_name(tmp_path: Path) -> None:
    train = labelled_photographs(tmp_path / "train", 9, 0, 4)
    test = labelled_photographs(tmp_path / "test", 8, 1, 4)
    for path in (test / "class1").iterdir():
        path.unlink()
    (test / "class1").rmdir()
    sets = open_pair(str(train), str(test), tmp_path / "kept")
    assert sets.classes == ("class0", "class1", "class2", "class3")
    assert np.bincount(sets.train.labels).tolist() == [3, 2, 2, 2]
    assert np.bincount(sets.test.labels).tolist() == [2, 0, 2, 2]
    for images in (sets.train, sets.test):
        for i, label in zip(images.ids, images.labels, strict=True):
            assert images.index.names[i].startswith(f"class{label}/")
    assert (tmp_path / "kept" / "test-index" / "index.json").is_file()


def test_a_split_takes_a_fraction_of_each_class_and_no_image_twice(tmp_path: Path) -> None:
    sets = open_split(str(labelled_photographs(tmp_path / "all", 31, 0)), 0.7, 5)
    assert not set(sets.train.ids) & set(sets.test.ids)
    assert sorted([*sets.train.ids, *sets.test.ids]) == list(range(31))
    assert np.bincount(sets.train.labels).tolist() == [8, 7, 7]
    assert np.bincount(sets.test.labels).tolist() == [3, 3, 3]
    assert sets.split == "a split of images, not of sources: 70% of each class to train, seed 5"
    again, other = (open_split(str(tmp_path / "all"), 0.7, seed) for seed in (5, 6))
    assert again.test.ids.tolist() == sets.test.ids.tolist() != other.test.ids.tolist()


def test_small_classes_keep_one_image_on_each_side() -> None:
    labels = np.array([0, 1, 1, 2, 2, 2])
    for share in (0.01, 0.5, 0.99):
        chosen = stratified_sample(labels, share, 0)
        assert chosen[0] and chosen[1:3].sum() == 1 and 1 <= chosen[3:].sum() <= 2


def test_unfit_sets_are_refused_with_a_remedy(tmp_path: Path) -> None:
    train = labelled_photographs(tmp_path / "train", 6, 0, 3)
    test = labelled_photographs(tmp_path / "test", 8, 1, 4)
    with pytest.raises(DataError, match=r"the label class3 is not among the 3 of .*train; use two"):
        open_pair(str(train), str(test))
    with pytest.raises(DataError, match=r"images have no label .*; put each into the folder"):
        open_pair(str(train / "class0"), str(train))
    with pytest.raises(DataError, match="all images have one label"):
        alone = tmp_path / "alone"
        alone.mkdir()
        (train / "class2").rename(alone / "class2")
        open_split(str(alone), 0.5, 0)
    with pytest.raises(DataError, match="absent"):
        open_split(str(tmp_path / "absent"), 0.5, 0)
    with pytest.raises(DataError, match="no class has two images"):
        open_split(str(labelled_photographs(tmp_path / "single", 3, 0, 3)), 0.5, 0)


def test_a_test_set_of_one_class_is_named_whatever_its_number(tmp_path: Path, caplog) -> None:
    train = labelled_photographs(tmp_path / "train", 6, 0, 3)
    for number in (0, 2):
        test = tmp_path / f"test{number}"
        test.mkdir()
        shutil.copytree(train / f"class{number}", test / f"class{number}")
        caplog.clear()
        sets = open_pair(str(train), str(test))
        assert sets.test.labels.tolist() == [number, number]
        assert f"all 2 images have the label class{number}, one of 3 classes" in caplog.text
        assert "set eval.test_path" in caplog.text


def test_training_images_as_test_images_are_named(tmp_path: Path, caplog) -> None:
    train = labelled_photographs(tmp_path / "train", 6, 0, 3)
    test = labelled_photographs(tmp_path / "test", 7, 1, 3)
    open_pair(str(train), str(test))
    assert not caplog.text
    for same in (train, shutil.copytree(train, tmp_path / "copy")):
        caplog.clear()
        open_pair(str(train), str(same))
        assert f"{same}: the test images are the training images" in caplog.text


def test_labels_that_differ_in_leading_zeros_are_named(tmp_path: Path) -> None:
    for name, labels in (("train", ("000", "001")), ("test", ("0", "1")), ("both", ("1", "01"))):
        for label in labels:
            source = labelled_photographs(tmp_path / "all", 3, 0, 1) / "class0"
            shutil.copytree(source, tmp_path / name / label)
    train, test, both = (str(tmp_path / name) for name in ("train", "test", "both"))
    with pytest.raises(DataError, match=r"label 0 is not among the 2 .*; write 0 as 000 in both"):
        open_pair(train, test)
    with pytest.raises(DataError, match="labels 01 and 1 are the same number"):
        open_split(both, 0.5, 0)
