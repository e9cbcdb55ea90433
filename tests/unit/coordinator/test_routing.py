"""Next hop: sticky, only peers that serve, and the faster of two."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.routing import choose_next_hop

NOW = 1000.0


def peer(stage: int, peer_id: str, **values: Any) -> PeerEntry:
    """A peer that serves, reserved long ago and is live."""
    usual: dict[str, Any] = {"state": SERVING, "throughput": 1.0, "reserved_at": 10.0, "expires_at": NOW + 20}
    return PeerEntry(run_id="abcd", stage=stage, peer_id=peer_id, endpoints=("h:1",), **(usual | values))


def directory(num_stages: int, *entries: PeerEntry) -> DirectorySnapshot:
    return DirectorySnapshot.of("abcd", num_stages, entries, taken_at=NOW)


def choose(
    snapshot: DirectorySnapshot, current: str | None = None, *, seed: int = 0, now: float = NOW, **seconds: float
) -> str | None:
    entry = choose_next_hop(snapshot, 0, current, seconds, random.Random(seed), now=now)
    return entry.peer_id if entry is not None else None


def test_nobody_serves() -> None:
    assert choose(directory(2, peer(1, "other stage"))) is None
    assert choose(directory(1, peer(0, "a")), now=NOW + 21) is None  # expired


@pytest.mark.parametrize(("state", "chosen"), [(SERVING, "a"), (COMPLETE, "a"), (RESERVED, None), (DRAINING, None)])
def test_only_peers_that_serve_are_chosen(state: Any, chosen: str | None) -> None:
    assert choose(directory(1, peer(0, "a", state=state))) == chosen


def test_the_present_hop_stays_even_when_another_is_faster() -> None:
    snapshot = directory(1, peer(0, "slow"), peer(0, "fast"))
    assert {choose(snapshot, "slow", seed=seed, slow=9.0, fast=1.0) for seed in range(20)} == {"slow"}


@pytest.mark.parametrize("change", [{"state": DRAINING}, {"expires_at": NOW - 1}])
def test_a_hop_that_drains_or_is_gone_is_left(change: dict[str, Any]) -> None:
    assert choose(directory(1, peer(0, "old", **change), peer(0, "new")), "old") == "new"
    assert choose(directory(1, peer(0, "new")), "old") == "new"


def test_of_two_the_faster_and_never_always_the_same() -> None:
    snapshot = directory(1, *(peer(0, name) for name in "abcd"))
    picks = Counter(choose(snapshot, seed=seed, a=1.0, b=2.0, c=3.0, d=4.0) for seed in range(400))
    assert picks["a"] > picks["b"] > picks["c"] > 0  # of 6 pairs: 3, 2, 1 and 0 are won
    assert picks["d"] == 0


def test_a_peer_never_measured_is_tried_and_a_short_queue_decides_a_tie() -> None:
    snapshot = directory(1, peer(0, "known"), peer(0, "new", queue_depth=0), peer(0, "busy", queue_depth=9))
    picks = Counter(choose(snapshot, seed=seed, known=0.5) for seed in range(100))
    assert picks["new"] > 0
    assert choose(directory(1, peer(0, "busy", queue_depth=9), peer(0, "idle"))) == "idle"
