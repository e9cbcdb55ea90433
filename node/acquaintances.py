"""Peers met before: ways back into a swarm when the ticket's own addresses no longer answer."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

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
    return [address for address in known if isinstance(address, str)][:MOST] if isinstance(known, list) else []


def remember(folder: Path, addresses: Iterable[str]) -> None:
    """Keeps these addresses for the next start, in place of those kept before."""
    kept = sorted(set(addresses))[:MOST]
    if not kept or kept == recall(folder):
        return
    temporary = folder / f".{FILE_NAME}"
    temporary.write_text(json.dumps(kept))
    temporary.replace(folder / FILE_NAME)


def ways_in(ticket: Sequence[str], folder: Path) -> list[str]:
    """The ticket's addresses first, then those of peers met before."""
    return list(dict.fromkeys([*ticket, *recall(folder)]))
