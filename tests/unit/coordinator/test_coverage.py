"""One machine at several stages: empty stages are taken, given back, never left empty, and shared fairly."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import rebalancing
from coordinator.assignment import MachineProfile, choose_stage
from coordinator.coverage import Cover, Gaps, Policy, empty_stages, plan_cover, relief_of
from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.placement import StageCosts, placement_of

NOW = 10_000.0
POLICY = Policy()
LONG_AGO = Gaps(dict.fromkeys(range(8), NOW - 20))


def peer(stage: int, peer_id: str, **values: Any) -> PeerEntry:
    """The first peer of a machine that has room for any number of stages; it serves."""
    usual: dict[str, Any] = {"state": SERVING, "reserved_at": 10.0, "expires_at": NOW + 20, "max_stages": 99}
    return PeerEntry(run_id="abcd", stage=stage, peer_id=peer_id, endpoints=("h:1",), throughput=1.0, **usual | values)


def stand_in(stage: int, node: str, **values: Any) -> PeerEntry:
    return peer(stage, f"{node}-{stage}", **{"node_id": node, "stand_in": True, "max_stages": 1} | values)


def directory(num_stages: int, *entries: PeerEntry) -> DirectorySnapshot:
    return DirectorySnapshot.of("abcd", num_stages, entries, taken_at=NOW)


def plan(snapshot: DirectorySnapshot, gaps: Gaps = LONG_AGO, now: float = NOW) -> list[tuple[int, str]]:
    return [(cover.stage, cover.node) for cover in plan_cover(snapshot, gaps, POLICY, now=now)]


# -- taking -----------------------------------------------------------------------------------------------------


def test_one_machine_takes_every_stage() -> None:
    assert plan(directory(4, peer(1, "a"))) == [(0, "a"), (2, "a"), (3, "a")]


def test_within_its_memory() -> None:
    assert plan(directory(4, peer(1, "a", max_stages=2))) == [(0, "a")]
    assert plan(directory(4, peer(1, "a", max_stages=1))) == []
    assert plan(directory(4, peer(1, "a", max_stages=2), stand_in(0, "a"))) == []


def test_who_serves_least_comes_first() -> None:
    busy = (peer(0, "a"), stand_in(1, "a"), peer(2, "b"))
    assert plan(directory(4, *busy)) == [(3, "b")]
    shared = plan(directory(6, *busy))
    assert sorted(node for _, node in shared) == ["a", "b", "b"]


@pytest.mark.parametrize("state", [RESERVED, DRAINING, COMPLETE])
def test_only_machines_that_train_are_asked(state: Any) -> None:
    assert plan(directory(2, peer(0, "a", state=state))) == []


def test_a_stage_that_somebody_is_about_to_serve_is_left_to_them() -> None:
    assert plan(directory(2, peer(0, "a"), peer(1, "b", state=RESERVED))) == []
    assert plan(directory(2, peer(0, "a"), peer(1, "b", state=DRAINING))) == [(1, "a")]


def test_once_steps_were_taken_only_who_keeps_the_weights_takes_a_stage() -> None:
    away = (peer(0, "a", committed_step=7), peer(1, "b", committed_step=7, kept_stages=(3, 4)))
    assert plan(directory(4, *away)) == [(3, "b")]
    assert plan(directory(3, *away)) == []


def test_a_copy_that_somebody_keeps_is_as_good() -> None:
    away = (peer(0, "a", committed_step=7), peer(1, "b", committed_step=7, copied_stage=2, copied_step=5))
    assert [stage for stage, _ in plan(directory(3, *away))] == [2]
    assert [stage for stage, _ in plan(directory(4, *away))] == [2]


def test_nothing_is_taken_before_it_was_empty_for_a_while() -> None:
    snapshot = directory(2, peer(0, "a"))
    seen = Gaps().after(snapshot, now=NOW)
    assert plan(snapshot, seen) == []
    assert plan(snapshot, seen.after(snapshot, now=NOW + 10), now=NOW + 14.9) == []
    assert plan(snapshot, seen.after(snapshot, now=NOW + 10), now=NOW + 15) == [(1, "a")]
    covered = directory(2, peer(0, "a"), peer(1, "b"))
    assert seen.after(covered, now=NOW + 1) == Gaps()  # and then it starts anew


def test_a_machine_that_does_not_come_is_not_waited_for() -> None:
    snapshot = directory(2, peer(0, "a", expires_at=NOW + 999), peer(0, "b", expires_at=NOW + 999))
    gaps = Gaps({1: NOW})
    named = [plan(snapshot, gaps, now=NOW + 16 + 60 * turn)[0][1] for turn in range(3)]
    assert set(named) == {"a", "b"}
    assert named[0] == named[2]


def test_a_machine_with_little_to_do_takes_a_stage_over() -> None:
    three = (peer(0, "a"), stand_in(1, "a", reserved_at=50.0), stand_in(2, "a", reserved_at=60.0))
    assert plan_cover(directory(4, *three, peer(3, "b")), LONG_AGO, POLICY, now=NOW) == (Cover(2, "b", 60.0),)
    assert plan(directory(3, *three[:2], peer(2, "b"))) == []  # two and one: changing roles helps nobody
    on_the_way = stand_in(2, "b", state=RESERVED, claimed_at=60.0)
    assert plan(directory(4, *three, peer(3, "b"), on_the_way)) == []  # one at a time
    assert plan(directory(4, *three, peer(3, "b", max_stages=1))) == []


# -- giving back ------------------------------------------------------------------------------------------------


def relief(*entries: PeerEntry, level: set[str] | None = None) -> str | None:
    """Who relieves a's stand-in at stage 1."""
    heard = {entry.peer_id for entry in entries} if level is None else level
    found = relief_of(directory(2, peer(0, "a"), stand_in(1, "a", reserved_at=50.0), *entries), "a-1", heard, now=NOW)
    return found.peer_id if found else None


