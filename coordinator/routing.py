"""Which peer of a neighbouring stage to send to. Pure."""

from __future__ import annotations

import random
from collections.abc import Mapping

from coordinator.directory import COMPLETE, SERVING, DirectorySnapshot, PeerEntry


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
