"""The allocator of a process keeps what is freed."""

import ctypes
import resource

import pytest

from cmtmae_scale.runtime.malloc import keep_freed_memory
from tests.processes import run_ranks

SIZE = 2**26


def count_faults() -> tuple[bool, int]:
    """Return whether the settings are accepted, and the page faults of ten blocks in a row."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    accepted, before = keep_freed_memory(), 0
    for number in range(11):
        block = libc.malloc(SIZE)
        libc.memset(block, 1, SIZE)
        libc.free(block)
        if number == 0:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return accepted, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.gloo
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="no glibc")
def test_freed_memory_is_reused_without_page_faults() -> None:
    [(accepted, faults)] = run_ranks(1, count_faults)
    assert accepted
    assert faults < 1000  # a block has 16,384 pages
