"""Whether a peer that serves should serve another stage instead, because others have joined, left or died. Pure.

Everyone computes the same plan from the same records, and a peer moves when the plan names it. So few move for one
imbalance, without anyone in charge. Views of a slow directory differ, which is why a move is a claim first: the mover
reserves at the target, waits until others can see it, looks again and asks whether the move is still right
(`is_move_right`). Of two that move for the same reason the later claim is taken back. Only then does it drain, and
start again there.

What keeps a swarm from flapping: a move must lift the slower of the two stages it concerns by a margin; who has moved
stays for a while; nobody moves where somebody has just reserved. A move away never leaves a stage empty, nor slower
than the stage that it helps.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

from coordinator.assignment import MachineProfile
from coordinator.directory import RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.newcomers import is_fresh
from coordinator.placement import StageCosts, claims_of, counted, scatter

MAX_MOVES = 8
"""Of one plan, however large the swarm."""
MAX_SWAP_REPLICAS = 16
"""With more at a stage single moves come close enough to the best placement."""
AS_GOOD = 0.9
"""Movers that lift this share of what the best one does are drawn like that one."""
ANYONE_EVERY = 8
"""Of so many turns, in one all movers that help are drawn alike: the best may be gone, or not listen."""
ANYONE_EVERY_IF_UNSURE = 2
"""The same where it is not sure that the best fit."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How readily peers move."""

    margin: float = 0.05
    """Share by which a stage must be behind another, and by which a move must lift it."""
    swap_margin: float = 0.08
    """The same where it takes two peers to change places, which slows the swarm down until both have arrived."""
    cool_down: timedelta = timedelta(minutes=5)
    """For how long a peer stays where it has gone, at least; some stay up to half as long again. It does not hold while
    a stage has nobody, or only stand-ins: the whole swarm stands still then, or waits for an overloaded machine."""
    turn: timedelta = timedelta(seconds=30)
    """For how long the same peers are named. Those who cannot move, which others cannot know, block nobody longer."""
    share_at_once: float = 0.01
    """Of the swarm's peers, how many may be named at once; one always may."""


@dataclass(frozen=True, slots=True)
class Move:
    """A peer that should serve another stage."""

    peer_id: str
    source: int
    target: int
    is_swap: bool
    """Whether a peer of the target should then come to the source: that follows by itself, as a move of its own."""
    before: float
    """Rate of the target, the slowest stage."""
    after: float
    """Rate of the slower of both stages after it."""

    @property
    def reason(self) -> str:
        """In words for people."""
        what = "change places with a peer of" if self.is_swap else "move to"
        rates = f"the slower of both {self.before:.3g} → {self.after:.3g} microbatches/s"
        return f"{what} stage {self.target} from stage {self.source}: {rates}"


def plan_moves(snapshot: DirectorySnapshot, costs: StageCosts, policy: Policy, *, now: float) -> tuple[Move, ...]:
    """Who should move now. The same for everyone who has the same snapshot; empty when all is well.

    Touches each entry a fixed number of times, so that a swarm of any size can be looked at every few seconds.

    Args:
        now: Unix time in seconds.
    """
    swarm = _Swarm.of(snapshot, claims_of(snapshot, now=now), costs, now=now)
    if len(swarm.rates) < 2 or swarm.num_awaited[swarm.slowest]:
        return ()
    halted = swarm.rates[swarm.slowest] == 0
    movable = [entry for entry in swarm.serving() if halted or _has_rested(entry, policy, now)]
    options = list(_options(swarm, movable, policy.margin)) or list(_swaps(swarm, movable, policy.swap_margin))
    turn = math.floor(now / policy.turn.total_seconds())
    most = min(MAX_MOVES, max(1, int(swarm.num_peers * policy.share_at_once)))
    return tuple(_drawn(swarm, options, turn, most, policy))


def decide_move(
    plan: Iterable[Move],
    snapshot: DirectorySnapshot,
    machine: MachineProfile,
    costs: StageCosts,
    policy: Policy,
    *,
    now: float,
    last_moved_at: float = -math.inf,
) -> Move | None:
    """What the plan asks of this peer, if that is possible and, at its own exact rates, right.

    Args:
        last_moved_at: Unix time in seconds; the directory may have forgotten what the peer remembers.
    """
    for move in plan:
        if move.peer_id == machine.peer_id:
            rested = now >= last_moved_at + policy.cool_down.total_seconds() or move.before == 0
            return move if rested and is_move_right(move, snapshot, machine, costs, policy, now=now) else None
    return None


