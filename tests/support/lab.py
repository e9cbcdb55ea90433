"""Whether this machine can have a lab of network namespaces."""

from __future__ import annotations

import os
import shutil

import pytest

MISSING = [tool for tool in ("ip", "tc", "iptables") if shutil.which(tool) is None]
WHY_NOT = "needs root" if os.geteuid() else f"not installed: {', '.join(MISSING)}" if MISSING else ""
needs_lab = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can have one")
