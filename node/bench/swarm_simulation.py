"""A swarm in virtual time: peers that join, move, leave and die, and a directory that shows them late.

A discrete-event simulation around the real decisions (`coordinator.assignment`, `coordinator.rebalancing`). Loading and
draining only take time. Nothing depends on the machine or its clock, so a seed names a history.

A peer looks at the directory every few seconds, but all that have read the same records compute the same plan: so each
plan is computed once, and only those whom it names are asked, each with the chance that it looks just then.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from resbm_pb import records_pb2

from coordinator.assignment import MachineProfile, choose_stage, reconsider
from coordinator.directory import DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.placement import StageCosts
from coordinator.rebalancing import Move, Policy, decide_move, is_move_right, plan_moves
from coordinator.settlement import SECOND_THOUGHTS

RUN = "abcd"
LIFETIME = 30.0
RENEWAL = 10.0
LOOK_EVERY = 9.0
PLAN_EVERY = 5.0
"""Plans of the same records within this time are taken to be the same: a divisor of what they wait for."""
FOREVER = float("inf")
HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Scenario:
    """What is simulated. All times in seconds."""

    num_peers: int
    num_stages: int
    seconds: float = 1800.0
    seed: int = 0
    costs: StageCosts | None = None
    spread: float = 4.0  # the fastest machine is this much faster than the slowest
    small_share: float = 0.0  # of machines, those without the memory for the last stage
    deaths_per_peer_hour: float = 0.0  # as many join as die or leave
    leaves_per_peer_hour: float = 0.0
    noise: float = 0.0  # standard deviation of rates as measured anew for each renewal, as a share of the true ones
    join_within: float = 600.0  # when the first peers join, each at a time of its own
    placed: Sequence[int] | None = None  # or where they are at the start
    view_every: float = 2.0  # the directory changes for its readers this often,
    views_behind: int = 2  # and who plans reads a view that is up to this many older
    load_seconds: tuple[float, float] = (20.0, 60.0)
    drain_seconds: float = 5.0
    settle_seconds: float = 5.0  # from a claim to its check: longer than a view takes
    policy: Policy | None = field(default_factory=Policy)  # None: nobody ever moves


@dataclass
class Machine:
    """A participant, as it truly is."""

    profile: MachineProfile
    stage: int = -1
    ready: bool = False  # has loaded its first stage
    serves: bool = False
    alive: bool = True
    moving: bool = False
    last_moved_at: float = -FOREVER


@dataclass
class History:
    """What happened."""

    moves: list[tuple[float, Move]] = field(default_factory=list)
    taken_back: int = 0  # moves that were given up once others' claims were seen
    emptied: int = 0  # stages left by their last peer that the directory knew
    joins: int = 0
    chosen_again: int = 0  # claims of newcomers that were given up for another stage
    samples: list[tuple[float, float, float]] = field(default_factory=list)  # when, the swarm's rate, and the bound
    peer_hours: float = 0.0

    def share_of_bound(self, since: float = 0.0) -> float:
        """The swarm's microbatches as a share of what the bound would have given."""
        late = [sample for sample in self.samples if sample[0] >= since]
        return sum(rate for _, rate, _ in late) / sum(bound for _, _, bound in late)

    @property
    def moves_per_peer_hour(self) -> float:
        return len(self.moves) / self.peer_hours

    def moves_since(self, when: float) -> int:
        return sum(at >= when for at, _ in self.moves)