def is_move_right(
    move: Move,
    snapshot: DirectorySnapshot,
    machine: MachineProfile,
    costs: StageCosts,
    policy: Policy,
    *,
    now: float,
) -> bool:
    """Whether a move that was decided is right as things stand: to be asked again once its claim is visible.

    Of peers that move at the same moment, those with an earlier claim are taken to have gone and those with a later one
    to stay. So of two that must not both move, exactly one finds that it may.
    """
    claims = claims_of(snapshot, now=now)
    own_claim = claims.pop(machine.peer_id, None)
    serving = {entry.peer_id for entry in snapshot.all_peers() if entry.state == SERVING and entry.is_live(now)}
    if own_claim is not None:
        ours = (own_claim.reserved_at, own_claim.peer_id)
        claims = {
            peer_id: claim
            for peer_id, claim in claims.items()
            if peer_id not in serving or (claim.reserved_at, peer_id) < ours
        }
    swarm = _Swarm.of(snapshot, claims, costs, now=now)
    own = next((entry for entry in swarm.peers[move.source] if entry.peer_id == machine.peer_id), None)
    rate_there = machine.rates[move.target]
    if own is None or own.state != SERVING or rate_there <= 0:
        return False
    if not move.is_swap:
        lift = swarm.lift(own, move.target, rate_there, policy.margin)
        return lift > 0 and swarm.can_spare(own, swarm.rates[move.target] + lift)
    return swarm.can_spare(own) and any(
        swarm.swap_lift(own, other, rate_there, policy.swap_margin) > 0
        for other in swarm.peers[move.target]
        if other.state == SERVING
    )


def next_look(policy: Policy, chance: random.Random) -> timedelta:
    """When to plan again: several times a turn, and not all peers at the same moment."""
    return policy.turn * chance.uniform(0.2, 0.4)


# -- the state of the swarm -------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Swarm:
    """Who is where, and what is left after a move."""

    costs: StageCosts
    peers: list[list[PeerEntry]]
    rates: list[float]
    """By stage, of all peers that serve or have reserved."""
    serving_rates: list[float]
    """By stage, of those that serve and stay: what a source can count on while a newcomer still loads."""
    num_serving: list[int]
    num_awaited: list[int]
    """By stage, the reservations that may still be taken back."""
    num_peers: int = 0

    @classmethod
    def of(
        cls, snapshot: DirectorySnapshot, claims: Mapping[str, PeerEntry], costs: StageCosts, *, now: float
    ) -> _Swarm:
        stages = range(snapshot.num_stages)
        zeros = [0.0 for _ in stages]
        swarm = cls(costs, [[] for _ in stages], zeros, zeros.copy(), [0 for _ in stages], [0 for _ in stages])
        for entry in counted(snapshot, claims, now=now):
            swarm.peers[entry.stage].append(entry)
            swarm.rates[entry.stage] += entry.throughput
            swarm.num_peers += 1
            if entry.state != RESERVED:
                swarm.serving_rates[entry.stage] += entry.throughput
                swarm.num_serving[entry.stage] += 1
            elif is_fresh(entry, now):
                swarm.num_awaited[entry.stage] += 1
        return swarm

    @property
    def slowest(self) -> int:
        return min(range(len(self.rates)), key=lambda stage: (self.rates[stage], stage))

    def serving(self) -> Iterator[PeerEntry]:
        return (entry for entries in self.peers for entry in entries if entry.state == SERVING)

    def lift(self, entry: PeerEntry, target: int, rate_there: float, margin: float) -> float:
        """By how much a move lifts the slower of both stages, once all have arrived; 0 when it is not worth it.

        The stages must be apart by the margin, and the lift must be of that size too, or as large as it can be with
        this peer: where many replicas share a stage, each of them alone changes little.
        """
        behind = self.rates[target]
        if entry.stage == target or self.rates[entry.stage] < behind * (1 + margin):
            return 0.0
        lifted = min(self.rates[entry.stage] - entry.throughput, behind + rate_there) - behind
        return lifted if lifted >= min(margin * behind, rate_there * (1 - 1e-9)) else 0.0

    def swap_lift(self, entry: PeerEntry, other: PeerEntry, rate_there: float, margin: float) -> float:
        """The same when `other`, of the target, comes in exchange; only where it is sure to fit."""
        source, target = entry.stage, other.stage
        if source == target or not self.costs.surely_fits(other, source):
            return 0.0
        behind = self.rates[target]
        left = self.rates[source] - entry.throughput + self.costs.rate_elsewhere(other, source)
        lifted = min(left, behind - other.throughput + rate_there) - behind
        return lifted if lifted > margin * behind else 0.0

    def can_spare(self, entry: PeerEntry, at_least: float = 0.0) -> bool:
        """Whether others serve the peer's stage now, at this rate at least: those who still load do not count."""
        rest = self.serving_rates[entry.stage] - entry.throughput
        return self.num_serving[entry.stage] >= 2 and rest >= at_least * (1 - 1e-9)

    def apply(self, entry: PeerEntry, target: int) -> None:
        """As if the peer had moved."""
        self.rates[entry.stage] -= entry.throughput
        self.serving_rates[entry.stage] -= entry.throughput
        self.num_serving[entry.stage] -= 1
        self.rates[target] += self.costs.rate_elsewhere(entry, target)


