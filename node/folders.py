"""Where files go: the XDG base folders when nobody says otherwise, and a folder for each worker."""

from __future__ import annotations

import os
from pathlib import Path

BESIDE = "beside-"
"""Leads the names of `beside_folder`s."""


def state_folder() -> Path:
    """Identity and checkpoints: $XDG_STATE_HOME/resbm-node, or ~/.local/state/resbm-node."""
    return _base("XDG_STATE_HOME", ".local/state") / "resbm-node"


def cache_folder() -> Path:
    """What can be made again, such as encoded text: $XDG_CACHE_HOME/resbm-node, or ~/.cache/resbm-node."""
    return _base("XDG_CACHE_HOME", ".cache") / "resbm-node"


def beside_folder(state_folder: Path, stage: int) -> Path:
    """In a node's state folder, that of the worker that serves a stage beside the first one."""
    return state_folder / f"{BESIDE}{stage}"


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Writes a file anew: whoever reads it meanwhile, or after a crash, finds all of the old text or all of the new.

    Args:
        path: the file, or a link to where it is or shall be (which stays); its folder exists.
        text: what is in it afterwards.
        durable: after a power cut too. It may take a disk's time, so not on an event loop that others wait for.

    Raises OSError.
    """
    path = path.resolve()
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as file:
        file.write(text)
        if durable:
            file.flush()
            os.fsync(file.fileno())
    part.replace(path)


def _base(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    path = Path(value)
    return path if value and path.is_absolute() else Path.home() / fallback  # the XDG text: ignore relative paths
