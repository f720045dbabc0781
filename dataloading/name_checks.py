"""Detect data sets that are not as intended by names of folders, tars and labels."""

import itertools
import re
from collections.abc import Collection, Iterable

_TRAIN = frozenset({"train", "training", "trainset", "traindata", "trainval"})
_TEST = frozenset(
    {"val", "valid", "validation", "valset", "valdata", "test", "testing", "testset", "testdata"}
    | {"eval", "evaluation", "dev", "holdout"}
)
_MAX_NAMES = 8  # among more names, some classes happen to have such a word


def find_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first training name and the first test name; ``None`` unless there are both.

    Words of a name decide: ``val2017``, ``TestImages`` and ``ILSVRC2012_img_val`` are test sets.
    """
    distinct = sorted(set(names))
    if len(distinct) > _MAX_NAMES:
        return None
    words = {
        name: {
            word
            for text in (name, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name))
            for word in re.findall(r"[a-z]+", text.lower())
        }
        for name in distinct
    }
    train = next((name for name in distinct if words[name] & _TRAIN), None)
    test = next((name for name in distinct if words[name] & _TEST and name != train), None)
    return None if train is None or test is None else (train, test)


def find_split_folders(folders: Collection[tuple[str, ...]]) -> tuple[str, str] | None:
    """Return the folders of a training and of a test set, below what all have in common.

    Args:
        folders: folders that hold images, as their parts from the root on.

    Returns:
        Two paths from the root with ``/``, or ``*/train`` and ``*/val`` where every class has both;
        ``None`` unless there are both.
    """
    if not folders:
        return None
    pairs = itertools.takewhile(
        lambda pair: pair[0] == pair[1], zip(min(folders), max(folders), strict=False)
    )
    common = tuple(part for part, _ in pairs)
    below = {folder[len(common) :] for folder in folders}
    splits = find_splits(parts[0] for parts in below if parts)
    if splits is None and all(len(parts) != 1 for parts in below):
        splits = find_splits(parts[1] for parts in below if parts)
        common = (*common, "*")
    if splits is None:
        return None
    return "/".join((*common, splits[0])), "/".join((*common, splits[1]))


def find_equal_labels(labels: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two labels that are the same integer, such as ``7`` and ``007``."""
    found: dict[int, str] = {}
    for label in labels:
        number = as_integer(label)
        if number is not None and found.setdefault(number, label) != label:
            return found[number], label
    return None


def as_integer(label: str) -> int | None:
    """Return the integer of a label such as ``007``, ``+7`` or ``7.0``, else ``None``."""
    found = re.fullmatch(r"([+-]?[0-9]{1,18})(?:\.0*)?", label)
    return int(found[1]) if found else None
