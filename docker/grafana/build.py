"""Writes the dashboards of boards/ as JSON, for Grafana to read at its start.

python docker/grafana/build.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from boards import network, node, swarm

FOLDER = Path(__file__).parent / "dashboards"
BOARDS = {"swarm": swarm.BOARD, "node": node.BOARD, "network": network.BOARD}


def build(folder: Path) -> None:
    """One file a dashboard."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, board in BOARDS.items():
        text = JSONEncoder(sort_keys=True, indent=2).encode(board.build())
        (folder / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER)
