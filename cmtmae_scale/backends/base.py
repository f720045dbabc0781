"""The protocol between the engine and a backend, and the values that they exchange."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cmtmae_scale.config.schema import Backend as BackendSettings


class Work(Protocol):
    """Inputs of one forward and backward, on the device."""

    @property
    def inputs(self) -> tuple[Any, ...]:
        """Arguments of the model; first the images, ``[B, 3, S, S]`` float32."""
        ...

    @property
    def valid(self) -> Tensor:
        """Rows that count in the loss, bool ``[R]``."""
        ...


Terms = dict[str, Tensor]
"""Losses by name, 0-dim float32 sums over rows; ``total`` is the one to differentiate."""

Objective = Callable[[Any, Any], Terms]
"""Computes the losses from the model's output and the work."""


class Fragment(NamedTuple):
    """This rank's range of one flattened tensor: a parameter, a moment or EMA weights."""

    offset: int
    """First element."""
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    local: Tensor
    """The values: a 1-D float32 view of live memory."""
    owner: bool
    """Whether this rank writes the values to a checkpoint; replicas do not."""
    copies: dist.ProcessGroup | None = None
    """The ranks that hold the same range, this one among them; ``None``: this rank alone."""


class Outcome(NamedTuple):
    """Result of an optimizer step."""

    grad_norm: float
    """Global norm before clipping."""
    applied: bool
    """False if the step was refused and changed nothing."""
    report: list[float]
    """The engine's vector, summed over ranks."""


Accept = Callable[[list[float]], bool]
"""Decides, from the report summed over ranks, whether a step is applied."""

Meanwhile = Callable[[], None]
"""Enqueues work that does not depend on the update of the step."""


class Blocked(Protocol):
    """A model whose blocks are wrapped, gathered or compiled one by one."""

    def transformer_blocks(self) -> list[nn.Module]:
        """Return the blocks in the order of the forward."""
        ...


class Backend(Protocol):
    """One way to compute, reduce and apply a step."""

    def micro(self, batch: Work, last: bool) -> Terms:
        """Run forward and backward; gradients are reduced after the ``last`` micro-step."""
        ...

    def step(
        self,
        lr: float,
        report: Tensor,
        accept: Accept | None = None,
        meanwhile: Meanwhile | None = None,
    ) -> Outcome:
        """Clip the gradients, test them, and update the weights; the step's only host read.

        Args:
            lr: learning rate; each parameter's is this times its ``lr_scale``.
            report: 1-D float32 vector, summed over ranks and returned; a non-finite entry prevents
                the update like a non-finite gradient.
            accept: decides on finite steps; must return the same on every rank. ``None`` accepts
                all.
            meanwhile: called once before the host waits for the sums, so that the device has work
                while the host decides and enqueues the update; must not use the weights.
        """
        ...

    def discard(self) -> None:
        """Drop gradients accumulated without a step."""
        ...

    def momentum_update(self, momentum: float) -> None:
        """Update the EMA weights from the fp32 weights: ``m * old + (1 - m) * new``."""
        ...

    def momentum_forward(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return the momentum encoder's features ``[B, N(+1), D]`` and attention ``[B, N]``."""
        ...

    def fragments(self) -> dict[str, Fragment]:
        """Return weights, both moments and EMA weights by name, as views of live memory."""
        ...

    def after_load(self, step: int) -> None:
        """Renew derived values after values were written to ``fragments()``.

        Args:
            step: number of applied optimizer steps (AdamW's counter).
        """
        ...

    def close(self) -> None:
        """Release resources."""
        ...


def detached(terms: Terms) -> Terms:
    """Return the losses without their graph."""
    return {name: term.detach() for name, term in terms.items()}


def compile_blocks(module: nn.Module, settings: BackendSettings) -> None:
    """Compile each block of a module if ``backend.compile`` is set; call before sharding."""
    if settings.compile:
        for block in cast(Blocked, module).transformer_blocks():
            block.compile(dynamic=False)


def compute_dtype(settings: BackendSettings) -> torch.dtype:
    """Return the dtype of forward and backward."""
    return torch.bfloat16 if settings.precision == "bf16" else torch.float32


def start_read(values: Tensor) -> Callable[[], list[float]]:
    """Start to copy a vector to the host; the returned function waits for it and returns it.

    On a GPU it waits for the copy alone, and not for work that is enqueued afterwards.
    """
    if values.device.type != "cuda":
        return values.tolist
    copy = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    copy.copy_(values, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return copy.tolist()

    return read


def acceptable(grad_norm: float, report: list[float], accept: Accept | None) -> bool:
    """Return whether a step is applied: all values are finite, and ``accept`` agrees."""
    finite = all(abs(value) < float("inf") for value in [grad_norm, *report])
    return finite and (accept is None or accept(report))
