"""Assignment: uncovered stages first, then the bottleneck, never what does not fit; and it says why."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.assignment import MachineProfile, check_stage, choose_stage, resolve_reservation
from coordinator.directory import RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.errors import NoStageFree, StageUnavailable

NOW = 1000.0


def peer(stage: int, peer_id: str, **values: Any) -> PeerEntry:
    """A peer that serves, reserved long ago and is live."""
    usual: dict[str, Any] = {"state": SERVING, "throughput": 1.0, "reserved_at": 10.0, "expires_at": NOW + 20}
    return PeerEntry(run_id="abcd", stage=stage, peer_id=peer_id, endpoints=("h:1",), **(usual | values))


def directory(num_stages: int, *entries: PeerEntry) -> DirectorySnapshot:
    return DirectorySnapshot.of("abcd", num_stages, entries, taken_at=NOW)


def machine(num_stages: int, *, peer_id: str = "me", throughput: float = 1.0, fits: str = "") -> MachineProfile:
    """`fits`: one letter per stage, "-" where the machine is too small."""
    return MachineProfile(peer_id, throughput, tuple(letter != "-" for letter in fits or "y" * num_stages))


def test_the_only_uncovered_stage_is_taken() -> None:
    choice = choose_stage(directory(3, peer(0, "a"), peer(2, "b")), machine(3), now=NOW)
    assert (choice.stage, choice.reason) == (1, "stage 1 of 3: uncovered, the only one")


def test_the_widest_gap_comes_first() -> None:
    snapshot = directory(6, peer(0, "a"), peer(2, "b"), peer(5, "c"))
    choice = choose_stage(snapshot, machine(6), now=NOW)
    assert choice.stage in (3, 4)
    assert choice.reason == f"stage {choice.stage} of 6: uncovered, 2 others uncovered"


def test_peers_that_choose_at_the_same_moment_scatter() -> None:
    chosen = [choose_stage(directory(8), machine(8, peer_id=f"peer{i}"), now=NOW).stage for i in range(200)]
    assert all(10 <= chosen.count(stage) <= 45 for stage in range(8))


def test_a_claim_counts_as_service_and_an_expired_record_does_not() -> None:
    claimed = directory(2, peer(0, "a", state=RESERVED))
    assert choose_stage(claimed, machine(2), now=NOW).stage == 1
    assert choose_stage(directory(2, peer(0, "a"), peer(1, "b")), machine(2), now=NOW + 21).stage in (0, 1)


def test_an_uncovered_stage_that_does_not_fit_is_left() -> None:
    choice = choose_stage(directory(3), machine(3, fits="-y-"), now=NOW)
    assert (choice.stage, choice.reason) == (1, "stage 1 of 3: uncovered, 2 others uncovered")


def test_a_replica_goes_where_the_bottleneck_is() -> None:
    snapshot = directory(3, peer(0, "a", throughput=200), peer(1, "b", throughput=118), peer(2, "c", throughput=131))
    choice = choose_stage(snapshot, machine(3, throughput=50), now=NOW, max_replicas=2)
    assert (choice.stage, choice.reason) == (1, "stage 1 of 3: bottleneck 118 → 131 microbatches/s")


def test_without_room_it_says_what_is_missing() -> None:
    full = directory(2, peer(0, "a"), peer(1, "b"))
    with pytest.raises(NoStageFree, match="all 2 stages of the run are served"):
        choose_stage(full, machine(2), now=NOW)
    with pytest.raises(NoStageFree, match=r"1 of 2 stages do not fit .* 1 of them uncovered"):
        choose_stage(directory(2, peer(0, "a")), machine(2, fits="y-"), now=NOW)


def test_a_peer_that_comes_back_keeps_its_place() -> None:
    own = peer(1, "me", reserved_at=5.0)
    choice = choose_stage(directory(3, own, peer(0, "a")), machine(3), now=NOW)
    assert (choice.stage, choice.own_place) == (1, own)
    assert choose_stage(directory(3, own), machine(3, fits="y--"), now=NOW).stage == 0  # unless it no longer fits


def test_a_wanted_stage() -> None:
    snapshot = directory(3, peer(0, "a"), peer(1, "me"))
    assert check_stage(snapshot, machine(3), 2, now=NOW).reason == "stage 2 of 3: asked for"
    assert check_stage(snapshot, machine(3), 1, now=NOW).own_place is not None
    for stage, fits, reason in ((0, "yyy", "served by a"), (3, "yyy", "does not exist"), (2, "yy-", "does not fit")):
        with pytest.raises(StageUnavailable, match=reason):
            check_stage(snapshot, machine(3, fits=fits), stage, now=NOW)
    assert check_stage(snapshot, machine(3), 0, now=NOW, max_replicas=2).stage == 0


def test_the_earlier_claim_wins_and_then_the_smaller_id() -> None:
    snapshot = directory(1, peer(0, "c", reserved_at=5), peer(0, "b", reserved_at=6), peer(0, "a", reserved_at=6))
    holds = [resolve_reservation(snapshot, name, 0, now=NOW) for name in "abc"]
    assert holds == [False, False, True]
    assert resolve_reservation(snapshot, "a", 0, now=NOW, max_replicas=2)
    assert not resolve_reservation(snapshot, "b", 0, now=NOW, max_replicas=2)
    assert not resolve_reservation(snapshot, "unseen", 0, now=NOW, max_replicas=9)


entries = st.builds(
    peer,
    st.integers(0, 4),
    st.sampled_from("abcdefgh"),
    reserved_at=st.floats(0, 100),
    throughput=st.floats(0, 100),
    expires_at=st.floats(NOW - 5, NOW + 20),
)


@given(st.lists(entries, max_size=12), st.lists(st.booleans(), min_size=5, max_size=5), st.integers(1, 3))
def test_any_choice_is_free_fits_and_is_needed(listed: list[PeerEntry], fits: list[bool], replicas: int) -> None:
    snapshot = directory(5, *{(e.stage, e.peer_id): e for e in listed}.values())
    profile = MachineProfile("me", 3.0, tuple(fits))
    counts = [len([e for e in snapshot.at(stage) if e.is_live(NOW)]) for stage in range(5)]
    free = [stage for stage in range(5) if fits[stage] and counts[stage] < replicas]
    if not free:
        with pytest.raises(NoStageFree):
            choose_stage(snapshot, profile, now=NOW, max_replicas=replicas)
        return
    choice = choose_stage(snapshot, profile, now=NOW, max_replicas=replicas)
    assert choice.stage in free
    assert counts[choice.stage] == 0 or all(counts[stage] for stage in free)  # uncovered stages first
    assert choice.reason.startswith(f"stage {choice.stage} of 5: ")


@given(st.lists(entries, max_size=12), st.integers(1, 3))
def test_every_reader_names_the_same_holders(listed: list[PeerEntry], replicas: int) -> None:
    snapshot = directory(5, *{(e.stage, e.peer_id): e for e in listed}.values())
    for stage in range(5):
        live = [e.peer_id for e in snapshot.at(stage) if e.is_live(NOW)]
        holders = [name for name in live if resolve_reservation(snapshot, name, stage, now=NOW, max_replicas=replicas)]
        assert len(holders) == min(replicas, len(live))
