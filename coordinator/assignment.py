"""Which stage a machine should serve, and who keeps a place that two claim. Pure, and it says why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from coordinator.directory import DirectorySnapshot, PeerEntry
from coordinator.errors import NoStageFree, StageUnavailable
from coordinator.newcomers import Newcomers, is_fresh
from coordinator.placement import StageCosts, gap_widths, neediest, scatter


@dataclass(frozen=True, slots=True)
class MachineProfile:
    """What a machine brings."""

    peer_id: str
    throughput: float
    """Microbatches per second that it can serve, measured on a stage like most."""
    fits: tuple[bool, ...]
    """By stage: whether the machine has the memory for it."""
    stage_rates: tuple[float, ...] = ()
    """By stage, what it can serve (`StageCosts.rates`); empty where that is `throughput` everywhere."""

    @property
    def rates(self) -> tuple[float, ...]:
        """By stage, microbatches per second; 0 where it does not fit."""
        rates = self.stage_rates or (self.throughput,) * len(self.fits)
        return tuple(rate if fits else 0.0 for rate, fits in zip(rates, self.fits, strict=True))

    @classmethod
    def measured(
        cls,
        peer_id: str,
        costs: StageCosts,
        throughput: float,
        *,
        at: int,
        link_bytes_per_second: float = 0.0,
        available_bytes: float = float("inf"),
    ) -> MachineProfile:
        """Of one measured stage `at`; the others follow from their costs."""
        rates = costs.rates(
            throughput, at=at, link_bytes_per_second=link_bytes_per_second, available_bytes=available_bytes
        )
        return cls(peer_id, throughput, tuple(rate > 0 for rate in rates), rates)


@dataclass(frozen=True, slots=True)
class Assignment:
    """A stage and the reason for it, in words for people."""

    stage: int
    reason: str
    own_place: PeerEntry | None = None
    """The peer's own live record of this stage, when it comes back to a place it already holds."""


def choose_stage(
    snapshot: DirectorySnapshot,
    machine: MachineProfile,
    *,
    now: float,
    max_replicas: int | None = 1,
    costs: StageCosts | None = None,
) -> Assignment:
    """The stage that this machine helps most.

    Its own place if it still holds one; else an uncovered stage, in the widest gap, where peers that choose at the same
    moment scatter by their ids; else the stage whose service lifts the swarm's bottleneck throughput most.

    Args:
        max_replicas: None for any number.
        costs: what tells others' rates at stages other than theirs; None where stages are alike.

    Raises:
        NoStageFree: every stage that fits the machine has `max_replicas` peers.
    """
    own = own_place(snapshot, machine.peer_id, now)
    if own is not None and max_replicas is None and is_fresh(own, now):
        own = None  # a claim just made may be one that has to give way
    if own is not None and machine.fits[own.stage]:
        return Assignment(own.stage, f"{_of(own.stage, snapshot)}: this peer's own place", own)
    if max_replicas is None:
        return _choose_neediest(snapshot, machine, costs or StageCosts.alike(snapshot.num_stages), now)
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
    snapshot: DirectorySnapshot, machine: MachineProfile, stage: int, *, now: float, max_replicas: int | None = 1
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
    if max_replicas is not None and len(others) >= max_replicas:
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
    snapshot: DirectorySnapshot, peer_id: str, stage: int, *, now: float, max_replicas: int | None = 1
) -> bool:
    """Whether the peer is among the rightful holders of the stage. Every reader of the same records agrees.

    False too when the peer's own record is not in the snapshot: what others cannot see is not held.
    """
    return peer_id in [entry.peer_id for entry in holders_of(snapshot, stage, now)[:max_replicas]]


def reconsider(
    snapshot: DirectorySnapshot, machine: MachineProfile, *, now: float, costs: StageCosts | None = None
) -> Assignment | None:
    """A better place for a machine that has just claimed one, now that it sees who else has; None where it may stay.

    Where any number may hold a stage, this takes the place of a limit: of many that join at once and choose the same
    stage, as many stay as it needs, and everyone computes alike who goes where.
    """
    costs = costs or StageCosts.alike(snapshot.num_stages)
    newcomers = Newcomers.of(snapshot, now=now)
    stage = newcomers.share_of(machine.peer_id, machine.rates, costs)
    own = own_place(snapshot, machine.peer_id, now)
    if stage is None or own is None or own.stage == stage:
        return None
    return _helping(stage, snapshot, machine, newcomers.rates_before(machine.peer_id, costs))


def _choose_neediest(snapshot: DirectorySnapshot, machine: MachineProfile, costs: StageCosts, now: float) -> Assignment:
    """Without a limit of replicas. Those who claim at this moment are taken to share the stages well."""
    rates = Newcomers.of(snapshot, now=now).rates_before(machine.peer_id, costs)
    stage = neediest(rates, machine.rates, machine.peer_id)
    if stage is None:
        raise NoStageFree(f"none of the {snapshot.num_stages} stages fits into this machine's memory")
    return _helping(stage, snapshot, machine, rates)


def _helping(stage: int, snapshot: DirectorySnapshot, machine: MachineProfile, rates: Sequence[float]) -> Assignment:
    if rates[stage] == 0 and any(entry.stand_in for entry in snapshot.at(stage)):
        return Assignment(stage, f"{_of(stage, snapshot)}: served only by a machine that has another one, too")
    if rates[stage] == 0:
        return Assignment(stage, _why_uncovered(stage, snapshot, rates.count(0.0) - 1))
    lifted = [rate + machine.rates[stage] * (s == stage) for s, rate in enumerate(rates)]
    return Assignment(stage, _why_slowest(stage, snapshot, min(rates), min(lifted)))


def _choose_uncovered(
    snapshot: DirectorySnapshot, peer_id: str, candidates: Sequence[int], uncovered: Sequence[int]
) -> Assignment:
    gaps = gap_widths([float(stage not in uncovered) for stage in range(snapshot.num_stages)])
    widest = max(gaps[stage] for stage in candidates)
    stage = max((stage for stage in candidates if gaps[stage] == widest), key=lambda stage: scatter(peer_id, stage))
    return Assignment(stage, _why_uncovered(stage, snapshot, len(uncovered) - 1))


def _choose_slowest(
    snapshot: DirectorySnapshot,
    machine: MachineProfile,
    candidates: Sequence[int],
    holders: Sequence[Sequence[PeerEntry]],
) -> Assignment:
    rates = [sum(entry.throughput for entry in peers) for peers in holders]

    def bottleneck_with(stage: int) -> float:
        return min(rate + machine.rates[stage] * (s == stage) for s, rate in enumerate(rates))

    stage = max(candidates, key=lambda stage: (bottleneck_with(stage), -rates[stage], -stage))
    return Assignment(stage, _why_slowest(stage, snapshot, min(rates), bottleneck_with(stage)))


def _why_uncovered(stage: int, snapshot: DirectorySnapshot, others: int) -> str:
    rest = {0: "the only one", 1: "1 other uncovered"}.get(others, f"{others} others uncovered")
    return f"{_of(stage, snapshot)}: uncovered, {rest}"


def _why_slowest(stage: int, snapshot: DirectorySnapshot, before: float, after: float) -> str:
    return f"{_of(stage, snapshot)}: bottleneck {before:.3g} → {after:.3g} microbatches/s"


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
