"""GPUs by name, with the rates of their data sheets; imports no torch."""

import difflib
from typing import NamedTuple

from cmtmae_scale.errors import ConfigError

RESERVE = 0.08
"""Fraction of the memory for the CUDA context, NCCL's buffers and fragmentation; assumed."""


class Device(NamedTuple):
    """A GPU as its vendor's data sheet states it."""

    name: str
    bf16_flops_s: float
    """FLOP/s of dense matrix products in bf16."""
    fp32_flops_s: float
    """FLOP/s in float32, without TF32."""
    memory_bytes: float
    memory_bytes_s: float
    link_bytes_s: float
    """Bytes per second to the other GPUs of a node, per direction."""
    source: str

    @property
    def usable_bytes(self) -> float:
        """Memory that a run may use."""
        return (1 - RESERVE) * self.memory_bytes


KNOWN = (
    Device("a100", 312e12, 19.5e12, 80e9, 2.039e12, 300e9, "NVIDIA A100 80GB SXM data sheet"),
    Device("a100-40gb", 312e12, 19.5e12, 40e9, 1.555e12, 300e9, "NVIDIA A100 40GB SXM data sheet"),
    Device("b200", 2250e12, 75e12, 180e9, 7.7e12, 900e9, "NVIDIA HGX B200 data sheet, per GPU"),
    Device("h100", 989e12, 67e12, 80e9, 3.35e12, 450e9, "NVIDIA H100 SXM data sheet"),
    Device("h200", 989e12, 67e12, 141e9, 4.8e12, 450e9, "NVIDIA H200 SXM data sheet"),
    Device("l40s", 362e12, 91.6e12, 48e9, 0.864e12, 32e9, "NVIDIA L40S data sheet, PCIe 4.0 x16"),
)
DEVICES = {device.name: device for device in KNOWN}


def find_device(name: str) -> Device:
    """Return the device of a name, in any case.

    Raises:
        ConfigError: for an unknown device; names the nearest.
    """
    device = DEVICES.get(name.lower())
    if device is None:
        near = difflib.get_close_matches(name.lower(), DEVICES, 1, 0.5)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"--device {name}: {hint}The known devices are {', '.join(DEVICES)}")
    return device
