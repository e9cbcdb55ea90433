"""Replicas of a stage under hostile networks and deaths: every committed step holds each microbatch exactly once.

The simulation has no clock. Whatever can happen next (a message arrives, is lost or doubled, a microbatch is computed,
an averaging ends well or badly, somebody dies, loses sight of others, joins) is drawn at random; then
faults stop, and the stage must go on by itself.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.agreement import (
    INITIAL,
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

Message = Tally | Round


@dataclass
class Replica:
    """One replica: the agreement, and toys for what it steers."""

    name: str
    agreement: StageAgreement
    sum: Counter[int] = field(default_factory=Counter)  # the gradient: how often each microbatch was added
    results: dict[int, Counter[int]] = field(default_factory=dict)  # what averaging gave, by round
    log: list[str] = field(default_factory=list)  # the lineage after each commit
    resync: Resync | None = None
    averaging: Average | None = None


class Stage:
    """All replicas of one stage, and the network between them."""

    def __init__(self, chance: random.Random, num_replicas: int, microbatches: int, *, adds_up: bool = True) -> None:
        """`adds_up`: whether each round has a sum; else every replica keeps its share to itself."""
        self.chance, self.microbatches, self.adds_up = chance, microbatches, adds_up
        self.replicas: dict[str, Replica] = {}
        self.network: list[tuple[str, Message]] = []
        self.joined = 0
        self.commits: list[tuple[int, Counter[int]]] = []
        self.kept: dict[str, Counter[int]] = {}  # by lineage: what replicas that are of it have kept to themselves
        for _ in range(num_replicas):
            self.join()
        self.see_all()

    # -- life and death -----------------------------------------------------------------------------------------

    def join(self) -> None:
        """A new replica with the state of another, or with the initial one."""
        self.joined += 1
        name = f"r{self.joined}"
        donor = self.chance.choice(list(self.replicas.values())) if self.replicas else None
        microbatches = self.microbatches
        committed, lineage = (donor.agreement.committed, donor.agreement.lineage) if donor else (0, INITIAL)
        self.replicas[name] = Replica(name, StageAgreement(name, lambda _step: microbatches, committed, lineage))

    def kill(self) -> None:
        if len(self.replicas) > 1:
            del self.replicas[self.chance.choice(list(self.replicas))]

    def see_some(self) -> None:
        """One replica's view of who is there changes, rightly or wrongly."""
        replica = self.chance.choice(list(self.replicas.values()))
        seen = [name for name in self.replicas if self.chance.random() < 0.8]
        self.perform(replica, replica.agreement.in_sight(seen, self.claims()))

    def see_all(self) -> None:
        for replica in list(self.replicas.values()):
            self.perform(replica, replica.agreement.in_sight(self.replicas, self.claims()))

    def claims(self) -> dict[str, float]:
        return {name: float(name[1:]) for name in self.replicas}

    # -- what replicas do ---------------------------------------------------------------------------------------

    def perform(self, replica: Replica, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Tell(tally):
                    self.network += [(name, tally) for name in self.replicas if name != replica.name]
                case Propose(proposed, members):
                    self.network += [(name, proposed) for name in members if name != replica.name]
                    if replica.name in members:
                        self.perform(replica, replica.agreement.receive_round(proposed))
                case Average():
                    # microbatches beyond the share are taken out by computing the sum again
                    replica.sum = Counter({index: replica.sum[index] for index in action.share})
                    replica.averaging = action
                case Commit(step, averaged):
                    taken = replica.results[averaged.round]
                    if self.adds_up:
                        self.commits.append((step, taken))
                    else:
                        self.kept.setdefault(replica.agreement.lineage, Counter()).update(taken)
                    replica.log.append(replica.agreement.lineage)
                    self._clean(replica)
                case Resync():
                    self._clean(replica)
                    replica.resync = action

    def _clean(self, replica: Replica) -> None:
        replica.sum, replica.results, replica.averaging = Counter(), {}, None

    def compute(self) -> None:
        """Some replica adds some microbatch, maybe one that another has added too."""
        replica = self.chance.choice(list(self.replicas.values()))
        agreement = replica.agreement
        missing = agreement.missing if self.chance.random() < 0.8 else frozenset(range(self.microbatches))
        todo = sorted(missing - agreement.counted)
        if todo and not agreement.is_frozen:
            index = self.chance.choice(todo)
            replica.sum[index] += 1
            self.perform(replica, agreement.count(index))

    def deliver(self, *, lose: float = 0.0, double: float = 0.0) -> None:
        if not self.network:
            return
        place = self.chance.randrange(len(self.network))
        name, message = self.network[place] if self.chance.random() < double else self.network.pop(place)
        if name not in self.replicas or self.chance.random() < lose:
            return
        agreement = self.replicas[name].agreement
        handle: Callable[..., list[Action]]
        handle = agreement.receive_tally if isinstance(message, Tally) else agreement.receive_round
        self.perform(self.replicas[name], handle(message))

    def gossip(self) -> None:
        """Tallies are told again now and then."""
        for replica in self.replicas.values():
            tally = replica.agreement.tally()
            self.network += [(name, tally) for name in self.replicas if name != replica.name]

    def finish_average(self, *, hostile: bool) -> None:
        """One averaging ends for one member: with all members' shares, or not."""
        waiting = [replica for replica in self.replicas.values() if replica.averaging]
        if not waiting:
            return
        replica = self.chance.choice(waiting)
        assert replica.averaging is not None
        round_ = replica.averaging.round
        members = [self.replicas.get(name) for name in round_.shares]
        there = [member for member in members if member and self._is_in(member, round_)]
        whole = len(there) == len(members)
        if not whole and not hostile and self.chance.random() < 0.9:
            return  # waits for the others; gives up in the end
        total: Counter[int] = Counter()
        for member in there:
            total.update(round_.shares[member.name])
        if not self.adds_up:
            whole_step = sum(map(len, round_.shares.values()))
            replica.results[round_.number] = Counter(replica.averaging.share)
            replica.averaging = None
            failed = hostile and self.chance.random() < 0.1
            digest = None if failed else digest_of_shares(round_)
            self.perform(replica, replica.agreement.averaged(round_.number, digest, whole_step))
            return
        # or it kept its own values for a part, which its checksums tell it (averaging_contribution.py)
        failed = not total or (hostile and self.chance.random() < 0.3)
        replica.averaging = None
        replica.results[round_.number] = +total
        digest = None if failed else f"{round_.step}/{round_.number}/{sorted((+total).items())}"
        self.perform(replica, replica.agreement.averaged(round_.number, digest, total.total()))

    @staticmethod
    def _is_in(member: Replica, round_: Round) -> bool:
        """Whether it takes part, or has."""
        if member.averaging is not None and member.averaging.round == round_:
            return True
        return round_.number in member.results and member.agreement.committed + 1 == round_.step

    def finish_resync(self, *, hostile: bool) -> None:
        for replica in list(self.replicas.values()):
            if replica.resync is None or self.chance.random() < 0.5:
                continue
            donor = self.replicas.get(replica.resync.peer)
            replica.resync = None
            if donor is None or (hostile and self.chance.random() < 0.3):
                self._clean(replica)
                own = replica.agreement
                self.perform(replica, own.resynced(own.committed, own.lineage))
            else:
                self._clean(replica)
                donated = donor.agreement
                self.perform(replica, replica.agreement.resynced(donated.committed, donated.lineage))

    def check(self) -> None:
        once = Counter(range(self.microbatches))
        for step, taken in self.commits:
            assert taken == once, f"step {step} committed {taken}"
        for lineage, kept in self.kept.items():  # who died may have taken its share with it
            assert kept <= once, f"{lineage} holds {kept}"


def settle(stage: Stage, steps: int) -> None:
    """No more faults: the stage must commit `steps` more steps."""
    stage.see_all()
    target = max(replica.agreement.committed for replica in stage.replicas.values()) + steps
    for turn in range(20_000):
        if all(replica.agreement.committed >= target for replica in stage.replicas.values()):
            return
        if turn % 50 == 0:
            stage.gossip()
        while len(stage.network) > 50:
            stage.deliver()
        stage.chance.choice(
            [
                stage.deliver,
                stage.deliver,
                stage.compute,
                lambda: stage.finish_average(hostile=False),
                lambda: stage.finish_resync(hostile=False),
            ]
        )()
    state = [(r.name, r.agreement.tally(), r.averaging, r.resync) for r in stage.replicas.values()]
    pytest.fail("the stage stands still:\n" + "\n".join(map(str, state)))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 7), st.booleans())
