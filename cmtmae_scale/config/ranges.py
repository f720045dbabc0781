"""Fields of a schema with the range of their values in the metadata, for ``check_ranges``."""

from collections.abc import Iterator
from dataclasses import MISSING as NO_FACTORY
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, NamedTuple


class Range(NamedTuple):
    """Legal values of a number; of a tuple, of each of its numbers."""

    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    ascending: bool = False
    """Whether the numbers of a tuple must not decrease."""

    def allows(self, value: float) -> bool:
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        low, high = self.at_least, self.at_most
        if high is None and self.below is None:
            return "must not be negative" if low == 0 else f"must be above {self.above:g}"
        left = f"({self.above:g}" if low is None else f"[{low:g}"
        right = f"{self.below:g})" if high is None else f"{high:g}]"
        return f"must lie in {left}, {right}"


def bounded(
    default: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    ascending: bool = False,
) -> Any:
    """Return a field whose value, unless it is ``None``, lies in a range."""
    legal = Range(above, at_least, at_most, below, ascending)
    return field(default=default, metadata={"range": legal})


def positive(default: Any) -> Any:
    """Return a field whose value is above 0."""
    return bounded(default, above=0)


def non_negative(default: Any) -> Any:
    """Return a field whose value is at least 0."""
    return bounded(default, at_least=0)


def fraction(default: Any) -> Any:
    """Return a field whose value lies in [0, 1]."""
    return bounded(default, at_least=0, at_most=1)


def blocks() -> Any:
    """Return a field that lists transformer blocks, at least one; the last one by default."""
    remedy = "give at least one block, such as [-1]"
    return field(default_factory=lambda: [-1], metadata={"empty": remedy})


def given_blocks() -> Any:
    """Return a field that lists transformer blocks, at least one, or is ``None``."""
    return field(default=None, metadata={"empty": "give at least one block, or null"})


def step_range() -> Any:
    """Return a field that holds a first and a last step, or nothing."""
    return field(default_factory=list[int], metadata={"range": Range(above=0, ascending=True)})


def scheduled(**default: Any) -> Any:
    """Return a field that is a number in [0, 1] or the fields of a ``Schedule``."""
    legal = Range(at_least=0, at_most=1)
    return field(default_factory=lambda: dict(default), metadata={"range": legal, "schedule": True})


def walk_fields(schema: Any, prefix: str = "") -> Iterator[tuple[str, "Field[Any]"]]:
    """Yield every key of a config, as ``group.key``, with its field."""
    for one in fields(schema):
        group = None if one.default_factory is NO_FACTORY else one.default_factory()
        if is_dataclass(group):
            yield from walk_fields(group, f"{prefix}{one.name}.")
        else:
            yield f"{prefix}{one.name}", one
