"""A worker's own temporary folder: sockets of its directory, of torch and of Python's multiprocessing.

All of them are removed by whoever made them, unless that is killed. So a supervisor gives each worker a folder and
removes it when the worker is gone; a folder whose supervisor was killed too is removed by the next one that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "resbm-worker-"
_LONGEST = 60  # characters; a Unix socket's path may have 107, and two more folders and a name follow
_SHORT = Path("/tmp")  # where the system's temporary folder has a longer name
_NEW_SECONDS = 60.0


@contextlib.contextmanager
def scratch_folder(parent: Path | None = None) -> Iterator[Path]:
    """A fresh folder in `parent` (default: the system's temporary folder), gone at the end. Raises OSError."""
    parent = parent or Path(tempfile.gettempdir())
    if len(str(parent / PREFIX)) + 8 > _LONGEST:
        parent = _SHORT
    _remove_stale(parent)
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    with _held(folder):  # waits while another supervisor looks whether it is stale
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_stale(parent: Path) -> None:
    """Those that nobody holds, but for one that was made this very moment: its maker will hold it."""
    for folder in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError), _held(folder, fcntl.LOCK_NB):
            if any(folder.iterdir()) or time.time() - folder.stat().st_mtime > _NEW_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _held(folder: Path, flags: int = 0) -> Iterator[None]:
    """Until the end, or until this process dies, however. Raises OSError, BlockingIOError if another one holds it."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | flags)
        yield
    finally:
        os.close(fd)
