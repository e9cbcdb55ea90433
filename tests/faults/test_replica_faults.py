"""Many replicas a stage, and machines that come, stall and die: every step's sum is what one process computes.

Ledgers and agreements as they ship, joined by an adversary: toy arithmetic (sums without an order, since replicas have
none), links that are cut and delayed, averagings that fail. Whoever commits must hold exactly the weights that a
single process would hold, and the run must end.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from coordinator.agreement import (
    Action,
    Average,
    Commit,
    Propose,
    Resync,
    Round,
    StageAgreement,
    Tally,
    Tell,
    digest_of_shares,
)
from node.replication.duties import News, ReplicaDuties, sizes
from stage_server import ledger as tasks
from stage_server.ids import MicrobatchId, MicrobatchKind
from stage_server.ledger import StageLedger
from stage_server.plan import Plan
from stage_server.work import Backward, Declined, Forward, Forwarded, Outbound, Side, Task

PRIME = (1 << 61) - 1
TRAIN = MicrobatchKind.TRAIN
PLAN = Plan(steps=5, microbatches_per_step=6, evaluation_microbatches=2, evaluate_every=2)
EVERY = 2
MAX_EVENTS = 60_000


def token(name: MicrobatchId) -> int:
    return (name.step * 1_000_003 + int(name.kind) * 7919 + name.index * 31 + 17) % PRIME


def forward(stage: int, weight: int, x: int) -> int:
    return (x * 31 + weight * (stage + 3)) % PRIME


def contribution(x: int, gradient: int) -> int:
    return (gradient * 13 + x) % PRIME


def backward(stage: int, weight: int, gradient: int) -> int:
    return (gradient * 17 + weight * (stage + 5)) % PRIME


def stepped(weight: int, total: int) -> int:
    return (weight * 3 + total) % PRIME


@dataclass(frozen=True)
class Expected:
    """What one process computes: by stage the weights after each step, and each step's losses."""

    weights: list[list[int]]
    losses: dict[int, list[float]]
    evaluations: dict[int, list[float]]


def one_process(num_stages: int) -> Expected:
    weights = [[1000 + stage] for stage in range(num_stages)]
    losses, evaluations = dict[int, list[float]](), dict[int, list[float]]()
    for step in range(1, PLAN.last_step + 1):
        sums = [0] * num_stages
        for name in PLAN.microbatches(step):
            inputs = [token(name)]
            for stage in range(num_stages):
                inputs.append(forward(stage, weights[stage][-1], inputs[-1]))
            kept = losses if name.kind is TRAIN else evaluations
            kept.setdefault(step, []).append(float(inputs[-1] % 997))
            gradient = inputs[-1]
            for stage in reversed(range(num_stages)) if name.kind is TRAIN else ():
                sums[stage] += contribution(inputs[stage], gradient)
                gradient = backward(stage, weights[stage][-1], gradient)
        if PLAN.commits(step):
            for stage in range(num_stages):
                weights[stage].append(stepped(weights[stage][-1], sums[stage] % PRIME))
    return Expected(weights, losses, evaluations)


EXPECTED = {num_stages: one_process(num_stages) for num_stages in (1, 2, 3)}


