"""Real peers come, sleep and die while they train: nothing is lost or counted twice. `bench churn` is the long form."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_churned_swarm_commits_what_one_process_computes(tmp_path: Path) -> None:
    out = tmp_path / "churn.json"
    command = [sys.executable, "-m", "node.cli", "bench", "churn", "--json", "--loopback", "--out", str(out)]
    command += ["--stages", "2", "--peers", "4", "--microbatches", "8"]
    command += ["--quiet", "4", "--seconds", "20", "--every", "10", "--stop", "6", "--without-coordinator"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=380, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    assert summary["blows"] >= 2
    assert summary["steps"] >= 10
    assert summary["commits_counted"] >= 20
    assert (summary["lost"], summary["duplicated"]) == (0, 0)
    assert summary["replicas_identical"]
    assert summary["losses_disagree"] == 0
    assert summary["steps_verified"] >= 1
    assert summary["processes_left_behind"] == 0
    assert summary["gradient_max_relative_difference"] < 1e-5
    assert json.loads(out.read_text())["measurements"]["without_coordinator"]
