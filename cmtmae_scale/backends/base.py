"""What the loop asks of a backend, and the values that pass between them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol, Self, TypeVar

from torch import Tensor, nn


class Work(Protocol):
    """What one forward and backward needs, all on the device."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """What the model is called with; first the images, ``[B, 3, S, S]`` float32."""
        ...

    @property
    def valid(self) -> Tensor:
        """Rows that count in the loss, bool ``[R]``."""
        ...


class Terms(Protocol):
    """A ``NamedTuple`` of 0-dim float32 losses, sums over rows."""

    @property
    def total(self) -> Tensor:
        """The one to differentiate."""
        ...

    def __iter__(self) -> Iterator[Tensor]: ...

    def _replace(self, **terms: Tensor) -> Self: ...

    def _asdict(self) -> dict[str, Tensor]: ...


Objective = Callable[[Any, Any], Terms]
"""From what the model says and the work to the losses."""


class Fragment(NamedTuple):
    """This rank's part of one state of one parameter: a range of its flattened values."""

    offset: int
    """First element."""
    shape: tuple[int, ...]
    """Shape of the whole parameter."""
    local: Tensor
    """The part itself: a 1-D float32 view of live memory."""
    owner: bool
    """Whether this rank writes it (replicas do not)."""


class Outcome(NamedTuple):
    """What came of an optimizer step."""

    grad_norm: float
    """Global norm before clipping."""
    applied: bool
    """False: something was not finite and nothing was changed."""
    report: list[float]
    """The caller's vector, summed over ranks."""


Accept = Callable[[list[float]], bool]
"""Whether a step with such a report, summed over ranks, may be applied."""


class Blocked(Protocol):
    """A model that names the blocks to be wrapped, gathered or compiled one by one."""

    def transformer_blocks(self) -> list[nn.Module]:
        """Blocks in the order of the forward."""
        ...


class Backend(Protocol):
    """One way to compute, reduce and apply a step."""

    def micro(self, batch: Work, last: bool) -> Terms:
        """Forward and backward; ``last`` is the micro-step after which gradients are reduced."""
        ...

    def step(self, lr: float, report: Tensor, accept: Accept | None = None) -> Outcome:
        """Clip, test, update. The one host read of the step.

        Args:
            lr: learning rate in force; a parameter's own is this times its ``lr_scale``.
            report: 1-D float32 vector, summed over ranks and returned; a non-finite entry stops
                the update just as a non-finite gradient does.
            accept: asked, with the summed report, whether a finite step may be applied; must
                answer alike on every rank. ``None``: always.
        """
        ...

    def discard(self) -> None:
        """Drop gradients accumulated without a step."""
        ...

    def momentum_update(self, momentum: float) -> None:
        """Move the momentum student towards the fp32 weights: ``m * old + (1 - m) * new``."""
        ...

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Momentum student's features ``[B, N(+1), D]`` and attention ``[B, N]``; no gradient."""
        ...

    def fragments(self) -> dict[str, Fragment]:
        """Weights, both moments and momentum weights by name, as views of live memory."""
        ...

    def after_load(self, step: int) -> None:
        """Bring everything derived in line after ``fragments()`` was written to.

        Args:
            step: applied optimizer steps so far (AdamW's counter).
        """
        ...

    def close(self) -> None:
        """Release what is held."""
        ...


T = TypeVar("T", bound=Terms)


def detached(terms: T) -> T:
    """The same losses without their graph."""
    return terms._replace(**{name: term.detach() for name, term in terms._asdict().items()})


def acceptable(grad_norm: float, report: list[float], accept: Accept | None) -> bool:
    """Whether a step may be applied: all is finite, and the caller agrees."""
    finite = all(abs(value) < float("inf") for value in [grad_norm, *report])
    return finite and (accept is None or accept(report))
