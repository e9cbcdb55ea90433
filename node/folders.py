"""Where files go when nobody says otherwise: the XDG base folders."""

from __future__ import annotations

import os
from pathlib import Path


def state_folder() -> Path:
    """Identity and checkpoints: $XDG_STATE_HOME/resbm-node, or ~/.local/state/resbm-node."""
    return _base("XDG_STATE_HOME", ".local/state") / "resbm-node"


def cache_folder() -> Path:
    """What can be made again, such as encoded text: $XDG_CACHE_HOME/resbm-node, or ~/.cache/resbm-node."""
    return _base("XDG_CACHE_HOME", ".cache") / "resbm-node"


def _base(variable: str, fallback: str) -> Path:
    value = os.environ.get(variable, "")
    path = Path(value)
    return path if value and path.is_absolute() else Path.home() / fallback  # the XDG text: ignore relative paths
