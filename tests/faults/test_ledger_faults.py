"""Exactly once, whatever happens: ledgers joined by a hostile network, hundreds of fault plans.

The stages' arithmetic is a toy whose result depends on the value, the number and the order of everything that enters
it, so any microbatch lost, doubled or swapped changes the digest. The real arithmetic stands in test_peer_faults.py.
"""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field
from itertools import count, pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stage_server.errors import RewindNeeded
from stage_server.ids import MicrobatchId, MicrobatchKind
from stage_server.ledger import StageLedger
from stage_server.plan import Plan
from stage_server.work import Backward, Checkpoint, Commit, Forward, Forwarded, Side, Task

PRIME = (1 << 61) - 1
MAX_EVENTS = 60_000
FAULTS = ("cut", "duplicate", "reorder", "delay", "kill", "kill_two", "kill_at_checkpoint", "drain")


@dataclass
class ToyStage:
    """A ledger with integers for weights. `disk` survives a kill; everything else does not."""

    index: int
    num_stages: int
    plan: Plan
    every: int
    disk: dict[int, int] = field(default_factory=dict)
    losses: dict[int, list[float]] = field(default_factory=dict)
    evaluations: dict[int, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.sum = 0
        self.saved: dict[MicrobatchId, int] = {}
        self.ledger = StageLedger(
            self.plan,
            stage=self.index,
            num_stages=self.num_stages,
            checkpoints=sorted(self.disk),
            checkpoint_every=self.every,
        )
        self.weight = self.disk.get(self.ledger.committed, 1000 + self.index)

    def rewind(self, to_step: int) -> None:
        self.disk = {step: weight for step, weight in self.disk.items() if step <= to_step}
        assert self.disk, f"stage {self.index} has no checkpoint at or before step {to_step}"
        self.start()

    def prune(self) -> None:
        floor = self.ledger.floor
        if floor is not None:
            keep = max(step for step in self.disk if step <= floor)
            self.disk = {step: weight for step, weight in self.disk.items() if step >= keep}

    def perform(self, task: Task) -> list:
        match task:
            case Forward(name, payload):
                x = _token(name) if payload is None else payload
                y = (x * 31 + self.weight * (self.index + 3)) % PRIME
                if not self.ledger.is_last:
                    self.saved[name] = x
                    out = self.ledger.forwarded(name, y)
                    self._note(name)
                    return out
                loss = float(y % 997)
                if name.kind is MicrobatchKind.TRAIN:
                    self._accumulate(y)
                out = self.ledger.finished(name, loss, y * 5 % PRIME)
                self._note(name)
                return out
            case Backward(name, (loss, gradient)):
                self._accumulate(gradient + self.saved.pop(name))
                return self.ledger.finished(name, loss, (loss, gradient * 17 % PRIME))
            case Commit(step):
                self.losses[step] = self.ledger.losses(MicrobatchKind.TRAIN)
                self.weight = (self.weight * 3 + self.sum) % PRIME
                self.sum = 0
                self.ledger.committed_step(step)
            case Checkpoint(step):
                self.disk[step] = self.weight
                self.ledger.checkpointed(step)
                self.prune()
        return []

    def receive(self, item) -> list:
        if isinstance(item, Forwarded):
            return self.ledger.receive_latents(item.name, item.body)
        body = item.body if isinstance(item.body, tuple) else (item.loss, item.body)
        out = self.ledger.receive_gradients(item.name, item.loss, body)
        self._note(item.name)
        return out

    def _accumulate(self, value: int) -> None:
        self.sum = (self.sum * 7 + value) % PRIME

    def _note(self, name: MicrobatchId) -> None:
        if name.kind is MicrobatchKind.EVALUATE:
            losses = self.ledger.losses(MicrobatchKind.EVALUATE)
            if len(losses) == self.plan.evaluation_microbatches:
                self.evaluations[self.ledger.committed] = losses


def _token(name: MicrobatchId) -> int:
    return hash((name.step, int(name.kind), name.index)) % PRIME


class ToySwarm:
    """Stages, links as queues, and an adversary that picks what happens next."""

    def __init__(self, num_stages: int, plan: Plan, every: int, seed: int) -> None:
        self.random = random.Random(seed)
        self.stages = [ToyStage(s, num_stages, plan, every) for s in range(num_stages)]
        self.open: set[int] = set()  # link i joins stage i and i + 1
        self.queues: dict[tuple[int, Side], deque] = {}
        self.newest_status: dict[tuple[int, Side], int] = {}
        self.sequence = count(1)

    def run(self, faults: dict[int, list[str]]) -> None:
        for event in range(MAX_EVENTS):
            if self.finished():
                return
            for fault in faults.get(event, ()):
                self.inject(fault)
            self.random.choice((self.compute, self.compute, self.deliver, self.deliver, self.tell, self.dial))()
        pytest.fail("the run did not finish: a microbatch is lost or everybody waits")

    def finished(self) -> bool:
        return all(stage.ledger.complete for stage in self.stages)

    # -- what happens ------------------------------------------------------------------------------------------

    def compute(self) -> None:
        stage = self.random.choice(self.stages)
        task = stage.ledger.next_task()
        if task is not None:
            self.send(stage, stage.perform(task))
            if isinstance(task, Commit | Checkpoint):
                self.report(stage)

    def deliver(self) -> None:
        waiting = [key for key, queue in self.queues.items() if queue]
        if not waiting:
            return
        link, towards = self.random.choice(waiting)
        item = self.queues[link, towards].popleft()
        stage = self.stages[link + (towards is Side.DOWNSTREAM)]
        if isinstance(item, tuple) and item[0] == "status":
            side = Side.UPSTREAM if towards is Side.DOWNSTREAM else Side.DOWNSTREAM
            if item[3] <= self.newest_status.get((link, towards), 0):
                return  # as LinkSession does
            self.newest_status[link, towards] = item[3]
            if stage.ledger.receive_status(side, item[1], item[2]):
                self.report(stage)
            stage.prune()
        else:
            self.send(stage, stage.receive(item))

    def tell(self) -> None:
        self.report(self.random.choice(self.stages))

    def dial(self) -> None:
        closed = [link for link in range(len(self.stages) - 1) if link not in self.open]
        if closed:
            self.handshake(self.random.choice(closed))

    def handshake(self, link: int) -> None:
        upper, lower = self.stages[link], self.stages[link + 1]
        upper_says = (upper.ledger.committed, upper.ledger.holdings(Side.DOWNSTREAM))
        lower_says = (lower.ledger.committed, lower.ledger.holdings(Side.UPSTREAM))
        try:
            back = lower.ledger.opened(Side.UPSTREAM, *upper_says)
        except RewindNeeded as error:
            return self.restart(lower, rewind_to=error.to_step)
        try:
            down = upper.ledger.opened(Side.DOWNSTREAM, *lower_says)
        except RewindNeeded as error:
            return self.restart(upper, rewind_to=error.to_step)
        self.open.add(link)
        self.queues[link, Side.DOWNSTREAM] = deque(down)
        self.queues[link, Side.UPSTREAM] = deque(back)
        self.report(upper)
        self.report(lower)
        return None

    def send(self, stage: ToyStage, items: list) -> None:
        for item in items:
            down = isinstance(item, Forwarded)
            link = stage.index if down else stage.index - 1
            side = Side.DOWNSTREAM if down else Side.UPSTREAM
            if link in self.open and stage.ledger.wants(side, item.name):
                self.queues[link, side].append(item)

    def report(self, stage: ToyStage) -> None:
        for side, link in ((Side.DOWNSTREAM, stage.index), (Side.UPSTREAM, stage.index - 1)):
            if link in self.open:
                self.queues[link, side].append(("status", *stage.ledger.status(side), next(self.sequence)))

    # -- faults ------------------------------------------------------------------------------------------------

    def inject(self, fault: str) -> None:
        stage = self.random.choice(self.stages)
        busy = [queue for queue in self.queues.values() if queue]
        if fault == "cut" and self.open:
            self.cut(self.random.choice(sorted(self.open)))
        elif fault == "duplicate" and busy:
            queue = self.random.choice(busy)
            queue.insert(self.random.randrange(len(queue) + 1), self.random.choice(list(queue)))
        elif fault == "reorder" and busy:
            self.random.shuffle(self.random.choice(busy))
        elif fault == "delay" and busy:
            queue = self.random.choice(busy)
            queue.rotate(-1)
        elif fault == "kill":
            self.restart(stage)
        elif fault == "kill_two":
            for victim in self.random.sample(self.stages, min(2, len(self.stages))):
                self.restart(victim)
        elif fault == "kill_at_checkpoint":  # the write never becomes visible, because a rename is atomic
            for victim in self.stages:
                if isinstance(victim.ledger.next_task(), Checkpoint):
                    self.restart(victim)
        elif fault == "drain":
            stage.disk[stage.ledger.committed] = stage.weight
            self.restart(stage)

    def cut(self, link: int) -> None:
        if link in self.open:
            self.open.remove(link)
            self.stages[link].ledger.closed(Side.DOWNSTREAM)
            self.stages[link + 1].ledger.closed(Side.UPSTREAM)
        for side in Side:
            self.queues.pop((link, side), None)

    def restart(self, stage: ToyStage, rewind_to: int | None = None) -> None:
        for link in (stage.index - 1, stage.index):
            self.cut(link)
        if rewind_to is None:
            stage.start()
        else:
            stage.rewind(rewind_to)

    def digest(self) -> tuple:
        return tuple(stage.weight for stage in self.stages)


PLAN = Plan(steps=7, microbatches_per_step=4, evaluation_microbatches=2, evaluate_every=3)


def undisturbed(num_stages: int) -> ToySwarm:
    swarm = ToySwarm(num_stages, PLAN, every=2, seed=0)
    swarm.run({})
    return swarm


REFERENCE = {num_stages: undisturbed(num_stages) for num_stages in (1, 2, 3, 4)}


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    num_stages=st.sampled_from([2, 3, 4]),
    seed=st.integers(0, 2**32),
    faults=st.lists(st.tuples(st.integers(0, 2500), st.sampled_from(FAULTS)), max_size=30),
)
def test_no_fault_plan_changes_the_weights(num_stages: int, seed: int, faults: list[tuple[int, str]]) -> None:
    swarm = ToySwarm(num_stages, PLAN, every=2, seed=seed)
    plan: dict[int, list[str]] = {}
    for event, fault in faults:
        plan.setdefault(event, []).append(fault)
    swarm.run(plan)
    assert swarm.digest() == REFERENCE[num_stages].digest()
    for stage, reference in zip(swarm.stages, REFERENCE[num_stages].stages, strict=True):
        assert stage.losses == reference.losses
        assert stage.evaluations == reference.evaluations


def test_every_stage_sees_the_same_losses() -> None:
    for first, second in pairwise(REFERENCE[4].stages):
        assert first.losses == second.losses
        assert first.evaluations == second.evaluations
        assert sorted(first.evaluations) == [0, 3, 6, 7]


def test_retained_frames_and_checkpoints_stay_bounded() -> None:
    swarm = REFERENCE[4]
    swarm.random.seed(1)
    for _ in range(200):
        swarm.tell()
        swarm.deliver()
    for stage in swarm.stages:
        assert stage.ledger.floor == PLAN.steps
        assert len(stage.disk) == 1
        assert stage.ledger.num_retained <= 2 * PLAN.evaluation_microbatches  # those of the closing step