# -- who is named -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Option:
    entry: PeerEntry
    lift: float
    is_swap: bool


def _has_rested(entry: PeerEntry, policy: Policy, now: float) -> bool:
    stay = policy.cool_down.total_seconds() * (1 + _drawn_number(entry.peer_id) / 2)
    return now >= entry.reserved_at + stay


def _options(swarm: _Swarm, movable: Iterable[PeerEntry], margin: float) -> Iterator[_Option]:
    target = swarm.slowest
    behind = swarm.rates[target]
    for entry in movable:
        lift = swarm.lift(entry, target, swarm.costs.rate_elsewhere(entry, target), margin)
        if lift > 0 and (behind > 0 or swarm.can_spare(entry)):
            yield _Option(entry, lift, is_swap=False)


def _swaps(swarm: _Swarm, movable: Iterable[PeerEntry], margin: float) -> Iterator[_Option]:
    target = swarm.slowest
    movable = list(movable)
    others = [entry for entry in movable if entry.stage == target]
    if not others or len(swarm.peers[target]) > MAX_SWAP_REPLICAS:
        return
    for entry in movable:
        if entry.stage == target or len(swarm.peers[entry.stage]) > MAX_SWAP_REPLICAS:
            continue
        rate_there = swarm.costs.rate_elsewhere(entry, target)
        lift = max(swarm.swap_lift(entry, other, rate_there, margin) for other in others)
        if lift > 0:
            yield _Option(entry, lift, is_swap=True)


def _drawn(swarm: _Swarm, options: list[_Option], turn: int, most: int, policy: Policy) -> Iterator[Move]:
    """Draws movers of the best until enough are named, or nobody is needed any more.

    Each one after the first is judged as if those before it had moved. Where the one drawn cannot be spared until those
    who come to its stage have loaded, that is waited for: a worse one instead would have to move back.
    """
    largest = max((option.lift for option in options), default=0.0)
    best = [option for option in options if option.lift >= AS_GOOD * largest]
    sure = all(swarm.costs.surely_fits(option.entry, swarm.slowest) for option in best)
    if turn % (ANYONE_EVERY if sure else ANYONE_EVERY_IF_UNSURE):
        options = best
    in_turn = heapq.nsmallest(4 * most, options, key=lambda option: _drawn_number(option.entry.peer_id, turn))
    for option in in_turn:
        target, entry = swarm.slowest, option.entry
        before, lift = swarm.rates[target], option.lift
        if swarm.num_awaited[target]:
            return
        if not option.is_swap:
            lift = swarm.lift(entry, target, swarm.costs.rate_elsewhere(entry, target), policy.margin)
        if lift <= 0:
            continue
        if not swarm.can_spare(entry, 0.0 if option.is_swap else before + lift):
            return
        yield Move(entry.peer_id, entry.stage, target, option.is_swap, before, before + lift)
        swarm.apply(entry, target)
        most -= 1
        if most == 0 or option.is_swap:
            return


def _drawn_number(peer_id: str, *of: object) -> float:
    """Above 0 and at most 1, the same for everyone."""
    return (int.from_bytes(scatter(peer_id, *of)) + 1) / (1 << 64)
