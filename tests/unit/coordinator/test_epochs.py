"""When a run goes back, and to which step; who keeps whose copies."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.custody import COPIES, Source, newest_common, newest_copy, newest_to_keep, stage_in_custody
from coordinator.directory import COMPLETE, MAX_CHECKPOINTS, RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.epochs import (
    FIRST,
    Epoch,
    Stall,
    epoch_of_fellows,
    is_left_behind,
    newest_epoch,
    next_epoch,
    told_checkpoints,
)

NOW = 1000.0


def peer(stage: int, peer_id: str, epoch: Epoch = FIRST, **values: Any) -> PeerEntry:
    usual: dict[str, Any] = {"state": SERVING, "throughput": 1.0, "reserved_at": 10.0, "expires_at": NOW + 20}
    usual |= {"epoch": epoch.number, "epoch_step": epoch.step, "endpoints": (f"{peer_id}:1",)}
    return PeerEntry(run_id="abcd", stage=stage, peer_id=peer_id, **(usual | values))


def directory(num_stages: int, *entries: PeerEntry) -> DirectorySnapshot:
    return DirectorySnapshot.of("abcd", num_stages, entries, taken_at=NOW)


# -- epochs -----------------------------------------------------------------------------------------------------


def test_the_run_goes_back_to_the_newest_step_that_every_stage_has() -> None:
    snapshot = directory(
        3,
        peer(0, "a", checkpoints=(10, 20, 30)),
        peer(1, "b", checkpoints=(20,)),
        peer(1, "c", checkpoints=(10, 30)),
        peer(2, "d", checkpoints=(10, 20)),
    )
    assert next_epoch(snapshot, FIRST) == Epoch(1, 20)


def test_what_others_keep_a_copy_of_is_not_lost_to_a_stage() -> None:
    keeper = peer(0, "a", committed_step=33, checkpoints=(20, 30), copied_stage=1, copied_step=20)
    behind = peer(1, "b", committed_step=22, checkpoints=(22,))
    assert next_epoch(directory(2, keeper, behind), FIRST) == Epoch(1, 20)
    void = peer(0, "a", Epoch(1, 0), checkpoints=(20, 30), copied_stage=1, copied_step=20)
    assert next_epoch(directory(2, peer(0, "c", checkpoints=(20,)), void, behind), FIRST) == Epoch(1, 0)


def test_fellows_that_went_back_are_known_also_where_somebody_stands_further() -> None:
    later = Epoch(1, 20)
    snapshot = directory(
        2, peer(1, "b", later, state=RESERVED), peer(1, "c", committed_step=22), peer(0, "a", Epoch(2))
    )
    assert epoch_of_fellows(snapshot, FIRST, 1) == later
    assert epoch_of_fellows(snapshot, later, 1) is None
    assert newest_epoch(snapshot.where(lambda entry: entry.stage == 1), FIRST) == FIRST


def test_where_nothing_is_common_the_run_can_only_start_again() -> None:
    snapshot = directory(2, peer(0, "a", checkpoints=(30,)), peer(1, "b", checkpoints=(10,)))
    assert next_epoch(snapshot, Epoch(4, 10)) is None  # they say nothing of that epoch
    assert next_epoch(snapshot, FIRST) == Epoch(1, 0)


@pytest.mark.parametrize("state", [None, RESERVED])
def test_nobody_knows_where_to_go_back_to_while_a_stage_has_nobody(state: Any) -> None:
    others = [] if state is None else [peer(1, "b", state=state, checkpoints=(10,))]
    assert next_epoch(directory(2, peer(0, "a", checkpoints=(10,)), *others), FIRST) is None


def test_a_later_epoch_is_followed_where_nobody_serves_that_stage_any_further() -> None:
    later = Epoch(1, 20)
    restored = peer(1, "b", later, committed_step=20)
    assert newest_epoch(directory(2, peer(0, "a", committed_step=35), restored), FIRST) == later
    contested = directory(2, peer(0, "a", committed_step=35), restored, peer(1, "c", committed_step=35))
    assert newest_epoch(contested, FIRST) == FIRST  # whoever says so has not looked, or lies
    finished = directory(2, peer(0, "a"), restored, peer(1, "c", committed_step=99, state=COMPLETE))
    assert newest_epoch(finished, FIRST) == FIRST


def test_a_peer_of_that_stage_that_is_only_arriving_changes_nothing() -> None:
    later = Epoch(1, 20)
    snapshot = directory(2, peer(1, "b", later, committed_step=20), peer(1, "c", committed_step=35, state=RESERVED))
    assert newest_epoch(snapshot, FIRST) == later


def test_nobody_goes_back_to_an_epoch_of_before() -> None:
    snapshot = directory(2, peer(0, "a", Epoch(1, 20)), peer(1, "b", Epoch(1, 20)))
    assert newest_epoch(snapshot, Epoch(2, 30)) == Epoch(2, 30)


def test_of_two_stages_that_are_lost_at_once_the_one_that_goes_back_further_wins() -> None:
    near, far = Epoch(1, 30), Epoch(1, 20)
    snapshot = directory(2, peer(0, "a", near), peer(1, "b", far))
    assert newest_epoch(snapshot, FIRST) == newest_epoch(snapshot, near) == newest_epoch(snapshot, far) == far


def test_epochs_of_one_run_have_different_names() -> None:
    names = {epoch.named("abcd") for epoch in (FIRST, Epoch(1, 0), Epoch(1, 10), Epoch(2, 10))}
    assert len(names) == 4
    assert FIRST.named("abcd") == "abcd"


def test_a_stage_is_left_behind_when_others_are_ahead_and_no_replica_of_it_is() -> None:
    ahead = peer(0, "a", committed_step=11)
    assert is_left_behind(directory(2, ahead, peer(1, "me", committed_step=10)), FIRST, 1, 10)
    assert not is_left_behind(directory(2, ahead, peer(1, "b", committed_step=11)), FIRST, 1, 10)
    assert not is_left_behind(directory(2, peer(0, "a", committed_step=10)), FIRST, 1, 10)
    assert not is_left_behind(directory(2, peer(0, "a", Epoch(1, 0), committed_step=11)), FIRST, 1, 10)


def test_a_stall_lasts_only_while_nothing_changes() -> None:
    stall = Stall()
    assert stall.lasts(0.0, "step 1", left_behind=True) == 0.0
    assert stall.lasts(29.0, "step 1", left_behind=True) == 29.0
    assert stall.lasts(31.0, "step 2", left_behind=True) == 0.0
    assert stall.lasts(60.0, "step 2", left_behind=False) is None
    assert stall.lasts(61.0, "step 2", left_behind=True) == 0.0
    assert stall.lasts(91.0, "step 2", left_behind=True) == 30.0


def test_a_record_names_common_checkpoints_and_the_newest() -> None:
    told = told_checkpoints(range(1, 1001), common_every=100)
    assert len(told) <= MAX_CHECKPOINTS
    assert set(told) >= {100, 500, 1000, 999, 998}
    assert list(told) == sorted(told)
    assert told_checkpoints([], 10) == ()


# -- custody ----------------------------------------------------------------------------------------------------


def test_copies_are_kept_by_the_oldest_peers_of_the_next_stage() -> None:
    entries = [peer(s, f"{s}{n}", reserved_at=float(n)) for s in range(3) for n in range(COPIES + 2)]
    snapshot = directory(3, *entries, peer(1, "0 arrives", state=RESERVED, reserved_at=0.0))
    for stage in range(3):
        for number in range(COPIES):
            assert stage_in_custody(snapshot, f"{stage}{number}") == (stage - 1) % 3
        assert stage_in_custody(snapshot, f"{stage}{COPIES}") is None
    assert stage_in_custody(snapshot, "0 arrives") is None
    assert stage_in_custody(directory(1, peer(0, "a")), "a") is None


def test_what_is_copied_is_the_newest_checkpoint_that_all_stages_keep() -> None:
    snapshot = directory(1, peer(0, "a", checkpoints=(10, 20, 25)), peer(0, "b", checkpoints=(20, 30)))
    assert newest_common(snapshot, FIRST, 0, 10) == Source(0, 30, ("b:1",))
    assert newest_common(snapshot, FIRST, 0, 20) == Source(0, 20, ("a:1", "b:1"))
    assert newest_common(snapshot, FIRST, 0, 50) is None
    assert newest_common(snapshot, Epoch(1, 0), 0, 10) is None


def test_copies_outlive_their_keepers_where_the_stage_itself_has_none() -> None:
    behind = peer(1, "b", checkpoints=(10, 22))
    keeper = peer(2, "old", copied_stage=1, copied_step=20)
    assert newest_to_keep(directory(3, behind, keeper), FIRST, 1, "new", 10) == Source(1, 20, ("old:1",))
    assert newest_to_keep(directory(3, behind, keeper), FIRST, 1, "old", 10) == Source(1, 10, ("b:1",))
    again = peer(1, "c", checkpoints=(20,))
    assert newest_to_keep(directory(3, behind, again, keeper), FIRST, 1, "new", 10) == Source(1, 20, ("c:1",))
    assert newest_to_keep(directory(3), FIRST, 1, "new", 10) is None


def test_the_newest_copy_is_found_wherever_it_is() -> None:
    snapshot = directory(
        3,
        peer(0, "old", copied_stage=2, copied_step=10),
        peer(0, "new", copied_stage=2, copied_step=20),
        peer(1, "too", copied_stage=2, copied_step=20),
        peer(1, "void", Epoch(1, 5), copied_stage=2, copied_step=30),
        peer(1, "other", copied_stage=0, copied_step=40),
    )
    assert newest_copy(snapshot, FIRST, 2) == Source(2, 20, ("new:1", "too:1"))
    assert newest_copy(snapshot, FIRST, 1) is None
