"""The epoch that this machine's peer lives in: remembered on disk, followed, and begun where its stage cannot go on."""

from __future__ import annotations

import json
import logging
import math
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from coordinator.custody import newest_copy
from coordinator.directory import SERVING, DirectorySnapshot, PeerEntry
from coordinator.epochs import FIRST, Epoch, Stall, epoch_of_fellows, is_left_behind, newest_epoch, next_epoch
from node.custody import copies_folder
from node.folders import replace_text
from stage_server.checkpoint import CheckpointStore
from stage_server.errors import RewindNeeded
from stage_server.ledger import StageLedger

log = logging.getLogger(__name__)

EPOCH_FILE = "epoch.json"
PATIENCE = timedelta(seconds=30)
"""A stage that others have left behind, and that nothing has changed in for so long, cannot go on."""
PATIENCE_WITH_FELLOWS = timedelta(seconds=5)
"""The same, where another peer of the stage has found out already."""
PATIENCE_BEFORE_ALL_IS_LOST = timedelta(minutes=10)
"""For how long somebody may come back with a stage's state before the run starts from the beginning for want of it."""


class EpochBegins(RewindNeeded):
    """The run goes back: this peer's worker is to be started again, in that epoch."""

    def __init__(self, epoch: Epoch, reason: str) -> None:
        super().__init__(reason, epoch.step)
        self.epoch = epoch


class CopyAtHand(RewindNeeded):
    """Others keep a newer state of this stage than this peer has, and nobody serves it: start again from theirs."""


def recall_epoch(run_folder: Path) -> Epoch:
    """The epoch of this machine's checkpoints; the first where nothing else is noted."""
    try:
        note = json.loads((run_folder / EPOCH_FILE).read_text())
        return Epoch(int(note["number"]), int(note["step"]))
    except (OSError, ValueError, KeyError, TypeError):
        return FIRST


def enter_epoch(run_folder: Path, run_id: str, epoch: Epoch) -> None:
    """Discards the checkpoints and copies of steps that are void now, then notes the epoch.

    In this order: cut short, it is done again. Raises CheckpointUnwritable.
    """
    for folder in (*run_folder.glob("stage-*"), *copies_folder(run_folder).glob("stage-*")):
        if folder.name.removeprefix("stage-").isdecimal():
            CheckpointStore(folder, run_id, int(folder.name.removeprefix("stage-"))).discard_after(epoch.step)
    replace_text(run_folder / EPOCH_FILE, json.dumps({"number": epoch.number, "step": epoch.step}))


def epoch_after_restoring(snapshot: DirectorySnapshot, entry: PeerEntry, epoch: Epoch, step: int) -> Epoch | None:
    """Where the run has to go back to with a stage whose state, of that step, comes from a copy.

    None: nowhere, or it is not known yet.

    Args:
        entry: the place that this peer has taken.
        epoch: that it lives in.
    """
    restored = replace(
        entry,
        state=SERVING,
        committed_step=step,
        checkpoints=(step,),
        epoch=epoch.number,
        epoch_step=epoch.step,
        expires_at=math.inf,
    )
    snapshot = snapshot.with_peer(restored)
    following = next_epoch(snapshot, epoch) if is_left_behind(snapshot, epoch, entry.stage, step) else None
    return following if following is not None and following.step > 0 else None


class EpochWatch:
    """Looks whether the run goes back, or has to.

    Args:
        peer_id: this peer's.
        epoch: that it lives in.
        ledger: of its stage.
        restored: its state comes from a copy, so nobody retains what followed: there is nothing to wait for.
        unobtainable: the step of a copy that could not be fetched when this peer started.
    """

    def __init__(
        self, peer_id: str, epoch: Epoch, ledger: StageLedger, *, restored: bool, unobtainable: int = 0
    ) -> None:
        self.epoch = epoch
        self._unobtainable = unobtainable
        self._peer_id, self._ledger = peer_id, ledger
        self._stall = Stall()
        self._has_warned = False  # of this stall
        self._patience = timedelta(0) if restored else PATIENCE

    def look(self, snapshot: DirectorySnapshot, *, serving: bool) -> None:
        """Raises EpochBegins, CopyAtHand."""
        newest = newest_epoch(snapshot, self.epoch)
        if newest != self.epoch:
            raise EpochBegins(newest, f"the run goes back to step {newest.step}: a stage lost what followed")
        ledger, now = self._ledger, time.monotonic()
        copy = newest_copy(snapshot, self.epoch, ledger.stage)
        newer_than = max(ledger.committed, self._unobtainable)
        if copy is not None and copy.step > newer_than and not self._somebody_serves(snapshot, copy.step):
            raise CopyAtHand(f"a copy of stage {ledger.stage} at step {copy.step} is at hand", ledger.committed)
        left = serving and is_left_behind(snapshot, self.epoch, ledger.stage, ledger.committed)
        progress = ledger.committed, ledger.done, ledger.begun
        lasts = self._stall.lasts(now, progress, left_behind=left)
        if lasts is None:
            self._has_warned = False
            return
        stalled = timedelta(seconds=lasts)
        fellows = epoch_of_fellows(snapshot, self.epoch, ledger.stage)
        if fellows is not None and stalled >= PATIENCE_WITH_FELLOWS:
            raise EpochBegins(fellows, f"stage {ledger.stage} goes back to step {fellows.step} with its other peers")
        following = next_epoch(snapshot, self.epoch) if stalled >= self._patience else None
        if following is None:
            return
        if following.step == 0 and stalled < PATIENCE_BEFORE_ALL_IS_LOST:
            if not self._has_warned:
                log.warning("stage %d waits for someone who has its state; all others are ahead of it", ledger.stage)
            self._has_warned = True
            return
        raise EpochBegins(
            following,
            f"stage {ledger.stage} stands at step {ledger.committed} and cannot catch up with the others: "
            f"step {following.step} is the newest that every stage has",
        )

    def _somebody_serves(self, snapshot: DirectorySnapshot, step: int) -> bool:
        """Whether another peer of this stage has that step, and gives its state to who is behind."""
        others = (entry for entry in snapshot.at(self._ledger.stage) if entry.peer_id != self._peer_id)
        return any(entry.state == SERVING and entry.committed_step >= step for entry in others)
