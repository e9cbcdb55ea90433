"""Placement: a swarm is as fast as its slowest stage, a newcomer goes there, and many at once share the stages."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.assignment import MachineProfile, check_stage, choose_stage, reconsider, resolve_reservation
from coordinator.directory import COMPLETE, DRAINING, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.errors import NoStageFree
from coordinator.placement import ALIKE, StageCosts, neediest, placement_of, served_rate

NOW = 1000.0


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


def machine(*rates: float, peer_id: str = "me") -> MachineProfile:
    """By stage; 0 where it does not fit."""
    return MachineProfile(peer_id, max(rates), tuple(rate > 0 for rate in rates), rates)


# -- rates ------------------------------------------------------------------------------------------------------


def test_one_measured_stage_tells_the_rates_at_all() -> None:
    costs = StageCosts(compute=(1.2, 1.0, 1.6), link_bytes=(100.0, 100.0, 50.0), memory_bytes=(8, 4, 6))
    assert costs.rates(12.0, at=1) == pytest.approx((10.0, 12.0, 7.5))
    assert costs.rates(12.0, at=0) == pytest.approx((12.0, 14.4, 9.0))
    assert costs.rates(12.0, at=1, available_bytes=6) == pytest.approx((0.0, 12.0, 7.5))
    linked = MachineProfile.measured("me", costs, 12.0, at=1, link_bytes_per_second=300.0, available_bytes=6)
    assert linked.rates == pytest.approx((0.0, 3.0, 6.0))  # 300 bytes/s carry 3 or 6 microbatches
    assert linked.fits == (False, True, True)


def test_a_link_that_was_not_measured_limits_nothing() -> None:
    assert served_rate(5.0, 0.0, 100.0) == 5.0
    assert served_rate(5.0, 100.0, 0.0) == 5.0  # a run of one stage sends nothing
    assert served_rate(5.0, 100.0, 50.0) == 2.0


def test_a_swarm_is_as_fast_as_its_slowest_stage() -> None:
    entries = (peer(0, "a", 3.0), peer(1, "b", 4.0), peer(1, "c", 1.0), peer(2, "d", 2.0), peer(2, "e", 2.5))
    assert placement_of(directory(3, *entries), now=NOW).bottleneck == 3.0


@pytest.mark.parametrize(
    ("state", "rate", "serving"), [(SERVING, 2.0, 1), (COMPLETE, 2.0, 1), (RESERVED, 2.0, 0), (DRAINING, 0.0, 0)]
)
def test_who_has_reserved_is_on_the_way_and_who_drains_is_gone(state: Any, rate: float, serving: int) -> None:
    placement = placement_of(directory(1, peer(0, "a", 2.0, state=state)), now=NOW)
    assert (placement.rates, placement.num_serving) == ((rate,), (serving,))
    assert placement_of(directory(1, peer(0, "a", state=state)), now=NOW + 21).rates == (0.0,)  # expired


def test_a_peer_that_has_reserved_another_stage_counts_there_alone() -> None:
    placement = placement_of(directory(2, peer(0, "a", 2.0), peer(0, "b", 5.0), claim(1, "a", 3.0)), now=NOW)
    assert (placement.rates, placement.num_serving) == ((5.0, 3.0), (1, 0))


# -- a newcomer -------------------------------------------------------------------------------------------------


def choice(snapshot: DirectorySnapshot, profile: MachineProfile) -> tuple[int, str]:
    chosen = choose_stage(snapshot, profile, now=NOW, max_replicas=None)
    return chosen.stage, chosen.reason


def test_it_goes_to_the_bottleneck_and_says_what_that_brings() -> None:
    rates = (200.0, 150.0, 140.0, 118.0, 160.0, 131.0, 170.0, 180.0)
    snapshot = directory(8, *(peer(s, f"p{s}", rate) for s, rate in enumerate(rates)))
    assert choice(snapshot, machine(*[40.0] * 8)) == (3, "stage 3 of 8: bottleneck 118 → 131 microbatches/s")


def test_uncovered_stages_come_first_and_a_stage_that_only_drains_is_one() -> None:
    snapshot = directory(3, peer(0, "a", 0.1), peer(1, "b", 9.0), peer(2, "c", 9.0, state=DRAINING))
    assert choice(snapshot, machine(1, 1, 1)) == (2, "stage 2 of 3: uncovered, the only one")


def test_where_the_slowest_does_not_fit_the_slowest_that_does_is_helped() -> None:
    snapshot = directory(3, peer(0, "a", 1.0), peer(1, "b", 3.0), peer(2, "c", 2.0))
    assert choice(snapshot, machine(0, 1, 1)) == (2, "stage 2 of 3: bottleneck 1 → 1 microbatches/s")
    with pytest.raises(NoStageFree, match="none of the 3 stages fits"):
        choice(snapshot, MachineProfile("me", 1.0, (False,) * 3))


def test_any_number_may_hold_a_stage_that_a_person_asked_for() -> None:
    snapshot = directory(2, *(peer(0, f"p{i}") for i in range(9)), claim(0, "me"))
    assert check_stage(snapshot, machine(1, 1), 0, now=NOW, max_replicas=None).stage == 0
    assert resolve_reservation(snapshot, "me", 0, now=NOW, max_replicas=None)
    assert not resolve_reservation(snapshot, "unseen", 0, now=NOW, max_replicas=None)


def test_its_own_place_is_kept_but_not_a_claim_just_made() -> None:
    crowd = [peer(0, "a", 9.0), peer(1, "b", 1.0)]
    back = directory(2, *crowd, peer(0, "me", state=RESERVED, reserved_at=NOW - 60))
    assert choice(back, machine(1, 1))[1] == "stage 0 of 2: this peer's own place"
    assert choice(directory(2, *crowd, claim(0, "me")), machine(1, 1))[0] == 1


rates = st.lists(st.one_of(st.just(0.0), st.floats(0.1, 100)), min_size=5, max_size=5)


@given(rates, rates)
def test_no_other_stage_would_lift_the_bottleneck_more(swarm: list[float], own: list[float]) -> None:
    stage = neediest(swarm, own, "me")
    able = [s for s in range(5) if own[s] > 0]
    if stage is None:
        assert not able
        return
    assert stage in able
    assert swarm[stage] == 0 or all(swarm[s] > 0 for s in able)  # uncovered stages first

    def lifted(at: int) -> list[float]:
        return sorted(rate + own[s] * (s == at) for s, rate in enumerate(swarm))

    assert all(lifted(s)[0] <= lifted(stage)[0] * (1 + ALIKE) for s in able)


# -- many newcomers at once -------------------------------------------------------------------------------------


def test_those_who_choose_in_the_same_moment_scatter_over_stages_that_are_alike() -> None:
    snapshot = directory(8, *(peer(s, f"p{s}", 10.0 + 0.05 * s) for s in range(8)))
    chosen = [choice(snapshot, machine(*[1.0] * 8, peer_id=f"peer{i}"))[0] for i in range(200)]
    assert all(10 <= chosen.count(stage) <= 45 for stage in range(8))


def reconsidered(snapshot: DirectorySnapshot, peer_id: str, num_stages: int) -> int:
    better = reconsider(snapshot, machine(*[1.0] * num_stages, peer_id=peer_id), now=NOW)
    (own,) = [entry for entry in snapshot.all_peers() if entry.peer_id == peer_id]
    return own.stage if better is None else better.stage


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.lists(st.integers(0, 9), min_size=6, max_size=6))
def test_having_looked_again_all_share_the_stages_and_then_stay(stages: list[int], before: list[int]) -> None:
    """One look is enough, whatever they chose blindly: afterwards nobody would move again."""
    base = [peer(s, f"old{s}", float(rate)) for s, rate in enumerate(before) if rate]

    def seen(at: list[int]) -> DirectorySnapshot:
        fresh = (claim(stage, f"new{i}", age=5 - i * 0.1) for i, stage in enumerate(at))
        return directory(6, *base, *fresh)

    shared = [reconsidered(seen(stages), f"new{i}", 6) for i in range(len(stages))]
    assert [reconsidered(seen(shared), f"new{i}", 6) for i in range(len(stages))] == shared
    after = placement_of(seen(shared), now=NOW).rates
    settled = placement_of(directory(6, *base), now=NOW).rates
    filled = [stage for stage in range(6) if after[stage] > settled[stage]]
    assert max(after[stage] for stage in filled) <= (min(after) + 1) * (1 + ALIKE)


def test_whoever_has_held_a_place_for_a_while_is_asked_nothing() -> None:
    snapshot = directory(2, *(claim(0, f"old{i}", age=60) for i in range(3)))
    assert [reconsidered(snapshot, f"old{i}", 2) for i in range(3)] == [0, 0, 0]


def test_a_better_place_must_fit() -> None:
    snapshot = directory(3, claim(0, "first", age=3), claim(0, "me"))
    better = reconsider(snapshot, machine(1, 0, 1), now=NOW)
    assert better is not None
    assert (better.stage, better.reason) == (2, "stage 2 of 3: uncovered, 1 other uncovered")
    assert reconsider(snapshot, machine(1, 0, 0), now=NOW) is None


def test_each_reader_sums_alike_whatever_the_order_of_the_records() -> None:
    """Rates are summed in the order of peer ids: else rounding alone could make two readers disagree."""
    entries = [peer(0, f"p{i}", random.Random(i).random()) for i in range(50)]
    orders = (entries, entries[::-1], random.Random(0).sample(entries, 50))
    assert len({placement_of(directory(1, *order), now=NOW).rates for order in orders}) == 1


def test_ties_of_time_are_broken_by_peer_id() -> None:
    for names in itertools.permutations("abc"):
        snapshot = directory(3, *(claim(0, name) for name in names))
        assert [reconsidered(snapshot, name, 3) for name in "abc"] == [0, 1, 2]