def test_every_committed_step_holds_each_microbatch_once(
    seed: int, num_replicas: int, microbatches: int, adds_up: bool
) -> None:
    chance = random.Random(seed)
    stage = Stage(chance, num_replicas, microbatches, adds_up=adds_up)
    events: list[tuple[float, Callable[[], None]]] = [
        (30, lambda: stage.deliver(lose=0.1, double=0.1)),
        (20, stage.compute),
        (10, lambda: stage.finish_average(hostile=chance.random() < 0.3)),
        (3, lambda: stage.finish_resync(hostile=True)),
        (3, stage.gossip),
        (1, stage.kill),
        (1, stage.join),
        (2, stage.see_some),
        (2, stage.see_all),
    ]
    weights, happenings = zip(*events, strict=True)
    for _ in range(400):
        chance.choices(happenings, weights)[0]()
        del stage.network[:-300]
    settle(stage, steps=2)
    stage.check()
    lineages = {replica.agreement.lineage for replica in stage.replicas.values() if replica.agreement.committed}
    newest = max(replica.agreement.committed for replica in stage.replicas.values())
    same = {r.agreement.lineage for r in stage.replicas.values() if r.agreement.committed == newest}
    assert len(same) == 1, lineages


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 5), st.integers(1, 7))
def test_without_faults_nobody_computes_or_takes_over_anything_twice(
    seed: int, num_replicas: int, microbatches: int
) -> None:
    stage = Stage(random.Random(seed), num_replicas, microbatches)
    resyncs: list[Resync] = []
    perform = stage.perform

    def watched(replica: Replica, actions: list[Action]) -> None:
        resyncs.extend(action for action in actions if isinstance(action, Resync))
        perform(replica, actions)

    stage.perform = watched  # type: ignore[method-assign]  # to look on
    settle(stage, steps=3)
    stage.check()
    assert not resyncs