def test_a_stand_in_leaves_when_somebody_else_serves_and_is_level() -> None:
    assert relief() is None
    assert relief(peer(1, "b")) == "b"
    assert relief(peer(1, "b"), level=set()) is None  # the record says so, but it was not heard
    for state in (RESERVED, DRAINING):
        assert relief(peer(1, "b", state=state)) is None
    assert relief(peer(1, "b", expires_at=NOW - 1)) is None


def test_a_peer_that_is_no_stand_in_never_leaves() -> None:
    snapshot = directory(1, peer(0, "a"), peer(0, "b"))
    assert relief_of(snapshot, "a", {"b"}, now=NOW) is None
    assert relief_of(snapshot, "unknown", {"b"}, now=NOW) is None


def test_of_two_stand_ins_the_earlier_claim_stays_unless_it_was_taken_over() -> None:
    assert relief(stand_in(1, "b", reserved_at=60.0)) is None
    assert relief(stand_in(1, "b", reserved_at=40.0)) == "b-1"
    assert relief(stand_in(1, "b", reserved_at=60.0, claimed_at=50.0)) == "b-1"


entries = st.builds(
    lambda node, first, reserved, claimed, state: (
        peer(0, node, reserved_at=reserved, state=state)
        if first
        else stand_in(0, node, reserved_at=reserved, claimed_at=min(claimed, reserved), state=state)
    ),
    st.sampled_from("abcdef"),
    st.booleans(),
    st.sampled_from([10.0, 20.0, 30.0]),
    st.sampled_from([0.0, 10.0, 20.0]),
    st.sampled_from([SERVING, SERVING, COMPLETE, RESERVED]),
)


@given(
    st.lists(entries, min_size=1, max_size=6, unique_by=lambda entry: entry.peer_id),
    st.integers(0, 1 << 32).map(random.Random),
)
def test_however_little_each_one_sees_they_never_all_leave(peers: list[PeerEntry], chance: random.Random) -> None:
    """Each stand-in sees itself and any part of the others; whoever serves and must leave finds somebody who stays."""
    serving = [entry for entry in peers if entry.state != RESERVED]
    left = []
    for entry in serving:
        seen = [other for other in peers if other is entry or chance.random() < 0.7]
        if relief_of(directory(1, *seen), entry.peer_id, {other.peer_id for other in seen}, now=NOW) is None:
            left.append(entry)
    assert bool(left) == bool(serving)


# -- all together -----------------------------------------------------------------------------------------------


