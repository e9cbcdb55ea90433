"""How much of the machine's memory this process takes."""

from __future__ import annotations

import ctypes
import gc
import re
import resource
import sys
from pathlib import Path

import psutil


def now_bytes() -> int:
    """Resident now."""
    return int(psutil.Process().memory_info().rss)


def mapped_bytes() -> int:
    """Resident now of files and of memory shared with others: the system takes such pages away and brings them back."""
    return int(getattr(psutil.Process().memory_info(), "shared", 0))


def peak_bytes() -> int:
    """The most that was ever resident."""
    if sys.platform == "linux":
        # getrusage hands on the peak of the process that started this one; VmHWM is this program's own
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) << 10
    in_bytes = sys.platform == "darwin"  # elsewhere in kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if in_bytes else 10)


def give_back_freed() -> None:
    """Hands freed memory back to the system where the C library can be asked to (glibc): it keeps much of it else."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