@dataclass
class Replica:
    """One machine: ledger and agreement as they ship, toys for the rest."""

    name: str
    stage: int
    num_stages: int
    claim: float
    weight: int = 0
    earlier: int = 0  # the weight that the newest committed step started from
    sum: int = 0
    stopped: bool = False
    resync: Resync | None = None
    averaging: tuple[Average, int] | None = None
    results: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = StageLedger(
            PLAN, stage=self.stage, num_stages=self.num_stages, checkpoints=(), checkpoint_every=EVERY, shared=True
        )
        self.weight = 1000 + self.stage
        self.agreement = StageAgreement(self.name, sizes(PLAN))
        self.duties = ReplicaDuties(self.ledger, self.agreement)

    @property
    def is_serving(self) -> bool:
        return not self.stopped and self.resync is None

    def perform(self, task: Task) -> list[Outbound]:
        ledger = self.ledger
        match task:
            case Forward(name, payload, late):
                weight = self.earlier if late else self.weight
                x = token(name) if payload is None else payload
                y = forward(self.stage, weight, x)
                if not ledger.is_last:
                    return ledger.forwarded(name, y)
                if not late and name.kind is TRAIN:
                    self.sum += contribution(x, y)
                return ledger.finished(name, float(y % 997), backward(self.stage, weight, y))
            case Backward(name, (loss, gradient), late):
                weight = self.earlier if late else self.weight
                if not late:
                    ((_, x, _),) = ledger.inputs_of([name])
                    self.sum += contribution(token(name) if x is None else x, gradient)
                return ledger.finished(name, loss, backward(self.stage, weight, gradient))
            case tasks.Checkpoint(step):
                ledger.checkpointed(step)
        return []

    def recount(self, names: list[MicrobatchId]) -> None:
        """Adds microbatches that were done here to the sum once more."""
        for name, payload, returned in self.ledger.inputs_of(names):
            x = token(name) if payload is None else payload
            gradient = forward(self.stage, self.weight, x) if returned is None else returned[1]
            self.sum += contribution(x, gradient)

    def commit(self, step: int, total: int, expected: Expected) -> None:
        if PLAN.commits(step):
            self.earlier, self.weight = self.weight, stepped(self.weight, total % PRIME)
            assert self.weight == expected.weights[self.stage][step], f"step {step} of stage {self.stage}"
        # Who learns late that the others have committed may not have heard of all losses, but hears of no wrong one.
        assert set(self.ledger.losses(TRAIN)) <= set(expected.losses.get(step, []))
        assert set(self.ledger.losses(MicrobatchKind.EVALUATE)) <= set(expected.evaluations.get(step, []))
        self.ledger.agreed(step)
        if PLAN.commits(step):
            self.ledger.committed_step(step)
        self.sum, self.results, self.averaging = 0, {}, None


