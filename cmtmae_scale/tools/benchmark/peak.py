"""Peak FLOP/s of a device: the denominators of MFU."""

import torch

from cmtmae_scale.tools.benchmark.clock import Stopwatch, elapsed_s

DATASHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
"""Dense bf16 FLOP/s of the SXM modules, by a word of the device's name."""
REACHED = {"H200": 790e12}
"""bf16 FLOP/s that large matrix products of random numbers reach, measured once."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Return FLOP/s by name of the denominator.

    These are the measured rate of a large matrix product of the dtype (per CPU-second on a CPU),
    and, for bf16 on a known GPU, the rate that such products reached in an earlier measurement,
    which makes runs comparable, and the datasheet's.
    """
    name = str(dtype).removeprefix("torch.")
    found = {f"{name} matrix product here": matmul_flops(device, dtype)}
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        found |= {f"{r / 1e12:.0f} TFLOP/s": r for word, r in REACHED.items() if word in name}
        found |= {f"datasheet {word}": rate for word, rate in DATASHEET.items() if word in name}
    return found


def matmul_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the best FLOP/s of several square matrix products."""
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
        rates.append(repeats * 2 * side**3 / max(elapsed_s(start, end), 1e-9))
    return max(rates)
