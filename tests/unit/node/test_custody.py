"""A stage's state from a copy: of this machine's own, where it kept one."""

from __future__ import annotations

import asyncio
from pathlib import Path

import torch

from coordinator.directory import SERVING, DirectorySnapshot, PeerEntry
from coordinator.epochs import FIRST, Epoch
from node.assembly import stage_folder
from node.custody import awaits_copy, copies_folder, restore
from stage_server.checkpoint import CheckpointStore

RUN = "abcd"
NOBODY = DirectorySnapshot.of(RUN, 2, [], taken_at=1000.0)


def store(folder: Path, *steps: int) -> CheckpointStore:
    store = CheckpointStore(folder, RUN, 1)
    for step in steps:
        store.save(step, {"weight": torch.full((2,), float(step))}, lineage=f"to {step}")
    return store


def restored(state_folder: Path, snapshot: DirectorySnapshot = NOBODY) -> int | None:
    return asyncio.run(restore(snapshot, state_folder, RUN, 1, FIRST, on_progress=lambda _: None))


def test_a_machine_that_kept_the_copy_itself_takes_it(tmp_path: Path) -> None:
    store(copies_folder(tmp_path / RUN) / "stage-1", 10, 20)
    own = store(stage_folder(tmp_path, RUN, 1), 5)
    assert restored(tmp_path) == 20
    assert own.steps() == [5, 20]
    assert own.lineage(20) == "to 20"
    assert own.load(20)["weight"].tolist() == [20.0, 20.0]


def test_what_this_machine_has_itself_may_be_newer(tmp_path: Path) -> None:
    store(copies_folder(tmp_path / RUN) / "stage-1", 10)
    store(stage_folder(tmp_path, RUN, 1), 15)
    assert restored(tmp_path) is None


def test_where_somebody_serves_the_stage_no_copy_is_needed(tmp_path: Path) -> None:
    store(copies_folder(tmp_path / RUN) / "stage-1", 10)
    somebody = PeerEntry(
        run_id=RUN, stage=1, peer_id="a", endpoints=("h:1",), state=SERVING, throughput=1.0, reserved_at=1.0,
        expires_at=2000.0,
    )  # fmt: skip
    assert restored(tmp_path, DirectorySnapshot.of(RUN, 2, [somebody], taken_at=1000.0)) is None


def test_without_any_copy_there_is_nothing_to_restore(tmp_path: Path) -> None:
    assert restored(tmp_path) is None


def test_a_copy_is_awaited_where_the_run_went_back_to_what_is_not_here(tmp_path: Path) -> None:
    epoch = Epoch(1, 20)
    assert awaits_copy(NOBODY, tmp_path, RUN, 1, epoch)
    assert not awaits_copy(NOBODY, tmp_path, RUN, 1, FIRST)
    store(stage_folder(tmp_path, RUN, 1), 20)
    assert not awaits_copy(NOBODY, tmp_path, RUN, 1, epoch)
