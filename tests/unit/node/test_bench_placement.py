"""`resbm-node bench placement`: the simulation runs, and its summary is what scripts read."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from node.cli import build_app


def test_a_small_swarm_is_simulated(tmp_path: Path) -> None:
    arguments = ["--peers", "6", "--stages", "2", "--churn", "0.5", "--minutes", "20", "--seeds", "2", "--json"]
    result = CliRunner().invoke(
        build_app(), ["bench", "placement", *arguments, "--out", str(tmp_path / "placement.json")]
    )
    assert result.exit_code == 0, result.output
    summary = json.loads(result.output.splitlines()[-1])
    assert 0.5 < summary["share_of_bound"] <= 1
    assert summary["moves_per_peer_hour"] < 6
    assert summary["emptied"] == 0
    (case,) = json.loads((tmp_path / "placement.json").read_text())["measurements"]
    assert case["case"]["peers"] == 6
