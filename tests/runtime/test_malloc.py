"""The allocator of a process keeps what is freed."""

import ctypes
import resource

import pytest
import torch

from cmtmae_scale.runtime.malloc import keep_freed_memory
from tests.processes import run_ranks


def count_faults() -> tuple[bool, int]:
    """Return whether the settings are accepted, and page faults of ten tensors of 64 MiB each."""
    accepted = keep_freed_memory()
    torch.ones(2**24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)
    return accepted, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.gloo
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="no glibc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    [(accepted, faults)] = run_ranks(1, count_faults)
    assert accepted
    assert faults < 1000  # each tensor alone has 16,384 pages
