"""The ticket that a machine can hand on: kept in its state folder, for `resbm-node ticket` and `resbm-node status`.

A coordinator writes its own. A peer writes one that names the peers it sees, so that a run can be joined when its
coordinator, whose address is all that the first tickets know, is gone for good.
"""

from __future__ import annotations

import logging
from pathlib import Path

from coordinator.directory import DirectorySnapshot
from coordinator.ticket import Ticket, renewed_ticket
from node.folders import replace_text

log = logging.getLogger(__name__)

FILE_NAME = "ticket"
_COORDINATOR = "coordinator"
"""Folder of a machine's coordinator within its state folder, unless it was told another one."""


def of_swarm(ticket: Ticket, snapshot: DirectorySnapshot, me: str) -> str:
    """The run's ticket by way of this peer, then of those that have served longest."""
    peers = sorted(snapshot.all_peers(), key=lambda entry: (entry.peer_id != me, entry.claim, entry.peer_id))
    return renewed_ticket(ticket, [entry.bootstrap for entry in peers])


def write(folder: Path, text: str) -> None:
    """In place of the one before. Raises OSError."""
    replace_text(folder / FILE_NAME, text + "\n", durable=False)


def keep_fresh(folder: Path, text: str) -> None:
    """Writes it where it is another one than before. A full disk must not end a peer that works."""
    try:
        if _read(folder / FILE_NAME) != text:
            write(folder, text)
    except OSError as error:
        log.warning("the ticket for others to join with is not kept: %s", error)


def read(folder: Path) -> str | None:
    """The newest ticket in a machine's state folder, its coordinator's among them; None where there is none."""
    paths = [path for path in (folder / FILE_NAME, folder / _COORDINATOR / FILE_NAME) if path.is_file()]
    return _read(max(paths, key=lambda path: path.stat().st_mtime)) if paths else None


def _read(path: Path) -> str:
    return path.read_text().strip() if path.is_file() else ""
