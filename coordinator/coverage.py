"""One machine at several stages while there are fewer machines than stages. Pure.

A stage that nobody serves halts the run. So machines that have room serve such a stage beside their own, each with one
more peer: a *stand-in*. Everyone computes the same plan from the same records (`plan_cover`), and a machine that the
plan names starts a stand-in. For placement and rebalancing a stand-in counts as nobody: newcomers go where it is, and
it leaves when one of them serves and is level (`relief_of`). So with as many machines as stages each ends with one.

Once the run has taken steps, an empty stage's weights are on somebody's disk or lost. A machine takes it then if it
keeps a checkpoint of it (`PeerEntry.kept_stages`), or if somebody keeps a copy (`custody.py`): else it could bring
nothing but initial weights.

A stage is never left empty: of its peers one ranks first, by what never changes in their records (`_rank`), so whatever
each of them has seen, two never leave for each other.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.placement import scatter

FAIR = 2
"""Stages that one machine must serve more than another before it hands one over: with less both would change roles."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How readily machines stand in, and leave."""

    grace: timedelta = timedelta(seconds=15)
    """For how long nobody must have been at a stage. A machine that has just announced itself, and a worker that is
    being restarted, come first."""
    turn: timedelta = timedelta(seconds=60)
    """How long the machine that is named has to reserve the place; then the next one is named."""
    sure: timedelta = timedelta(seconds=5)
    """For how long somebody else must have served before a stand-in leaves."""


@dataclass(frozen=True, slots=True)
class Gaps:
    """Since when stages have had nobody, as one reader has seen it. A value: `after` gives the next one."""

    since: Mapping[int, float] = field(default_factory=dict)
    """By stage, Unix time in seconds."""

    def after(self, snapshot: DirectorySnapshot, *, now: float) -> Gaps:
        """Once more has been seen."""
        return Gaps({stage: self.since.get(stage, now) for stage in empty_stages(snapshot, now=now)})


@dataclass(frozen=True, slots=True)
class Cover:
    """A machine is to serve a stage with one more peer."""

    stage: int
    node: str
    """The machine, by the peer id of its first peer."""
    claimed_at: float = 0.0
    """Unix time of the claim that is taken over with the place; 0: the place is empty."""


def empty_stages(snapshot: DirectorySnapshot, *, now: float) -> tuple[int, ...]:
    """Stages that nobody serves or has reserved. Who drains is as good as gone."""
    return tuple(stage for stage in range(snapshot.num_stages) if not _here(snapshot, stage, now))


def plan_cover(snapshot: DirectorySnapshot, gaps: Gaps, policy: Policy, *, now: float) -> tuple[Cover, ...]:
    """Which machine is to serve which stage as well. The same for everyone who has seen the same.

    Empty stages go to those who serve least. Where none is empty, a machine that serves much less than another one
    takes a stage over from it: one at a time in the whole swarm.

    Args:
        now: Unix time in seconds.
    """
    loads, most = _loads(snapshot, now)
    empty = empty_stages(snapshot, now=now)
    started = any(entry.committed_step > 0 for entry in snapshot.all_peers())
    kept = {entry.peer_id: entry.kept_stages for entry in snapshot.all_peers()}
    copied = {entry.copied_stage for entry in snapshot.all_peers()}
    covers = []
    for stage in empty:
        waited = now - gaps.since.get(stage, now) - policy.grace.total_seconds()
        able = [n for n in most if loads[n] < most[n] and (not started or stage in kept[n] or stage in copied)]
        able.sort(key=lambda node: (loads[node], scatter(node, stage)))
        if waited >= 0 and able:
            node = able[int(waited / policy.turn.total_seconds()) % len(able)]
            covers.append(Cover(stage, node))
            loads[node] += 1
    if not empty:
        covers += _hand_over(snapshot, loads, most, policy, now)
    return tuple(covers)


def relief_of(
    snapshot: DirectorySnapshot, peer_id: str, level: Collection[str] | None, *, now: float
) -> PeerEntry | None:
    """The peer to whom a stand-in can leave its stage; None as long as it has to stay.

    Args:
        level: peer ids of the replicas that the stand-in itself has heard just now, and that stand where it stands: a
            record may outlive its peer. None for a stand-in that does not serve yet, which nobody would miss.
    """
    own = snapshot.find(peer_id)
    if own is None or not own.stand_in:
        return None
    better = [
        entry
        for entry in _here(snapshot, own.stage, now)
        if entry.peer_id != peer_id
        and entry.state in (SERVING, COMPLETE)
        and (level is None or entry.peer_id in level)
        and _rank(entry) < _rank(own)
    ]
    return min(better, key=_rank, default=None)


def _rank(entry: PeerEntry) -> tuple[bool, float, float, str]:
    """The least stays, whoever else leaves: one that is no stand-in; else the earliest claim, or who took that over."""
    return entry.stand_in, entry.claim, -entry.reserved_at, entry.peer_id


def _here(snapshot: DirectorySnapshot, stage: int, now: float) -> list[PeerEntry]:
    return [entry for entry in snapshot.at(stage) if entry.is_live(now) and entry.state != DRAINING]


def _loads(snapshot: DirectorySnapshot, now: float) -> tuple[Counter[str], dict[str, int]]:
    """By machine, how many stages it serves; and how many it would, of those whose first peer serves."""
    here = [entry for stage in range(snapshot.num_stages) for entry in _here(snapshot, stage, now)]
    loads = Counter(entry.node for entry in here)
    return loads, {entry.peer_id: entry.max_stages for entry in here if entry.state == SERVING and not entry.node_id}


def _hand_over(
    snapshot: DirectorySnapshot, loads: Counter[str], most: Mapping[str, int], policy: Policy, now: float
) -> list[Cover]:
    stand_ins = [e for stage in range(snapshot.num_stages) for e in _here(snapshot, stage, now) if e.stand_in]
    able = [node for node in most if loads[node] < most[node]]
    if not able or any(entry.state == RESERVED for entry in stand_ins):
        return []
    least = min(loads[node] for node in able)
    sole = [e for e in stand_ins if e.state == SERVING and len(_here(snapshot, e.stage, now)) == 1]
    heaviest = max(sole, key=lambda entry: (loads[entry.node], entry.stage), default=None)
    if heaviest is None or loads[heaviest.node] < least + FAIR:
        return []
    turn = math.floor(now / policy.turn.total_seconds())
    node = min((node for node in able if loads[node] == least), key=lambda node: scatter(node, turn))
    return [Cover(heaviest.stage, node, heaviest.claim)]
