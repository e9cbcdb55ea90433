"""Taking a place: claim it in the directory, wait, look again, keep it or choose again.

The directory has no locks. A claim is a published record; after the wait every claimant sees every claim that was made
before its own was visible, and all apply the same rule (earliest claim, then smallest peer id). So of several peers
that claim one stage at the same moment exactly one keeps it, as long as the wait is longer than a store takes plus the
difference of their clocks. Where it was shorter, the peer with the worse claim finds out at its next look at the
directory (`resolve_reservation`) and must give way.

Where any number of peers may hold a stage, none has to give way. But many that join at the same moment may have chosen
the same stage: those that another stage needs more go there before they load anything (`reconsider`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from coordinator.assignment import (
    Assignment,
    MachineProfile,
    check_stage,
    choose_stage,
    reconsider,
    resolve_reservation,
)
from coordinator.directory import DirectorySnapshot
from coordinator.errors import NoStageFree, StageUnavailable
from coordinator.placement import StageCosts

SETTLE_WAIT = timedelta(seconds=2)
SETTLE_JITTER = timedelta(seconds=0.5)
SECOND_THOUGHTS = 3
"""How often a place is given up for a better one before anything is loaded. Rebalancing mends what is amiss then."""


class Claims(Protocol):
    """What settling needs of the directory."""

    async def snapshot(self) -> DirectorySnapshot: ...

    async def claim(self, stage: int, reserved_at: float) -> None: ...

    async def release(self, stage: int) -> None: ...


@dataclass(frozen=True, slots=True)
class Place:
    """A stage held in the directory, and why this one."""

    stage: int
    reason: str
    reserved_at: float
    """Unix time in seconds of the claim; keep it in every record of this peer from now on."""


@dataclass(frozen=True, slots=True)
class Rules:
    """How places are taken."""

    wanted: int | None = None
    """The stage that a person asked for; None means the one that helps most."""
    max_replicas: int | None = 1
    """None: any number."""
    costs: StageCosts | None = None
    """How the stages differ, when they do."""
    wait: timedelta = SETTLE_WAIT
    jitter: timedelta = SETTLE_JITTER
    patience: timedelta = timedelta(0)
    """For how long to wait for a place when none is free."""


@dataclass(frozen=True, slots=True)
class Clockwork:
    """Time and chance, so that tests can bring their own."""

    now: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    chance: random.Random = field(default_factory=random.Random)


async def settle(claims: Claims, machine: MachineProfile, rules: Rules, clock: Clockwork | None = None) -> Place:
    """Ends holding a stage that fewer than `max_replicas` others hold.

    Raises:
        NoStageFree: for `patience` no stage that fits this machine was free.
        StageUnavailable: the wanted stage does not exist, does not fit or is held by another.
        DirectoryLost
    """
    clock = clock or Clockwork()
    give_up_at = clock.now() + rules.patience.total_seconds()
    while True:
        snapshot = await claims.snapshot()
        try:
            assignment = _choose(snapshot, machine, rules, clock.now())
        except (NoStageFree, StageUnavailable):
            if clock.now() >= give_up_at:
                raise
            await _pause(rules, clock)
            continue
        place = await _claim(claims, machine, assignment, rules, clock)
        if place is not None:
            return place


def _choose(snapshot: DirectorySnapshot, machine: MachineProfile, rules: Rules, now: float) -> Assignment:
    if rules.wanted is None:
        return choose_stage(snapshot, machine, now=now, max_replicas=rules.max_replicas, costs=rules.costs)
    return check_stage(snapshot, machine, rules.wanted, now=now, max_replicas=rules.max_replicas)


async def _claim(
    claims: Claims, machine: MachineProfile, assignment: Assignment, rules: Rules, clock: Clockwork
) -> Place | None:
    """Publishes the claim and keeps it, changes it or takes it back, as the others' claims demand."""
    own = assignment.own_place
    reserved_at = clock.now() if own is None else own.reserved_at
    second_thoughts = SECOND_THOUGHTS if own is None and rules.wanted is None and rules.max_replicas is None else 0
    while True:
        await claims.claim(assignment.stage, reserved_at)
        await _pause(rules, clock)
        snapshot, now = await claims.snapshot(), clock.now()
        if not resolve_reservation(
            snapshot, machine.peer_id, assignment.stage, now=now, max_replicas=rules.max_replicas
        ):
            await claims.release(assignment.stage)
            return None
        better = reconsider(snapshot, machine, now=now, costs=rules.costs) if second_thoughts else None
        if better is None:
            return Place(assignment.stage, assignment.reason, reserved_at)
        await claims.release(assignment.stage)
        assignment, second_thoughts = better, second_thoughts - 1


async def _pause(rules: Rules, clock: Clockwork) -> None:
    await clock.sleep(rules.wait.total_seconds() + clock.chance.uniform(0, rules.jitter.total_seconds()))
