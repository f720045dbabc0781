"""Whether a CPU multiplies in bf16, or torch emulates it."""

from collections.abc import Mapping
from typing import Any

import torch

BF16_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")
"""Names in ``torch.cpu.get_capabilities()``: two of x86-64, two of ARM64."""


def bf16_instructions(capabilities: Mapping[str, Any]) -> tuple[str, ...]:
    """Return a CPU's instructions for products in bf16; empty: torch emulates bf16."""
    return tuple(name for name in BF16_INSTRUCTIONS if capabilities.get(name))


def emulation_warning(
    device: torch.device, precision: str, capabilities: Mapping[str, Any]
) -> str | None:
    """Return a warning with remedy if the device emulates ``backend.precision``, else ``None``.

    Args:
        device: where the run computes.
        precision: ``backend.precision``.
        capabilities: of the CPU, from ``torch.cpu.get_capabilities()``.
    """
    if device.type != "cpu" or precision != "bf16" or bf16_instructions(capabilities):
        return None
    return (
        "backend.precision=bf16 is emulated: this CPU has no bf16 instructions (amx_bf16, "
        "avx512_bf16), and bf16 takes several times as long as fp32; set backend.precision=fp32"
    )
