"""Whether this machine can have a lab of network namespaces, and what one has left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

MISSING = [tool for tool in ("ip", "tc", "iptables") if shutil.which(tool) is None]
WHY_NOT = "needs root" if os.geteuid() else f"not installed: {', '.join(MISSING)}" if MISSING else ""
needs_lab = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can have one")


def left_by(pid: int) -> list[str]:
    """What there still is of the lab of a process."""
    names = [line.split()[0] for line in subprocess.check_output(["ip", "netns"], text=True).splitlines()]
    mine = [name for name in names if name.startswith(f"resbm-{pid}-")]
    return mine + [str(path) for path in [Path("/run/resbm-lab") / str(pid)] if path.exists()]