class Swarm:
    """All replicas, the network between them, and what goes wrong."""

    def __init__(self, seed: int, replicas: list[int]) -> None:
        self.chance = random.Random(seed)
        self.num_stages = len(replicas)
        self.expected = EXPECTED[self.num_stages]
        self.numbers = count(1)
        self.replicas: dict[str, Replica] = {}
        self.links: dict[tuple[str, str], dict[Side, deque]] = {}  # (upper, lower); queue by direction
        self.post: list[tuple[str, str, object]] = []  # between replicas of a stage: sender, receiver, message
        for stage, number in enumerate(replicas):
            for _ in range(number):
                self.join(stage)

    def of(self, stage: int) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.stage == stage]

    # -- the world ----------------------------------------------------------------------------------------------

    def join(self, stage: int) -> None:
        if len(self.of(stage)) >= 4:
            return
        number = next(self.numbers)
        replica = Replica(f"r{number}", stage, self.num_stages, claim=number)
        self.replicas[replica.name] = replica

    def established(self, stage: int) -> list[Replica]:
        newest = max(replica.agreement.committed for replica in self.of(stage))
        return [r for r in self.of(stage) if r.is_serving and r.agreement.committed == newest]

    def kill(self) -> None:
        """Whoever is not the last of its stage."""
        victim = self.chance.choice(list(self.replicas.values()))
        if len([r for r in self.established(victim.stage) if r is not victim]) > 0:
            self.cut_all(victim)
            del self.replicas[victim.name]

    def stop(self) -> None:
        victim = self.chance.choice(list(self.replicas.values()))
        if len([r for r in self.established(victim.stage) if r is not victim]) > 0:
            victim.stopped = True

    def go_on(self) -> None:
        for replica in self.replicas.values():
            replica.stopped = False

    def cut_all(self, replica: Replica) -> None:
        for key in [key for key in self.links if replica.name in key]:
            self.cut(key)

    def cut(self, key: tuple[str, str]) -> None:
        upper, lower = (self.replicas[name] for name in key)
        del self.links[key]
        upper.ledger.closed(Side.DOWNSTREAM, lower.name)
        lower.ledger.closed(Side.UPSTREAM, upper.name)

    def cut_one(self) -> None:
        if self.links:
            self.cut(self.chance.choice(sorted(self.links)))

    def give_up(self) -> None:
        """Whoever is waited for in vain is not waited for any more."""
        for upper in self.replicas.values():
            for name in upper.ledger.routes.addressees():
                lower = self.replicas.get(name)
                if lower is None or lower.stopped or (upper.name, name) not in self.links:
                    upper.ledger.routes.leave(name)

    def dial(self) -> None:
        upper = self.chance.choice(list(self.replicas.values()))
        lower = self.chance.choice(list(self.replicas.values()))
        key = upper.name, lower.name
        if lower.stage != upper.stage + 1 or key in self.links or not (upper.is_serving and lower.is_serving):
            return
        said_above = upper.ledger.committed, upper.ledger.holdings(Side.DOWNSTREAM, lower.name)
        said_below = lower.ledger.committed, lower.ledger.holdings(Side.UPSTREAM, upper.name)
        back = lower.ledger.opened(Side.UPSTREAM, *said_above, peer=upper.name)
        down = upper.ledger.opened(Side.DOWNSTREAM, *said_below, peer=lower.name)
        self.links[key] = {Side.DOWNSTREAM: deque(down), Side.UPSTREAM: deque(back)}
        self.report(upper)
        self.report(lower)

    def look_around(self, *, wrongly: bool = False) -> None:
        for replica in list(self.replicas.values()):
            if replica.stopped:
                continue
            seen = [r for r in self.of(replica.stage) if not r.stopped and not (wrongly and self.chance.random() < 0.2)]
            claims = {r.name: r.claim for r in self.of(replica.stage)}
            replica.duties.in_sight({replica.name: 1.0} | {r.name: 1.0 for r in seen})
            self.act(replica, replica.agreement.in_sight([r.name for r in seen], claims))

    # -- computing ----------------------------------------------------------------------------------------------

    def compute(self) -> None:
        replica = self.chance.choice(list(self.replicas.values()))
        if not replica.is_serving or not (replica.duties.is_level or replica.duties.is_closed):
            return
        if names := replica.duties.to_recount():
            replica.recount(names)
            replica.ledger.share({*replica.ledger.counted, *names})
            self.act(replica, replica.duties.reconcile())
            return
        task = replica.ledger.next_task()
        if task is None or isinstance(task, tasks.Commit):
            return
        self.send(replica, replica.perform(task))
        self.act(replica, replica.duties.reconcile())
        self.report(replica)

    def send(self, replica: Replica, items: list[Outbound], only: str | None = None) -> None:
        for item in items:
            if isinstance(item, Forwarded):
                self.send_down(replica, item)
                continue
            askers = [only] if only else replica.ledger.routes.askers(item.name)
            for asker in askers:
                link = self.links.get((asker, replica.name))
                wanted = isinstance(item, Declined) or replica.ledger.wants(Side.UPSTREAM, item.name, asker)
                if link is not None and wanted:
                    link[Side.UPSTREAM].append(item)

    def send_down(self, replica: Replica, item: Forwarded) -> None:
        ledger = replica.ledger
        if ledger.routes.to(item.name) is None:
            linked = [
                lower
                for upper, lower in self.links
                if upper == replica.name and ledger.routes.may_ask(item.name, lower)
            ]
            if not linked:
                return
            ledger.routes.send_to(item.name, self.chance.choice(sorted(linked)))
        peer = ledger.routes.to(item.name)
        link = self.links.get((replica.name, peer))
        if link is not None and ledger.wants(Side.DOWNSTREAM, item.name, peer):
            link[Side.DOWNSTREAM].append(item)

    def adopt_orphans(self) -> None:
        for replica in self.replicas.values():
            if replica.is_serving:
                for item in replica.ledger.orphans():
                    self.send_down(replica, item)

    def report(self, replica: Replica) -> None:
        for upper, lower in self.links:
            if upper == replica.name:
                status = *replica.ledger.status(Side.DOWNSTREAM), replica.ledger.settled(Side.DOWNSTREAM)
                self.links[upper, lower][Side.DOWNSTREAM].append(status)
            elif lower == replica.name:
                status = *replica.ledger.status(Side.UPSTREAM), replica.ledger.settled(Side.UPSTREAM)
                self.links[upper, lower][Side.UPSTREAM].append(status)

    def deliver(self) -> None:
        waiting = [(key, side) for key, queues in self.links.items() for side, queue in queues.items() if queue]
        if not waiting:
            return
        (upper, lower), side = self.chance.choice(waiting)
        receiver, sender = (lower, upper) if side is Side.DOWNSTREAM else (upper, lower)
        replica = self.replicas[receiver]
        if not replica.is_serving:
            return
        item = self.links[upper, lower][side].popleft()
        match item:
            case Forwarded(name, body):
                self.send(replica, replica.ledger.receive_latents(name, body, sender), only=sender)
            case Declined(name):
                replica.ledger.routes.declined(name, sender)
            case tasks.Returned(name, loss, body):
                value = body if isinstance(body, tuple) else (loss, body)
                self.send(replica, replica.ledger.receive_gradients(name, loss, value, sender))
                self.act(replica, replica.duties.reconcile())
            case (committed, durable, settled):
                towards = Side.UPSTREAM if side is Side.DOWNSTREAM else Side.DOWNSTREAM
                if replica.ledger.receive_status(towards, committed, durable, sender, settled=settled):
                    self.report(replica)

    # -- replicas of one stage ----------------------------------------------------------------------------------

    def act(self, replica: Replica, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Tell():
                    self.tell(replica)
                case Propose(proposed, members):
                    self.post += [(replica.name, name, proposed) for name in members if name != replica.name]
                    if replica.name in members:
                        self.act(replica, replica.agreement.receive_round(proposed))
                case Average(round_, share):
                    names = replica.duties.names(share)
                    if names != replica.ledger.counted:
                        replica.sum = 0
                        replica.recount(sorted(names))
                        replica.ledger.share(names)
                    replica.averaging = action, replica.sum
                    if len(round_.shares) == 1:
                        self.finish_average_of(replica, hostile=False)
                case Commit(step, averaged):
                    replica.commit(step, replica.results[averaged.round], self.expected)
                    self.report(replica)
                case Resync():
                    replica.resync = action
                    self.cut_all(replica)
        replica.duties.freeze()

    def tell(self, replica: Replica) -> None:
        message = replica.agreement.tally(), replica.duties.news()
        self.post += [(replica.name, r.name, message) for r in self.of(replica.stage) if r is not replica]

    def gossip(self) -> None:
        for replica in self.replicas.values():
            if not replica.stopped:
                self.tell(replica)

    def hand_over(self, *, lose: float = 0.0) -> None:
        if not self.post:
            return
        sender, receiver, message = self.post.pop(self.chance.randrange(len(self.post)))
        replica = self.replicas.get(receiver)
        if replica is None or replica.stopped or self.chance.random() < lose:
            return
        if isinstance(message, Round):
            self.act(replica, replica.agreement.receive_round(message))
        else:
            tally, news = message
            assert isinstance(tally, Tally)
            assert isinstance(news, News)
            replica.duties.receive_news(sender, news)
            self.act(replica, replica.agreement.receive_tally(tally))
        self.act(replica, replica.duties.reconcile())

    def finish_average(self, *, hostile: bool) -> None:
        waiting = [r for r in self.replicas.values() if r.averaging and r.is_serving]
        if waiting:
            replica = self.chance.choice(waiting)
            self.finish_average_of(replica, hostile=hostile)
            self.act(replica, replica.duties.reconcile())

    def finish_average_of(self, replica: Replica, *, hostile: bool) -> None:
        assert replica.averaging is not None
        average, _ = replica.averaging
        round_ = average.round
        members = [self.replicas.get(name) for name in round_.shares]
        key = round_.step, round_.lineage, round_.number, digest_of_shares(round_)  # as in sums.py
        for member in members:
            if member and member.averaging and member.averaging[0].round == round_:
                self.given[member.name, *key] = member.averaging[1]
        given = [self.given.get((m.name, *key)) if m else None for m in members]
        whole = all(value is not None for value in given)
        if not whole and self.chance.random() < 0.95:
            return  # waits for the others, and gives up in the end
        replica.averaging = None
        total = sum(value for value in given if value is not None)
        digest: str | None = f"{round_.step}/{round_.number}/{total}"
        # or it kept its own values for a part, which its checksums tell it (averaging_contribution.py)
        if not whole or (hostile and self.chance.random() < 0.4):
            digest = None
        replica.results[round_.number] = total
        size = sizes(PLAN)(round_.step)
        self.act(replica, replica.agreement.averaged(round_.number, digest, size))

    def finish_resync(self) -> None:
        for replica in list(self.replicas.values()):
            if replica.resync is None or replica.stopped:
                continue
            donor = self.replicas.get(replica.resync.peer)
            replica.resync = None
            replica.sum, replica.results, replica.averaging = 0, {}, None
            if donor is None or not donor.is_serving or not (donor.duties.is_level or donor.duties.is_closed):
                own = replica.agreement
                self.act(replica, own.resynced(own.committed, own.lineage))
                continue
            replica.weight, replica.earlier = donor.weight, donor.earlier
            committed = donor.ledger.committed
            replica.ledger.adopted(committed, durable=committed, has_earlier_weights=committed > 0)
            if donor.duties.is_closed:
                replica.ledger.agreed(PLAN.last_step)
            self.act(replica, replica.agreement.resynced(donor.agreement.committed, donor.agreement.lineage))

    given: dict[tuple[str, int, str, int, str], int]

    def run(self, faults: dict[int, list[str]]) -> None:
        self.given = {}
        self.look_around()
        quiet_after = max(faults, default=0) + 1
        for event in range(MAX_EVENTS):
            if self.is_over():
                return
            for fault in faults.get(event, ()):
                self.inject(fault)
            hostile = event < quiet_after
            while len(self.post) > 60:
                self.hand_over()
            if event % 60 == 0:
                self.look_around(wrongly=hostile and self.chance.random() < 0.1)
                self.gossip()
                self.give_up()
                self.adopt_orphans()
                self.finish_resync()
                if not hostile:
                    self.go_on()
            self.happen(hostile=hostile)
        pytest.fail("the run does not end:\n" + self.describe())

    def happen(self, *, hostile: bool) -> None:
        match self.chance.randrange(10):
            case 0 | 1:
                self.compute()
            case 2 | 3 | 4:
                self.deliver()
            case 5:
                self.dial()
            case 6 | 7 | 8:
                self.hand_over(lose=0.05 if hostile else 0.0)
            case _:
                self.finish_average(hostile=hostile and self.chance.random() < 0.3)

    def inject(self, fault: str) -> None:
        {
            "kill": self.kill,
            "stop": self.stop,
            "go_on": self.go_on,
            "cut": self.cut_one,
            "join": lambda: self.join(self.chance.randrange(self.num_stages)),
        }[fault]()

    def is_over(self) -> bool:
        """Every stage has closed the run, on every machine that is level with the others."""
        return all(replica.agreement.committed == PLAN.last_step for replica in self.replicas.values())

    def describe(self) -> str:
        lines = []
        for r in self.replicas.values():
            lines.append(f"{r.name} stage {r.stage} {r.agreement.tally()} {r.stopped=} {r.resync=} {r.averaging=}")
            lines.append(f"    missing {sorted(r.agreement.missing)} done {sorted(map(str, r.ledger.done))}")
            lines.append(
                f"    outstanding {r.ledger.outstanding()} window {r.ledger.window} task {r.ledger.next_task()}"
            )
        return "\n".join([*lines, *map(str, self.links)])


FAULTS = ("kill", "stop", "stop", "go_on", "cut", "join", "join")


@settings(max_examples=30, deadline=None)
@example(replicas=[3], seed=1444, faults=[(1321, "kill")])  # two leaders propose different shares under one number
@given(
    replicas=st.sampled_from([[1], [3], [1, 1], [2, 2], [2, 1, 2], [1, 3, 1], [2, 2, 2], [3, 2, 3]]),
    seed=st.integers(0, 2**32),
    faults=st.lists(st.tuples(st.integers(0, 3000), st.sampled_from(FAULTS)), max_size=25),
)
def test_whoever_comes_and_goes_the_weights_are_those_of_one_process(
    replicas: list[int], seed: int, faults: list[tuple[int, str]]
) -> None:
    plan: dict[int, list[str]] = {}
    for event, fault in faults:
        plan.setdefault(event, []).append(fault)
    swarm = Swarm(seed, replicas)
    swarm.run(plan)
    for replica in swarm.replicas.values():
        assert replica.weight == swarm.expected.weights[replica.stage][-1]
