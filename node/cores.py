"""Processor cores, and how they are shared out."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_of_a_stage(num_stages: int) -> int:
    """Torch threads of one peer when this machine serves every stage.

    The reference takes as many by default: sums in another order would end in other bits.
    """
    return max(1, num_cores() // num_stages)
