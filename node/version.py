"""Which version of the software this is."""

from __future__ import annotations

from importlib import metadata

try:
    __version__ = metadata.version("resbm-node")
except metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"
