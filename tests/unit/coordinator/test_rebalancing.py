"""Rebalancing: few move, each move helps, no stage is emptied, and a swarm comes to rest near the best placement."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable
from dataclasses import fields, replace
from datetime import timedelta
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.assignment import MachineProfile
from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.placement import StageCosts, placement_of
from coordinator.rebalancing import MAX_MOVES, Move, Policy, decide_move, is_move_right, next_look, plan_moves
from node.bench.swarm_simulation import Scenario, Simulation, best_bottleneck

NOW = 10_000.0
POLICY = Policy()


def peer(stage: int, peer_id: str, throughput: float = 1.0, **values: Any) -> PeerEntry:
    """A peer that serves, reserved long ago and is live."""
    usual: dict[str, Any] = {"state": SERVING, "reserved_at": 10.0, "expires_at": NOW + 20}
    return PeerEntry(
        run_id="abcd", stage=stage, peer_id=peer_id, endpoints=("h:1",), throughput=throughput, **(usual | values)
    )


def claim(stage: int, peer_id: str, throughput: float = 1.0, *, age: float = 2.0) -> PeerEntry:
    return peer(stage, peer_id, throughput, state=RESERVED, reserved_at=NOW - age)


def directory(num_stages: int, *entries: PeerEntry) -> DirectorySnapshot:
    return DirectorySnapshot.of("abcd", num_stages, entries, taken_at=NOW)


def plan(snapshot: DirectorySnapshot, policy: Policy = POLICY, *, now: float = NOW) -> tuple[Move, ...]:
    return plan_moves(snapshot, StageCosts.alike(snapshot.num_stages), policy, now=now)


def profile(peer_id: str, *rates: float) -> MachineProfile:
    return MachineProfile(peer_id, max(rates), tuple(rate > 0 for rate in rates), rates)


def right(move: Move, snapshot: DirectorySnapshot, *rates: float) -> bool:
    machine = profile(move.peer_id, *(rates or (1.0,) * snapshot.num_stages))
    return is_move_right(move, snapshot, machine, StageCosts.alike(snapshot.num_stages), POLICY, now=NOW)


def rich_and_poor(*more: PeerEntry) -> DirectorySnapshot:
    """Four at stage 0, one at stage 1."""
    return directory(2, *(peer(0, name) for name in "abcd"), peer(1, "z"), *more)


# -- one decision -----------------------------------------------------------------------------------------------


def test_one_moves_to_the_bottleneck_and_says_why() -> None:
    (move,) = plan(rich_and_poor())
    assert (move.source, move.target, move.before, move.after) == (0, 1, 1.0, 2.0)
    assert move.reason == "move to stage 1 from stage 0: the slower of both 1 → 2 microbatches/s"
    assert move.peer_id in "abcd"


def test_nobody_moves_when_that_would_not_help() -> None:
    assert not plan(directory(1, peer(0, "a"), peer(0, "b")))
    assert not plan(directory(2, peer(0, "a"), peer(0, "b"), peer(1, "c")))  # the other way round would be as bad
    assert not plan(directory(2, *(peer(0, f"a{i}", 1.02) for i in range(40)), *(peer(1, f"b{i}") for i in range(40))))


def test_a_stage_is_never_left_empty_even_for_one_that_is() -> None:
    assert not plan(directory(3, peer(0, "a", 100.0), peer(1, "b", 100.0)))
    assert not plan(directory(2, peer(0, "a"), peer(0, "b", state=RESERVED)))  # it may never arrive
    (move,) = plan(directory(3, peer(0, "a"), peer(0, "b"), peer(1, "c")))
    assert (move.source, move.target) == (0, 2)


@pytest.mark.parametrize("state", [RESERVED, DRAINING, COMPLETE])
def test_only_those_who_serve_are_asked(state: Any) -> None:
    entries = [peer(0, name, state=state) for name in "abcd"]
    named = plan(directory(2, *entries, peer(0, "x", 0.2), peer(0, "y", 0.2), peer(1, "z", 0.05)))
    assert {move.peer_id for move in named} <= {"x", "y"}


def test_who_came_lately_stays_but_not_when_a_stage_has_nobody() -> None:
    late = [peer(0, name, reserved_at=NOW - 200) for name in "abcd"]
    assert not plan(directory(2, *late, peer(1, "z")))
    assert plan(directory(2, *late, peer(1, "z")), now=NOW - 200 + 451) == ()  # its record has expired by then
    assert plan(directory(2, *late))
    rested = [replace(entry, reserved_at=NOW - 451) for entry in late]
    assert plan(directory(2, *rested, peer(1, "z")))


def test_what_is_on_the_way_is_waited_for() -> None:
    assert not plan(rich_and_poor(claim(1, "new", 0.1)))  # it may be taken back: look again
    assert plan(rich_and_poor(claim(1, "new", 0.1, age=30)))  # it comes, and is not enough
    assert not plan(rich_and_poor(claim(1, "new", 2.0, age=30)))


def test_two_change_places_where_no_single_move_helps() -> None:
    costs = StageCosts.alike(2)
    entries = [peer(0, "big1", 4.0), peer(0, "big2", 4.0), peer(1, "small1", 3.0), peer(1, "small2", 3.0)]
    (first,) = plan(directory(2, *entries))
    assert (first.source, first.target, first.is_swap, first.before, first.after) == (0, 1, True, 6.0, 7.0)
    moved = [peer(1, first.peer_id, 4.0, reserved_at=NOW - 60), *(e for e in entries if e.peer_id != first.peer_id)]
    (second,) = plan(directory(2, *moved))
    assert (second.source, second.target, second.is_swap, second.after) == (1, 0, False, 7.0)
    assert second.peer_id.startswith("small")
    back = [peer(0, second.peer_id, 3.0), *(e for e in moved if e.peer_id != second.peer_id)]
    assert not plan(directory(2, *back))
    heavy = replace(costs, memory_bytes=(2, 1))  # nobody can know that a small one fits stage 0
    assert not plan_moves(directory(2, *entries), heavy, POLICY, now=NOW)


def test_those_who_cannot_move_hold_nobody_up_for_long() -> None:
    """Others cannot know whose memory is too small; each turn names someone else."""
    named = {move.peer_id for turn in range(60) for move in plan(rich_and_poor(), now=NOW - 600 + 10 * turn)}
    assert named == set("abcd")


def test_a_peer_moves_when_it_is_named_fits_and_has_rested() -> None:
    snapshot, costs = rich_and_poor(), StageCosts.alike(2)
    named = plan(snapshot)
    me = named[0].peer_id

    def decided(machine: MachineProfile, last_moved_at: float = 0.0) -> Move | None:
        return decide_move(named, snapshot, machine, costs, POLICY, now=NOW, last_moved_at=last_moved_at)

    assert decided(profile(me, 1, 1)) == named[0]
    assert decided(profile("another", 1, 1)) is None
    assert decided(profile(me, 1, 0)) is None  # does not fit
    assert decided(profile(me, 1, 0.04)) is not None  # little, but all that it can bring
    assert decided(profile(me, 1, 1), NOW - 200) is None


def test_in_a_large_swarm_several_move_at_once_each_judged_after_those_before() -> None:
    entries = [peer(stage, f"{stage}-{i}") for stage in (0, 1) for i in range(400)]
    moves = plan(directory(4, *entries, *(peer(2, f"2-{i}") for i in range(3)), peer(3, "3-0")))
    assert len(moves) == MAX_MOVES
    assert [move.target for move in moves] == [3, 3, 2, 3, 2, 3, 2, 3]
    assert len({move.peer_id for move in moves}) == MAX_MOVES


def test_peers_look_several_times_a_turn_and_not_together() -> None:
    waits = {next_look(POLICY, random.Random(seed)) for seed in range(50)}
    assert len(waits) == 50
    assert all(timedelta(seconds=6) <= wait <= timedelta(seconds=12) for wait in waits)


# -- two that decide at the same moment -------------------------------------------------------------------------


def test_of_two_that_would_empty_a_stage_the_earlier_claim_goes() -> None:
    """They saw different records, or one more peer that has died meanwhile."""
    first, second = (Move(name, 0, 1, False, 0.0, 1.0) for name in "ab")
    both = directory(2, peer(0, "a"), peer(0, "b"), claim(1, "b", age=3), claim(1, "a", age=2))
    assert not right(first, both)
    assert right(second, both)


def test_a_move_is_given_up_when_a_newcomer_has_done_its_work() -> None:
    move = plan(rich_and_poor())[0]
    own = claim(1, move.peer_id)
    assert right(move, rich_and_poor(own))
    assert not right(move, rich_and_poor(own, claim(1, "new", 3.0, age=1)))


movers = st.lists(st.tuples(st.integers(1, 4), st.floats(1, 4)), min_size=2, max_size=6)


@given(movers, st.integers(0, 3), st.randoms(use_true_random=False))
def test_however_many_decide_at_once_those_who_go_leave_every_stage_served(
    sizes: list[tuple[int, float]], num_idle: int, chance: random.Random
) -> None:
    """Each has claimed some other stage, right or wrong; then all look again and go by what they see."""
    num_stages = len(sizes)
    entries = [peer(s, f"{s}-{i}", rate) for s, (number, rate) in enumerate(sizes) for i in range(number)]
    movers = entries[num_idle:]
    moves = [
        Move(e.peer_id, e.stage, (e.stage + chance.randrange(1, num_stages)) % num_stages, False, 0, 0) for e in movers
    ]
    claims = [
        claim(m.target, m.peer_id, e.throughput, age=chance.uniform(0, 9)) for m, e in zip(moves, movers, strict=True)
    ]
    snapshot = directory(num_stages, *entries, *claims)
    going = [
        move
        for move, entry in zip(moves, movers, strict=True)
        if right(move, snapshot, *[entry.throughput] * num_stages)
    ]
    leaving = {move.peer_id for move in going}
    assert {entry.stage for entry in entries if entry.peer_id not in leaving} == set(range(num_stages))


# -- invariants of any plan -------------------------------------------------------------------------------------

entries = st.builds(
    peer,
    st.integers(0, 4),
    st.uuids().map(str),
    st.floats(0.5, 4),
    state=st.sampled_from([SERVING, SERVING, SERVING, SERVING, RESERVED, DRAINING]),
    reserved_at=st.floats(0, NOW),
    expires_at=st.floats(NOW - 1, NOW + 20),
)


@settings(deadline=None)
@given(st.lists(entries, max_size=40), st.sampled_from([0.01, 0.2]))
def test_every_move_of_a_plan_helps_and_empties_nothing(listed: list[PeerEntry], share: float) -> None:
    snapshot = directory(5, *listed)
    for move in plan(snapshot, Policy(share_at_once=share)):
        entry = snapshot.find(move.peer_id)
        assert entry is not None
        assert (entry.stage, entry.state) == (move.source, SERVING)
        assert move.after > move.before
        before = placement_of(snapshot, now=NOW)
        assert before.num_serving[move.source] >= 2
        rest = (other for other in snapshot.all_peers() if other is not entry)
        snapshot = directory(5, *rest, replace(entry, stage=move.target, state=RESERVED, reserved_at=NOW - 60))
        if not move.is_swap:  # the sorted rates rise: the slowest, or there are fewer of them
            after = placement_of(snapshot, now=NOW)
            assert sorted(after.rates) > sorted(before.rates)
            assert after.serving_rates[move.source] >= before.bottleneck


@given(st.lists(entries, max_size=30), st.randoms(use_true_random=False))
def test_everyone_makes_the_same_plan(listed: list[PeerEntry], chance: random.Random) -> None:
    shuffled = chance.sample(listed, len(listed))
    assert plan(directory(5, *listed)) == plan(directory(5, *shuffled))


class CountedEntry(PeerEntry):
    """Counts how often any of them is looked at."""

    __slots__ = ()
    looks: ClassVar[int] = 0

    def __getattribute__(self, name: str) -> Any:
        CountedEntry.looks += 1
        return super().__getattribute__(name)


def looks_at(num_peers: int, num_stages: int) -> int:
    """In planning for a swarm where nearly everyone could move."""
    chance = random.Random(0)
    stages = (0 if chance.random() < 0.02 else chance.randrange(1, num_stages) for _ in range(num_peers))
    plain = (peer(stage, f"p{i}", chance.uniform(1, 4)) for i, stage in enumerate(stages))
    names = [field.name for field in fields(PeerEntry)]
    snapshot = directory(num_stages, *(CountedEntry(**{name: getattr(e, name) for name in names}) for e in plain))
    CountedEntry.looks = 0
    assert plan(snapshot)
    return CountedEntry.looks


def test_a_decision_costs_in_proportion_to_the_number_of_peers() -> None:
    each = [looks_at(num_peers, 20) / num_peers for num_peers in (100, 1000, 10_000)]
    assert max(each) <= 1.2 * min(each)
    assert max(each) < 50
    assert looks_at(10_000, 200) / 10_000 <= 1.2 * min(each)  # nor does the number of stages multiply it


# -- swarms in virtual time -------------------------------------------------------------------------------------


def costly_head(num_stages: int) -> StageCosts:
    compute = (1.1, *(1.0,) * (num_stages - 2), 1.6)
    return StageCosts(compute, (0.0,) * num_stages, (0,) * num_stages)


def share_of_best(simulation: Simulation) -> float:
    profiles = [machine.profile for machine in simulation.machines.values()]
    return min(simulation.rates) / best_bottleneck(profiles, simulation.scenario.num_stages)


def at_rest(scenarios: Iterable[Scenario]) -> list[float]:
    """Their shares of the best placement, after an hour without churn."""
    shares = []
    for scenario in scenarios:
        simulation = Simulation(scenario)
        history = simulation.run()
        assert history.emptied == 0
        assert history.moves_since(2400) == 0
        shares.append(share_of_best(simulation))
    return shares


@pytest.mark.parametrize(("num_peers", "num_stages"), [(4, 2), (8, 2), (6, 3), (6, 4)])
def test_a_small_swarm_comes_to_rest_near_the_best_of_all_placements(num_peers: int, num_stages: int) -> None:
    shares = at_rest(Scenario(num_peers, num_stages, seconds=3600, seed=seed, view_every=5) for seed in range(6))
    assert statistics.mean(shares) >= 0.93
    assert min(shares) >= 0.8


def test_a_costly_head_gets_more_machines() -> None:
    costs = costly_head(3)
    shares = at_rest(Scenario(8, 3, seconds=3600, seed=seed, view_every=5, costs=costs) for seed in range(6))
    assert statistics.mean(shares) >= 0.9


def test_machines_with_the_memory_for_it_serve_the_stage_that_needs_it() -> None:
    """Half cannot serve the last stage, and nobody knows of the others who they are."""
    shares = at_rest(Scenario(8, 3, seconds=3600, seed=seed, view_every=5, small_share=0.5) for seed in range(6))
    assert statistics.mean(shares) >= 0.9


@pytest.mark.parametrize(("num_peers", "num_stages"), [(1, 1), (1, 3), (2, 3), (3, 3)])
def test_with_nobody_to_spare_nobody_moves(num_peers: int, num_stages: int) -> None:
    history = Simulation(Scenario(num_peers, num_stages, seconds=1800, view_every=5)).run()
    assert (history.moves, history.emptied) == ([], 0)


def test_a_swarm_of_a_hundred_comes_near_the_bound_of_machines_that_could_be_cut() -> None:
    shares, moves = [], []
    for seed in range(2):
        simulation = Simulation(Scenario(100, 8, seconds=2400, seed=seed, view_every=5, settle_seconds=8))
        history = simulation.run()
        assert history.moves_since(1800) == 0
        shares.append(history.share_of_bound(since=1500))
        moves.append(history.moves_per_peer_hour)
    assert statistics.mean(shares) >= 0.93
    assert max(moves) <= 0.2


def test_rates_measured_anew_all_the_time_make_nobody_restless() -> None:
    for noise, seed in ((0.03, 0), (0.03, 1), (0.05, 2)):
        history = Simulation(Scenario(20, 4, seconds=3600, seed=seed, view_every=5, noise=noise)).run()
        assert history.share_of_bound(since=1500) >= 0.9
        assert history.moves_since(2700) == 0
        assert history.moves_per_peer_hour <= 1


def churned(policy: Policy | None, seed: int) -> Simulation:
    """Half of all peers go in an hour, half of them without a word; for each one another comes."""
    scenario = Scenario(
        30, 3, 3600, seed, deaths_per_peer_hour=0.25, leaves_per_peer_hour=0.25, view_every=5, policy=policy
    )
    simulation = Simulation(scenario)
    simulation.run()
    return simulation


def test_while_peers_come_and_go_few_moves_keep_the_swarm_fast() -> None:
    with_moves, without = ([churned(policy, seed).history for seed in range(3)] for policy in (POLICY, None))
    shares, bare = ([history.share_of_bound(since=900) for history in each] for each in (with_moves, without))
    assert statistics.mean(shares) >= 0.9
    assert statistics.mean(shares) > statistics.mean(bare)
    assert all(history.emptied == 0 for history in with_moves)
    assert statistics.mean(history.moves_per_peer_hour for history in with_moves) <= 1


def test_a_stage_whose_peers_all_died_is_served_again_by_others() -> None:
    """As soon as their records have expired, not after a cool-down."""
    simulation = Simulation(Scenario(12, 3, 240, placed=[0] * 6 + [1] * 6, deaths_per_peer_hour=0))
    history = simulation.run()
    assert min(simulation.rates) > 0
    assert history.emptied == 0
    assert history.moves[0][0] <= 60


def test_ten_thousand_peers_mend_an_imbalance_side_by_side() -> None:
    """One stage in fifty has a third of its peers. Moves are as many as it takes, not as many as could."""
    chance = random.Random(0)
    placed = [stage for stage in (chance.randrange(50) for _ in range(10_200)) if stage or chance.random() < 1 / 3]
    scenario = Scenario(len(placed), 50, 100, placed=placed, view_every=10, settle_seconds=12)
    simulation = Simulation(scenario)
    before = Simulation(replace(scenario, seconds=0, policy=None))
    before.run()
    history = simulation.run()
    assert 10 <= len(history.moves) <= 250
    assert history.emptied == 0
    assert min(simulation.rates) > 1.2 * min(before.rates)