class Simulation:
    """One history of one swarm. After `run`, `machines` are as they ended."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        costs = scenario.costs or StageCosts.alike(scenario.num_stages)
        if scenario.small_share > 0:
            costs = replace(costs, memory_bytes=(1,) * (scenario.num_stages - 1) + (2,))
        self.costs = costs
        self.machines: dict[str, Machine] = {}
        self.history = History()
        self._random = random.Random(scenario.seed)
        self._now = 0.0
        self._order = itertools.count()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._stages: list[dict[str, PeerEntry]] = [{} for _ in range(scenario.num_stages)]
        self._newest: DirectorySnapshot | None = None
        self._views: list[DirectorySnapshot] = []
        self._plans: dict[tuple[float, int], tuple[Move, ...]] = {}

    def run(self) -> History:
        scenario = self.scenario
        if scenario.placed is None:
            for _ in range(scenario.num_peers):
                self._after(self._random.uniform(0, scenario.join_within), self._arrive)
        else:
            for stage in scenario.placed:
                self._place(self._machine(), stage)
        for rate, leave in ((scenario.deaths_per_peer_hour, self._die), (scenario.leaves_per_peer_hour, self._depart)):
            if rate > 0:
                self._churn(HOUR / (rate * scenario.num_peers), leave)
        if scenario.noise > 0:
            self._renew()
        self._look()
        while self._events and self._events[0][0] <= scenario.seconds:
            self._now, _, happen = heapq.heappop(self._events)
            happen()
        return self.history

    @property
    def rates(self) -> list[float]:
        """By stage, of those that truly serve."""
        rates = [0.0] * self.scenario.num_stages
        for machine in self.machines.values():
            if machine.serves:
                rates[machine.stage] += machine.profile.rates[machine.stage]
        return rates

    def bound(self) -> float:
        """No placement of those who could serve is faster, not even one that could cut machines into pieces."""
        machines = [m.profile for m in self.machines.values() if m.ready]
        reference = self.costs.compute
        whole = sum(m.throughput for m in machines) / sum(reference)
        large = sum(m.throughput for m in machines if m.fits[-1]) / reference[-1]
        return min(whole, large)

    # -- what happens -------------------------------------------------------------------------------------------

    def _after(self, seconds: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self._now + seconds, next(self._order), happen))

    def _look(self) -> None:
        """The directory's readers see a new state, and those named by a plan may look."""
        scenario = self.scenario
        self._views = [self._snapshot(), *self._views[: scenario.views_behind]]
        rate = min(self.rates)
        self.history.samples.append((self._now, rate, self.bound()))
        self.history.peer_hours += sum(m.alive for m in self.machines.values()) * scenario.view_every / HOUR
        if scenario.policy is not None:
            chance = scenario.view_every / LOOK_EVERY / len(self._views)
            for view in self._views:
                plan = self._plan(view, scenario.policy)
                for move in plan:
                    if self._random.random() < chance:
                        self._consider(move, plan, view, scenario.policy)
        self._after(scenario.view_every, self._look)

    def _plan(self, view: DirectorySnapshot, policy: Policy) -> tuple[Move, ...]:
        key = view.taken_at, int(self._now / PLAN_EVERY)
        if key not in self._plans:
            self._plans = {k: plan for k, plan in self._plans.items() if k[0] >= self._views[-1].taken_at}
            self._plans[key] = plan_moves(view, self.costs, policy, now=self._now)
        return self._plans[key]

    def _renew(self) -> None:
        for machine in self.machines.values():
            if machine.serves and not machine.moving:
                reserved_at = self._stages[machine.stage][machine.profile.peer_id].reserved_at
                self._publish(machine, machine.stage, SERVING, reserved_at)
        self._after(RENEWAL, self._renew)

    def _consider(self, move: Move, plan: Sequence[Move], view: DirectorySnapshot, policy: Policy) -> None:
        machine = self.machines.get(move.peer_id)
        if machine is None or not machine.serves or machine.moving:
            return
        decided = decide_move(
            plan, view, machine.profile, self.costs, policy, now=self._now, last_moved_at=machine.last_moved_at
        )
        if decided is None:
            return
        machine.moving = True
        self._publish(machine, decided.target, RESERVED, self._now)

        def check() -> None:
            if not machine.alive:
                return
            if is_move_right(decided, self._snapshot(), machine.profile, self.costs, policy, now=self._now):
                self._leave_for(machine, decided)
            else:
                self.history.taken_back += 1
                machine.moving = False
                self._withdraw(decided.peer_id, decided.target)

        self._after(self.scenario.settle_seconds, check)

    def _leave_for(self, machine: Machine, move: Move) -> None:
        others = [e for e in self._stages[move.source].values() if e.peer_id != move.peer_id]
        staying = [e for e in others if e.state == SERVING and e.expires_at > self._now]
        self.history.emptied += not staying
        self.history.moves.append((self._now, move))
        machine.last_moved_at = self._now
        self._publish(machine, move.source, DRAINING, self._now)
        self._after(self.scenario.drain_seconds, lambda: self._drained(machine, move.target))

    def _drained(self, machine: Machine, target: int) -> None:
        if machine.alive:
            self._withdraw(machine.profile.peer_id, machine.stage)
            self._load(machine, target)

    def _load(self, machine: Machine, stage: int) -> None:
        machine.serves, machine.stage = False, stage
        self._after(self._random.uniform(*self.scenario.load_seconds), lambda: self._serve(machine))

    def _serve(self, machine: Machine) -> None:
        if machine.alive:
            machine.ready, machine.serves, machine.moving = True, True, False
            reserved_at = self._stages[machine.stage][machine.profile.peer_id].reserved_at
            self._publish(machine, machine.stage, SERVING, reserved_at)

    def _arrive(self) -> None:
        self.history.joins += 1
        machine = self._machine()
        view = self._random.choice(self._views)
        choice = choose_stage(view, machine.profile, now=self._now, max_replicas=None, costs=self.costs)
        self._claim(machine, choice.stage, self._now, SECOND_THOUGHTS)

    def _claim(self, machine: Machine, stage: int, claimed_at: float, thoughts: int) -> None:
        self._publish(machine, stage, RESERVED, claimed_at)

        def check() -> None:
            if not machine.alive:
                return
            better = reconsider(self._snapshot(), machine.profile, now=self._now, costs=self.costs)
            if better is None or not thoughts:
                self._load(machine, stage)
                return
            self.history.chosen_again += 1
            self._withdraw(machine.profile.peer_id, stage)
            self._claim(machine, better.stage, claimed_at, thoughts - 1)

        self._after(self.scenario.settle_seconds, check)

    def _churn(self, mean: float, leave: Callable[[Machine], None]) -> None:
        def happen() -> None:
            present = [machine for machine in self.machines.values() if machine.alive]
            if present:
                leave(self._random.choice(present))
                self._arrive()
            self._churn(mean, leave)

        self._after(self._random.expovariate(1 / mean), happen)

    def _die(self, machine: Machine) -> None:
        """Its records stay until they expire."""
        self._gone(machine)
        expires_at, self._newest = self._now + self._random.uniform(LIFETIME - RENEWAL, LIFETIME), None
        for stage in self._stages:
            if machine.profile.peer_id in stage:
                stage[machine.profile.peer_id] = replace(stage[machine.profile.peer_id], expires_at=expires_at)

    def _depart(self, machine: Machine) -> None:
        """Says goodbye."""
        self._gone(machine)
        for stage in range(self.scenario.num_stages):
            self._withdraw(machine.profile.peer_id, stage)

    def _gone(self, machine: Machine) -> None:
        machine.alive = machine.serves = False
        del self.machines[machine.profile.peer_id]

    # -- machines and records -----------------------------------------------------------------------------------

    def _machine(self) -> Machine:
        scenario, number = self.scenario, len(self.machines) + self.history.joins
        small = self._random.random() < scenario.small_share
        profile = MachineProfile.measured(
            f"peer{number}-{self._random.randrange(1 << 30)}",
            self.costs,
            self._random.uniform(1.0, scenario.spread),
            at=_reference(self.costs),
            available_bytes=1 if small else float("inf"),
        )
        machine = self.machines[profile.peer_id] = Machine(profile)
        return machine

    def _place(self, machine: Machine, stage: int) -> None:
        machine.stage, machine.ready, machine.serves = stage, True, True
        self._publish(machine, stage, SERVING, -HOUR)

    def _publish(
        self, machine: Machine, stage: int, state: records_pb2.PeerState.ValueType, reserved_at: float
    ) -> None:
        noise = max(0.1, self._random.gauss(1.0, self.scenario.noise)) if self.scenario.noise else 1.0
        self._newest = None
        self._stages[stage][machine.profile.peer_id] = PeerEntry(
            run_id=RUN,
            stage=stage,
            peer_id=machine.profile.peer_id,
            endpoints=("h:1",),
            state=state,
            throughput=machine.profile.rates[stage] * noise,
            reserved_at=reserved_at,
            expires_at=FOREVER,
        )

    def _withdraw(self, peer_id: str, stage: int) -> None:
        self._newest = None
        self._stages[stage].pop(peer_id, None)

    def _snapshot(self) -> DirectorySnapshot:
        """The records as they are; the same object until one changes. Those that expire meanwhile stay, expired."""
        if self._newest is None:
            for stage in self._stages:
                for entry in [e for e in stage.values() if e.expires_at <= self._now]:
                    del stage[entry.peer_id]
            self._newest = DirectorySnapshot(RUN, tuple(tuple(stage.values()) for stage in self._stages), self._now)
        return self._newest


def _reference(costs: StageCosts) -> int:
    """A stage of relative cost 1."""
    return costs.compute.index(1.0)


def best_bottleneck(profiles: Sequence[MachineProfile], num_stages: int) -> float:
    """Of all placements, by trying each: for a handful of machines."""
    best = 0.0
    for stages in itertools.product(range(num_stages), repeat=len(profiles)):
        rates = [0.0] * num_stages
        for profile, stage in zip(profiles, stages, strict=True):
            rates[stage] += profile.rates[stage]
        best = max(best, min(rates))
    return best
