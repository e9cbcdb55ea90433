"""Peers met before: ways back into a swarm when the ticket's own addresses no longer answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from coordinator.directory import is_way_in
from node.folders import replace_text

log = logging.getLogger(__name__)

FILE_NAME = "acquaintances.json"
MOST = 32  # addresses kept and tried; one that answers is enough


def recall(folder: Path) -> list[str]:
    """Directory addresses kept in a state folder; none when there is nothing readable."""
    try:
        known = json.loads((folder / FILE_NAME).read_text())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        log.warning("the list of peers met before is not used: %s", error)
        return []
    known = known if isinstance(known, list) else []
    return [address for address in known if isinstance(address, str) and is_way_in(address)][:MOST]


def remember(folder: Path, addresses: Iterable[str]) -> None:
    """Keeps these addresses for the next start, in place of those kept before."""
    kept = sorted(set(addresses))[:MOST]
    if not kept or kept == recall(folder):
        return
    try:
        replace_text(folder / FILE_NAME, json.dumps(kept), durable=False)
    except OSError as error:  # a full disk must not end a peer that works
        log.warning("peers met are not remembered: %s", error)


def ways_in(ticket: Sequence[str], folder: Path) -> list[str]:
    """The ticket's addresses first, then those of peers met before."""
    return list(dict.fromkeys([*ticket, *recall(folder)]))
