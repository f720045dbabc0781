"""Checks whether bf16 is slower than float32 on a CPU."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F

BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Names in ``torch.cpu.get_capabilities()``: two of x86-64, two of ARM64."""
SLOWER = 1.2
"""Time of a product in bf16, relative to float32, from which a warning is logged."""
ROWS, WIDTH = 256, 512
ROUNDS = 3


def bf16_instructions(capabilities: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a CPU's instructions for products in bf16; empty: torch emulates bf16."""
    return tuple(name for name in BF16_INSTRUCTIONS if capabilities.get(name))


def slow_bf16_warning(device: torch.device, precision: str) -> str | None:
    """Return a warning with remedy if bf16 is slower than float32 on the device, else ``None``.

    The instructions alone do not show it: with ``avx512_bf16`` but without ``amx_bf16``, a Xeon
    took 1.4 times as long in bf16 (docs/performance.md).

    Args:
        device: where the run computes.
        precision: ``backend.precision``.
    """
    if device.type != "cpu" or precision != "bf16" or (cost := bf16_cost()) < SLOWER:
        return None
    found = ", ".join(bf16_instructions(torch.cpu.get_capabilities()))
    why = f"its bf16 instructions are {found}" if found else "it has no bf16 instructions"
    return (
        f"backend.precision=bf16: a matrix product in bf16 takes {cost:.1f} times as long as in "
        f"fp32 on this CPU ({why}); set backend.precision=fp32"
    )


@torch.no_grad()
def bf16_cost() -> float:
    """Return the time of a matrix product in bf16 on this CPU, relative to float32."""
    products: list[Callable[[], object]] = []
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = (torch.ones(rows, WIDTH, dtype=dtype) for rows in (ROWS, WIDTH))
        products.append(partial(F.linear, x, weight))
        products[-1]()  # a first call prepares the kernel
    times = [[seconds(product) for product in products] for _ in range(ROUNDS)]
    bf16, fp32 = (min(column) for column in zip(*times, strict=True))
    return bf16 / fp32


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
