"""Names of folders, tars and labels that show a data set to be other than it was meant."""

import re
from collections.abc import Iterable

_TRAIN = frozenset({"train", "training", "trainset", "traindata"})
_TEST = frozenset({"val", "valid", "validation", "valset", "test", "testing", "testset", "eval"})
_MAX_NAMES = 8  # of more, some are classes whose names happen to have such a word


def find_splits(names: Iterable[str]) -> tuple[str, str] | None:
    """Return the first training name and the first test name; ``None`` unless there are both.

    Of a name its words count: ``val2017`` and ``ILSVRC2012_img_val`` are test sets.
    """
    distinct = sorted(set(names))
    if len(distinct) > _MAX_NAMES:
        return None
    words = {name: set(re.findall(r"[a-z]+", name.lower())) for name in distinct}
    train = next((name for name in distinct if words[name] & _TRAIN), None)
    test = next((name for name in distinct if words[name] & _TEST and name != train), None)
    return None if train is None or test is None else (train, test)


def find_equal_labels(labels: Iterable[str]) -> tuple[str, str] | None:
    """Return the first two labels that are the same integer, such as ``7`` and ``007``."""
    found: dict[int, str] = {}
    for label in labels:
        number = as_integer(label)
        if number is not None and found.setdefault(number, label) != label:
            return found[number], label
    return None


def as_integer(label: str) -> int | None:
    """Return the number that a label is; ``None`` for other texts."""
    return int(label) if re.fullmatch(r"-?[0-9]{1,18}", label) else None
