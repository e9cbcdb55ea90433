"""What a machine remembers of epochs, and when its peer goes back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from coordinator.directory import RESERVED, SERVING, DirectorySnapshot, PeerEntry
from coordinator.epochs import FIRST, Epoch
from node import epochs
from node.custody import copies_folder
from node.epochs import CopyAtHand, EpochBegins, EpochWatch, enter_epoch, recall_epoch
from stage_server.checkpoint import CheckpointStore
from stage_server.config import PlanConfig
from stage_server.ledger import StageLedger
from stage_server.plan import Plan

RUN = "abcd"


def peer(stage: int, peer_id: str, **values: Any) -> PeerEntry:
    usual: dict[str, Any] = {"state": SERVING, "throughput": 1.0, "reserved_at": 10.0, "expires_at": 2000.0}
    return PeerEntry(run_id=RUN, stage=stage, peer_id=peer_id, endpoints=("h:1",), **(usual | values))


def directory(*entries: PeerEntry) -> DirectorySnapshot:
    return DirectorySnapshot.of(RUN, 2, entries, taken_at=1000.0)


def ledger(committed: int) -> StageLedger:
    plan = Plan.of(PlanConfig(steps=100, microbatches_per_step=2))
    return StageLedger(plan, stage=1, num_stages=2, checkpoints=[committed], checkpoint_every=1, shared=True)


def watch(committed: int, *, restored: bool = False) -> EpochWatch:
    return EpochWatch("me", FIRST, ledger(committed), restored=restored)


def test_an_epoch_is_entered_once_its_void_steps_are_gone(tmp_path: Path) -> None:
    assert recall_epoch(tmp_path) == FIRST
    own = CheckpointStore(tmp_path / "stage-1", RUN, 1)
    copies = CheckpointStore(copies_folder(tmp_path) / "stage-0", RUN, 0)
    for store in (own, copies):
        for step in (10, 20, 30):
            store.save(step, {"weight": torch.zeros(1)})
    enter_epoch(tmp_path, RUN, Epoch(1, 20))
    assert recall_epoch(tmp_path) == Epoch(1, 20)
    assert own.steps() == copies.steps() == [10, 20]


@pytest.mark.parametrize("note", ["", "{}", '{"number": "x"}', "[]"])
def test_a_note_that_cannot_be_read_is_none(tmp_path: Path, note: str) -> None:
    (tmp_path / epochs.EPOCH_FILE).write_text(note)
    assert recall_epoch(tmp_path) == FIRST


def test_a_peer_follows_an_epoch_that_others_have_begun() -> None:
    begun = peer(0, "a", epoch=1, epoch_step=20)
    with pytest.raises(EpochBegins) as begins:
        watch(25).look(directory(begun, peer(1, "me", committed_step=25)), serving=True)
    assert (begins.value.epoch, begins.value.to_step) == (Epoch(1, 20), 20)


def test_a_restored_stage_does_not_wait_to_find_out_that_it_cannot_catch_up() -> None:
    others = peer(0, "a", committed_step=27, checkpoints=(10, 20))
    me = peer(1, "me", committed_step=20, checkpoints=(20,))
    with pytest.raises(EpochBegins) as begins:
        watch(20, restored=True).look(directory(others, me), serving=True)
    assert begins.value.epoch == Epoch(1, 20)
    watch(20, restored=True).look(directory(others, me), serving=False)  # it takes over a state: nothing is known yet
    watch(20).look(directory(others, me), serving=True)  # others may retain what it needs


def test_a_run_is_not_begun_again_from_nothing_before_somebody_could_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = peer(0, "a", committed_step=27, checkpoints=(10, 20))
    patient = watch(0, restored=True)
    patient.look(directory(others, peer(1, "me", committed_step=0)), serving=True)
    monkeypatch.setattr(epochs.time, "monotonic", lambda: 1e9)
    with pytest.raises(EpochBegins) as begins:
        patient.look(directory(others, peer(1, "me", committed_step=0)), serving=True)
    assert begins.value.epoch == Epoch(1, 0)


def test_a_stage_that_lost_its_common_checkpoints_goes_back_to_a_copy() -> None:
    keeper = peer(0, "a", committed_step=33, checkpoints=(20, 30), copied_stage=1, copied_step=20)
    with pytest.raises(EpochBegins) as begins:
        watch(22, restored=True).look(directory(keeper, peer(1, "me", committed_step=22)), serving=True)
    assert begins.value.epoch == Epoch(1, 20)


def test_who_found_out_that_a_stage_cannot_go_on_is_followed_by_its_fellows(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = peer(0, "a", committed_step=33), peer(1, "b", state=RESERVED, epoch=1, epoch_step=20)
    fellow = watch(22)
    fellow.look(directory(*entries, peer(1, "me", committed_step=22)), serving=True)  # it may be a moment's lag
    monkeypatch.setattr(epochs.time, "monotonic", lambda: 1e9)
    with pytest.raises(EpochBegins) as begins:
        fellow.look(directory(*entries, peer(1, "me", committed_step=22)), serving=True)
    assert begins.value.epoch == Epoch(1, 20)


def test_two_that_begin_a_stage_again_both_take_a_newer_copy() -> None:
    keeper = peer(0, "a", committed_step=20, copied_stage=1, copied_step=20)
    with pytest.raises(CopyAtHand):
        watch(0).look(directory(keeper, peer(1, "me"), peer(1, "b")), serving=True)


def test_a_peer_alone_in_its_stage_takes_a_newer_copy() -> None:
    keeper = peer(0, "a", committed_step=27, copied_stage=1, copied_step=20)
    with pytest.raises(CopyAtHand) as at_hand:
        watch(10).look(directory(keeper, peer(1, "me", committed_step=10)), serving=True)
    assert at_hand.value.to_step == 10
    watch(20).look(directory(keeper, peer(1, "me", committed_step=20)), serving=True)
    watch(10).look(directory(keeper, peer(1, "me", state=RESERVED), peer(1, "b", committed_step=27)), serving=False)
