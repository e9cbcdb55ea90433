"""Which epoch a starting peer's state belongs into, and its state from a copy where nobody else has it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path

from coordinator.custody import newest_copy
from coordinator.directory import DirectorySnapshot, PeerEntry
from coordinator.epochs import FIRST, Epoch, newest_epoch
from coordinator.swarm import Swarm
from node.config import RunConfig
from node.custody import awaits_copy, restore
from node.epochs import enter_epoch, epoch_after_restoring, recall_epoch
from node.presence import claiming
from stage_server.errors import StageError
from stage_server.state_plan import StateProgress

log = logging.getLogger(__name__)

PATIENCE = timedelta(seconds=30)
"""How long a peer waits for a state that the run went back to and that others keep: they are being started too."""
LOOK = timedelta(seconds=1)

OnProgress = Callable[[StateProgress], None]


@dataclass(frozen=True, slots=True)
class TakenUp:
    """What a starting peer goes on from."""

    epoch: Epoch
    restored: bool = False  # its state had to come from a copy
    unobtainable: int = 0
    """The step of the newest copy that was at hand and could not be fetched; 0: of none."""


async def take_up(
    swarm: Swarm, config: RunConfig, entry: PeerEntry, state_folder: Path, *, on_progress: OnProgress
) -> TakenUp:
    """The epoch that this peer enters, its checkpoints cut back to it, and its state there, from a copy if need be.

    Args:
        swarm: this peer's.
        config: the run's.
        entry: the place that the peer has taken.
        state_folder: of this machine.
        on_progress: told of a copy on its way.

    Raises:
        CheckpointUnwritable, DirectoryLost
    """
    if config.replicas.max_replicas is not None:
        return TakenUp(FIRST)
    run_folder = state_folder / config.run_id
    own = recall_epoch(run_folder)
    snapshot = await swarm.snapshot(config.run_id, config.stages)
    epoch = newest_epoch(snapshot.where(lambda other: other.peer_id != swarm.peer_id), own)
    if epoch != own:
        await asyncio.to_thread(enter_epoch, run_folder, config.run_id, epoch)
    entry = replace(entry, epoch=epoch.number, epoch_step=epoch.step)
    async with claiming(swarm, entry):
        step, unobtainable, snapshot = await _restored(
            swarm, config, entry.stage, epoch, snapshot=snapshot, state_folder=state_folder, on_progress=on_progress
        )
    if step is not None and (following := epoch_after_restoring(snapshot, entry, epoch, step)) is not None:
        log.warning("the run goes back to step %d, the newest that every stage has", following.step)
        epoch = following
        await asyncio.to_thread(enter_epoch, run_folder, config.run_id, epoch)
    return TakenUp(epoch, step is not None, unobtainable)


async def _restored(
    swarm: Swarm,
    config: RunConfig,
    stage: int,
    epoch: Epoch,
    *,
    snapshot: DirectorySnapshot,
    state_folder: Path,
    on_progress: OnProgress,
) -> tuple[int | None, int, DirectorySnapshot]:
    """The step of a state that came from a copy, that of a copy that was not to be had, what the directory said."""
    give_up = time.monotonic() + PATIENCE.total_seconds()
    step: int | None = None
    unobtainable = 0
    while True:
        try:
            step = await restore(snapshot, state_folder, config.run_id, stage, epoch, on_progress=on_progress)
        except StageError as error:
            log.warning("no copy of stage %d is to be had: %s", stage, error)
            copy = newest_copy(snapshot, epoch, stage)
            unobtainable = max(unobtainable, copy.step if copy is not None else 0)
        is_here = step is not None or not awaits_copy(snapshot, state_folder, config.run_id, stage, epoch)
        if is_here or time.monotonic() > give_up:
            return step, unobtainable if step is None else 0, snapshot
        await asyncio.sleep(LOOK.total_seconds())
        snapshot = await swarm.snapshot(config.run_id, config.stages)
