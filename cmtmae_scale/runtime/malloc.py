"""Settings of the C library's allocator."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's ``mallopt``."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next tensor, for the rest of this process.

    By default glibc maps large blocks anew and unmaps them when they are freed, so that the system
    fills each page with zeros again (docs/performance.md, section "On a CPU").

    Returns:
        Whether both settings were accepted; false without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, -1))
