"""Prints the digest of a run's final weights, fetched from the peers that serve it.

    python weights_process.py RUN_ID FOLDER

It loads what it needs, then reads one line from stdin: the endpoints, stage 0 first.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from node.demo_result import digest_of, gather_weights

if __name__ == "__main__":
    _, run_id, folder = sys.argv
    endpoints = sys.stdin.readline().split()
    print(digest_of(asyncio.run(gather_weights(endpoints, run_id, Path(folder)))))
