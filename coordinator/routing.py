"""Which peer of a neighbouring stage to send to. Pure."""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping

from coordinator.directory import COMPLETE, SERVING, DirectorySnapshot, PeerEntry

MAX_HOPS = 8
"""Peers of the next stage that one peer keeps links to: enough to choose from and to survive losses."""


def choose_next_hops(
    snapshot: DirectorySnapshot, stage: int, known: Collection[str], chance: random.Random, *, now: float
) -> list[PeerEntry]:
    """The peers of `stage` to keep links to, at most MAX_HOPS: those known already, then others at random.

    Args:
        known: peer ids that are linked now; one that still serves stays, since a change costs resent frames.
        now: Unix time in seconds.
    """
    serving = [entry for entry in snapshot.at(stage) if entry.state in (SERVING, COMPLETE) and entry.is_live(now)]
    kept = [entry for entry in serving if entry.peer_id in known][:MAX_HOPS]
    others = [entry for entry in serving if entry.peer_id not in known]
    return kept + chance.sample(others, min(len(others), MAX_HOPS - len(kept)))


def choose_next_hop(
    snapshot: DirectorySnapshot,
    stage: int,
    current: str | None,
    service_seconds: Mapping[str, float],
    chance: random.Random,
    *,
    now: float,
) -> PeerEntry | None:
    """The peer of `stage` to send to; None while nobody serves it.

    Sticky: the current peer stays as long as it is there and serves, since every change costs a resent window. Else the
    faster of two peers drawn at random ("power of two choices", Mitzenmacher 2001): near the best, without all choosing
    the same one.

    Args:
        current: peer id of the present hop, None when there is none or when it has just failed.
        service_seconds: by peer id, measured seconds from sending a microbatch to its answer. A peer never measured is
            taken for as fast as the fastest, so that it is tried.
        now: Unix time in seconds.
    """
    serving = [entry for entry in snapshot.at(stage) if entry.state in (SERVING, COMPLETE) and entry.is_live(now)]
    for entry in serving:
        if entry.peer_id == current:
            return entry
    if not serving:
        return None
    fastest = min(service_seconds.values(), default=0.0)

    def cost(entry: PeerEntry) -> tuple[float, int, str]:
        return service_seconds.get(entry.peer_id, fastest), entry.queue_depth, entry.peer_id

    return min(chance.sample(serving, min(2, len(serving))), key=cost)
