"""What a device could do at most: the denominators of MFU."""

import torch

from cmtmae_scale.tools.benchmark.clock import Stopwatch, seconds

DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 operations a second of the SXM modules, by a word of the device's name."""


def peaks(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations a second by name of the denominator.

    Args:
        device: what is measured.
        dtype: type of the matrix product.

    Returns:
        The rate of a large matrix product measured here (a CPU-second on a CPU), and, for bf16 on
        a known GPU, the datasheet's.
    """
    found = {f"{str(dtype).removeprefix('torch.')} matrix product here": product(device, dtype)}
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        found |= {f"datasheet {word}": rate for word, rate in DATASHEET.items() if word in name}
    return found


def product(device: torch.device, dtype: torch.dtype) -> float:
    """Best of several products of square matrices, operations a second."""
    side, repeats = (8192, 20) if device.type == "cuda" else (1024, 4)
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
    watch = Stopwatch(device)
    rates: list[float] = []
    for _ in range(5):
        start = watch.mark()
        for _ in range(repeats):
            torch.mm(a, b)
        end = watch.mark()
        watch.collect()
        rates.append(repeats * 2 * side**3 / max(seconds(start, end), 1e-9))
    return max(rates)
