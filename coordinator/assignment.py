"""Which stage a machine should serve, and who keeps a place that two claim. Pure, and it says why."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.directory import DirectorySnapshot, PeerEntry
from coordinator.errors import NoStageFree, StageUnavailable


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """What a machine brings."""

    peer_id: str
    throughput: float
    """Microbatches per second that it can serve, measured."""
    fits: tuple[bool, ...]
    """By stage: whether the machine has the memory for it."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stage and the reason for it, in words for people."""

    stage: int
    reason: str
    own_place: PeerEntry | None = None
    """The peer's own live record of this stage, when it comes back to a place it already holds."""


def choose_stage(
    snapshot: DirectorySnapshot, machine: MachineProfile, *, now: float, max_replicas: int = 1
) -> Assignment:
    """The stage that this machine helps most.

    Its own place if it still holds one; else an uncovered stage, in the widest gap, where peers that choose at the same
    moment scatter by their ids; else the stage whose service lifts the swarm's bottleneck throughput most.

    Raises:
        NoStageFree: every stage that fits the machine has `max_replicas` peers.
    """
    own = own_place(snapshot, machine.peer_id, now)
    if own is not None and machine.fits[own.stage]:
        return Assignment(own.stage, f"{_of(own.stage, snapshot)}: this peer's own place", own)
    holders = [holders_of(snapshot, stage, now) for stage in range(snapshot.num_stages)]
    fitting = [s for s in range(snapshot.num_stages) if machine.fits[s] and len(holders[s]) < max_replicas]
    if not fitting:
        raise NoStageFree(_why_none(snapshot, machine, holders))
    uncovered = [stage for stage, peers in enumerate(holders) if not peers]
    open_here = [stage for stage in fitting if not holders[stage]]
    if open_here:
        return _choose_uncovered(snapshot, machine.peer_id, open_here, uncovered)
    return _choose_slowest(snapshot, machine, fitting, holders)


def check_stage(
    snapshot: DirectorySnapshot, machine: MachineProfile, stage: int, *, now: float, max_replicas: int = 1
) -> Assignment:
    """The stage that a person asked for.

    Raises:
        StageUnavailable: it does not exist, does not fit the machine or is served already.
    """
    if not 0 <= stage < snapshot.num_stages:
        raise StageUnavailable(f"stage {stage} does not exist: the run has stages 0 to {snapshot.num_stages - 1}")
    if not machine.fits[stage]:
        raise StageUnavailable(f"stage {stage} does not fit into this machine's memory")
    own = own_place(snapshot, machine.peer_id, now)
    if own is not None and own.stage == stage:
        return Assignment(stage, f"{_of(stage, snapshot)}: asked for, and this peer's own place", own)
    others = [entry for entry in holders_of(snapshot, stage, now) if entry.peer_id != machine.peer_id]
    if len(others) >= max_replicas:
        raise StageUnavailable(f"stage {stage} is served by {others[0].peer_id}")
    return Assignment(stage, f"{_of(stage, snapshot)}: asked for")


def holders_of(snapshot: DirectorySnapshot, stage: int, now: float) -> tuple[PeerEntry, ...]:
    """The live peers of a stage, the one with the best claim first: earliest reservation, then smallest peer id."""
    live = [entry for entry in snapshot.at(stage) if entry.is_live(now)]
    return tuple(sorted(live, key=lambda entry: (entry.reserved_at, entry.peer_id)))


def own_place(snapshot: DirectorySnapshot, peer_id: str, now: float) -> PeerEntry | None:
    """The peer's newest live record, of whatever stage."""
    entry = snapshot.find(peer_id)
    return entry if entry is not None and entry.is_live(now) else None


def resolve_reservation(
    snapshot: DirectorySnapshot, peer_id: str, stage: int, *, now: float, max_replicas: int = 1
) -> bool:
    """Whether the peer is among the rightful holders of the stage. Every reader of the same records agrees.

    False too when the peer's own record is not in the snapshot: what others cannot see is not held.
    """
    return peer_id in [entry.peer_id for entry in holders_of(snapshot, stage, now)[:max_replicas]]


def _choose_uncovered(
    snapshot: DirectorySnapshot, peer_id: str, candidates: Sequence[int], uncovered: Sequence[int]
) -> Assignment:
    widest = max(_gap_width(stage, uncovered) for stage in candidates)
    stage = max(
        (stage for stage in candidates if _gap_width(stage, uncovered) == widest),
        key=lambda stage: hashlib.sha256(f"{peer_id}/{stage}".encode()).digest(),
    )
    others = len(uncovered) - 1
    rest = {0: "the only one", 1: "1 other uncovered"}.get(others, f"{others} others uncovered")
    return Assignment(stage, f"{_of(stage, snapshot)}: uncovered, {rest}")


def _choose_slowest(
    snapshot: DirectorySnapshot,
    machine: MachineProfile,
    candidates: Sequence[int],
    holders: Sequence[Sequence[PeerEntry]],
) -> Assignment:
    rates = [sum(entry.throughput for entry in peers) for peers in holders]

    def bottleneck_with(stage: int) -> float:
        return min(rate + machine.throughput * (s == stage) for s, rate in enumerate(rates))

    stage = max(candidates, key=lambda stage: (bottleneck_with(stage), -rates[stage], -stage))
    before, after = min(rates), bottleneck_with(stage)
    return Assignment(stage, f"{_of(stage, snapshot)}: bottleneck {before:.3g} → {after:.3g} microbatches/s")


def _gap_width(stage: int, uncovered: Sequence[int]) -> int:
    """Number of neighbouring stages around this one that nobody serves, itself included."""
    first = last = stage
    while first - 1 in uncovered:
        first -= 1
    while last + 1 in uncovered:
        last += 1
    return last - first + 1


def _why_none(snapshot: DirectorySnapshot, machine: MachineProfile, holders: Sequence[Sequence[PeerEntry]]) -> str:
    total = snapshot.num_stages
    too_large = [stage for stage in range(total) if not machine.fits[stage]]
    if not too_large:
        return f"all {total} stages of the run are served"
    uncovered = [stage for stage in too_large if not holders[stage]]
    tail = f", {', '.join(map(str, uncovered))} of them uncovered" if uncovered else ""
    return f"{len(too_large)} of {total} stages do not fit into this machine's memory{tail}; the others are served"


def _of(stage: int, snapshot: DirectorySnapshot) -> str:
    return f"stage {stage} of {snapshot.num_stages}"