@dataclass
class World:
    """Machines come and go; everyone acts by the real rules, on what was to be seen now or a moment ago."""

    num_stages: int
    chance: random.Random
    now: float = NOW
    entries: dict[str, PeerEntry] = field(default_factory=dict)
    before: DirectorySnapshot = field(init=False)
    gaps: Gaps = field(default_factory=Gaps)
    moved: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.before = self.snapshot()

    def snapshot(self) -> DirectorySnapshot:
        fresh = [replace(entry, expires_at=self.now + 30) for entry in self.entries.values()]
        return DirectorySnapshot.of("abcd", self.num_stages, fresh, taken_at=self.now)

    def machine(self, node: str) -> MachineProfile:
        return MachineProfile(node, 1.0, (True,) * self.num_stages)

    def join(self, node: str) -> None:
        place = choose_stage(self.snapshot(), self.machine(node), now=self.now, max_replicas=None)
        self.entries[node] = peer(place.stage, node, state=RESERVED, reserved_at=self.now)

    def leave(self, node: str) -> None:
        self.entries = {key: entry for key, entry in self.entries.items() if entry.node != node}

    def nodes(self) -> set[str]:
        return {entry.node for entry in self.entries.values()}

    def served(self) -> set[int]:
        return {entry.stage for entry in self.entries.values() if entry.state == SERVING}

    def turn(self) -> None:
        """A few seconds: stand-ins leave, machines move and start stand-ins, and who had reserved serves."""
        snapshot, served = self.snapshot(), self.served()
        level = {entry.peer_id for entry in self.entries.values() if entry.state == SERVING}
        for entry in list(self.entries.values()):
            seen = self.chance.choice([snapshot, self.before])
            if relief_of(seen, entry.peer_id, level if entry.state == SERVING else None, now=self.now):
                del self.entries[entry.peer_id]
        assert served <= self.served(), "a stage was left empty"
        self._move()
        self.gaps = self.gaps.after(snapshot, now=self.now)
        for cover in plan_cover(snapshot, self.gaps, POLICY, now=self.now):
            claim = stand_in(cover.stage, cover.node, state=RESERVED, reserved_at=self.now, claimed_at=cover.claimed_at)
            self.entries.setdefault(claim.peer_id, claim)
        for key, entry in self.entries.items():
            if entry.state == RESERVED and self.now > entry.reserved_at:
                self.entries[key] = replace(entry, state=SERVING)
        self.before = snapshot
        self.now += 8.0

    def _move(self) -> None:
        snapshot, costs, policy = self.snapshot(), StageCosts.alike(self.num_stages), rebalancing.Policy()
        for move in rebalancing.plan_moves(snapshot, costs, policy, now=self.now):
            args = (snapshot, self.machine(move.peer_id), costs, policy)
            last = self.moved.get(move.peer_id, 0.0)
            if rebalancing.decide_move([move], *args, now=self.now, last_moved_at=last):
                self.moved[move.peer_id] = self.now
                self.entries[move.peer_id] = peer(move.target, move.peer_id, state=RESERVED, reserved_at=self.now)

    def settle(self) -> None:
        for _ in range(12 * self.num_stages + 40):
            self.turn()


actions = st.lists(
    st.tuples(st.sampled_from(["join", "join", "leave", "wait"]), st.sampled_from("ABCDEFG")), max_size=14
)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), actions, st.integers(0, 1 << 32).map(random.Random))
def test_whoever_comes_and_goes_all_stages_end_up_served_and_shared(
    num_stages: int, history: list[tuple[str, str]], chance: random.Random
) -> None:
    world = World(num_stages, chance)
    for action, node in [("join", "A"), *history]:
        if action == "join" and node not in world.nodes():
            world.join(node)
        elif action == "leave" and len(world.nodes()) > 1:
            world.leave(node)
        world.turn()
    world.settle()
    loads = [sum(entry.node == node for entry in world.entries.values()) for node in world.nodes()]
    assert world.served() == set(range(num_stages))
    assert max(loads) - min(loads) <= 1
    if len(loads) >= num_stages:
        assert max(loads) == 1
    else:
        assert len(world.entries) == num_stages
    at_rest = world.entries.copy()
    for _ in range(20):
        world.turn()
    assert world.entries.keys() == at_rest.keys()


def test_for_placement_a_stand_in_is_nobody() -> None:
    snapshot = directory(2, peer(0, "a"), stand_in(1, "a"))
    assert placement_of(snapshot, now=NOW).rates == (1.0, 0.0)
    place = choose_stage(snapshot, MachineProfile("b", 1.0, (True, True)), now=NOW, max_replicas=None)
    assert place.stage == 1
    assert "another one" in place.reason
    assert empty_stages(snapshot, now=NOW) == ()


def test_a_policy_gives_a_restarted_worker_time() -> None:
    assert timedelta(seconds=10) <= POLICY.grace < POLICY.turn
