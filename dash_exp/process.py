"""What a process is told before it computes: how its threads wait, and what becomes of freed memory."""

from __future__ import annotations

import ctypes
import os
import sys


def share_cores() -> None:
    """Before torch is imported: let its threads sleep soon when they wait for each other. GNU OpenMP
    spins for milliseconds by default, which is no faster alone, and beside another busy process makes
    a step many times slower. An explicit choice of the user stays."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def keep_freed_memory() -> None:
    """Let glibc reuse freed memory instead of returning it: on CPU, fresh pages for every large
    temporary cost about a tenth of a step. Elsewhere nothing happens."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            for option, value in ((-3, 32 << 20), (-1, 1 << 30), (-2, 256 << 20)):
                libc.mallopt(option, value)  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
