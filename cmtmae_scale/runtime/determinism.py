"""Kernels that give the same bits at every launch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.utils.deterministic


def fix_cublas_workspace() -> None:
    """Give cuBLAS a fixed workspace, unless the environment chooses one.

    Call it before the first matrix product of a process on a GPU: that product decides for good
    whether torch accepts later products in deterministic mode.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@contextmanager
def deterministic_kernels(enabled: bool) -> Iterator[None]:
    """Let torch choose only kernels with a fixed order of sums, and raise where it has none.

    A CPU's kernels have a fixed order anyway. On a GPU cuBLAS gets a fixed workspace, the backward
    of attention is deterministic, cuDNN's attention, which has no deterministic form, is off, and
    the compiler chooses kernels without timing them. The order of NCCL's sums follows from the
    topology.

    Args:
        enabled: false changes nothing.
    """
    if not enabled:
        yield
        return
    import torch._inductor.config as inductor  # slow to import

    fix_cublas_workspace()
    memory = cast(Any, torch.utils.deterministic)  # its property is a trick on the module
    filled = memory.fill_uninitialized_memory
    before = torch.are_deterministic_algorithms_enabled(), inductor.deterministic
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # nothing reads such memory
    torch.backends.cuda.enable_cudnn_sdp(False)
    inductor.deterministic = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        memory.fill_uninitialized_memory = filled
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        inductor.deterministic = before[1]
