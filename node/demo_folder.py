"""Where a demo keeps its peers' state and logs: a folder of its own in the system's temporary folder."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from node.demo_peers import PeerFailed
from node.errors import StateFolderBusy
from node.supervisor import locked_folder

_FOLDER_PREFIX = "resbm-node-demo-"
_STALE_SECONDS = 60.0
_KEEP = "keep"
"""A folder with a file of this name is not removed by a later demo."""


@contextlib.contextmanager
def demo_folder(*, keep: bool) -> Iterator[Path]:
    """A fresh folder for one demo. Removed at the end; after a failure its logs stay."""
    _remove_stale_folders()
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER_PREFIX))
    with locked_folder(folder):
        try:
            yield folder
        except PeerFailed:
            if not keep:
                _keep_logs_only(folder)
            (folder / _KEEP).touch()
            raise
        except BaseException:
            if not keep:
                shutil.rmtree(folder, ignore_errors=True)
            raise
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            (folder / _KEEP).touch()


def _keep_logs_only(folder: Path) -> None:
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            with contextlib.suppress(OSError):
                path.rmdir()  # only when nothing is left in it
        elif path.suffix not in (".log", ".1", ".toml"):
            path.unlink(missing_ok=True)


def _remove_stale_folders() -> None:
    """Those of demos that were killed: nobody holds their lock any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_FOLDER_PREFIX}*"):
        with contextlib.suppress(OSError, StateFolderBusy):
            if (folder / _KEEP).exists() or time.time() - folder.stat().st_mtime < _STALE_SECONDS:
                continue
            with locked_folder(folder):
                shutil.rmtree(folder)
