"""No orphans: processes that die with their parent, however it dies, and leave no files."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil

PARENT_POLL = timedelta(seconds=0.5)
_PR_SET_PDEATHSIG = 1
# Loaded before any fork: between fork and exec nothing may be.
_prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def be_killed_with_parent(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Has the kernel signal this process when the thread that forked it ends. Does nothing elsewhere than on Linux.

    Fork from the parent's main thread: the end of the forking thread counts as the parent's end.
    """
    if _prctl is None:
        return
    _prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)
    if os.getppid() != parent_pid:  # it died before the kernel was asked
        os.kill(os.getpid(), signal_number)


def die_with_parent(parent_pid: int, scratch: Path) -> None:
    """Makes this forked process outlive neither its parent nor a SIGTERM, and leave no child and no scratch folder.

    Call it in the main thread of the child, first thing. The child leaves its parent's process group: Ctrl+C then
    reaches the parent alone, which can still use the directory to say goodbye.
    """

    def on_sigterm(_signal: int, _frame: FrameType | None) -> None:
        _exit_clean(scratch)

    def watch_parent() -> None:
        while os.getppid() == parent_pid:
            time.sleep(PARENT_POLL.total_seconds())
        _exit_clean(scratch)

    os.setpgrp()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, on_sigterm)
    threading.Thread(target=watch_parent, name="parent-watch", daemon=True).start()


def _exit_clean(scratch: Path) -> None:
    kill_all(descendants_of(os.getpid()))
    shutil.rmtree(scratch, ignore_errors=True)
    os._exit(0)


def descendants_of(pid: int) -> list[psutil.Process]:
    """All processes below `pid` that live now, zombies too. They stay known by these after their parent has died."""
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL to each that still runs; a number given to another process since is left alone (psutil compares)."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            process.kill()


def is_running(process: psutil.Process) -> bool:
    """False also for a zombie, and for another process that was given the same number since."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
