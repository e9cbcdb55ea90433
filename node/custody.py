"""Keeps copies of another stage's checkpoints, and restores a stage from such a copy."""

from __future__ import annotations

import asyncio
import logging
import random
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

from coordinator.custody import Source, newest_copy, newest_to_keep, stage_in_custody
from coordinator.directory import SERVING, DirectorySnapshot
from coordinator.epochs import Epoch, epoch_of
from coordinator.errors import DirectoryLost
from coordinator.swarm import RECENT, Swarm
from node.assembly import stage_folder
from stage_server.checkpoint import CheckpointStore
from stage_server.errors import StageError
from stage_server.fetch import fetch_state
from stage_server.state_plan import StateProgress

log = logging.getLogger(__name__)

LOOK = timedelta(seconds=5)
SHARE = 0.02
"""Of the time, at most, goes into copying: machines and links are there for training."""


def copies_folder(run_folder: Path) -> Path:
    """Where copies of other stages lie: a folder for each stage."""
    return run_folder / "copies"


class Custodian:
    """Copies, again and again, the newest common checkpoint of the stage that is in this peer's custody."""

    def __init__(self, swarm: Swarm, run_id: str, num_stages: int, folder: Path, *, common_every: int) -> None:
        """`folder`: the run's, in the state folder. `common_every`: in steps."""
        self._swarm, self._run_id, self._num_stages = swarm, run_id, num_stages
        self._folder, self._common_every = folder, common_every
        self._store = self._newest_store()

    @property
    def kept(self) -> tuple[int, int] | None:
        """(stage, step) of the copy that is here."""
        steps = self._store.steps() if self._store is not None else []
        return (self._store.stage, steps[-1]) if self._store is not None and steps else None

    def copies(self, stage: int) -> CheckpointStore | None:
        """The copies of a stage, if they are what is kept here."""
        return self._store if self._store is not None and self._store.stage == stage else None

    async def keep(self, epoch: Epoch) -> None:
        """For ever. Raises CheckpointUnwritable when a folder cannot be made."""
        while True:
            started = time.monotonic()
            try:
                await self._copy(epoch)
            except (StageError, DirectoryLost) as error:
                log.warning("no new copy: %s", error)
            took = time.monotonic() - started
            await asyncio.sleep(max(LOOK.total_seconds(), took / SHARE) * random.uniform(0.8, 1.2))

    async def _copy(self, epoch: Epoch) -> None:
        snapshot = await self._swarm.snapshot(self._run_id, self._num_stages, RECENT)
        stage = stage_in_custody(snapshot, self._swarm.peer_id)
        if stage is None:
            return  # what is here stays: it may be the last one
        if self._store is None or self._store.stage != stage:
            self._store = self._store_of(stage)
        source = newest_to_keep(snapshot, epoch, stage, self._swarm.peer_id, self._common_every)
        steps = self._store.steps()
        if source is None or (steps and steps[-1] >= source.step):
            return
        await _fetch(source, self._run_id, self._store)
        self._store.prune(source.step)
        log.info("a copy of stage %d at step %d is here", stage, source.step)

    def _store_of(self, stage: int) -> CheckpointStore:
        folder = copies_folder(self._folder) / f"stage-{stage}"
        return CheckpointStore(folder, self._run_id, stage, common_every=self._common_every)

    def _newest_store(self) -> CheckpointStore | None:
        """What an earlier life of this peer has kept."""
        stages = range(self._num_stages)
        kept = [stage for stage in stages if (copies_folder(self._folder) / f"stage-{stage}").exists()]
        stores = [store for store in map(self._store_of, kept) if store.steps()]
        return max(stores, key=lambda store: store.steps()[-1], default=None)


def awaits_copy(snapshot: DirectorySnapshot, state_folder: Path, run_id: str, stage: int, epoch: Epoch) -> bool:
    """Whether the run went back to a step that this machine does not have of its stage, and that nobody serves yet.

    Whoever keeps it is being started in the new epoch too.
    """
    if _is_served(snapshot, stage, epoch):
        return False
    held = CheckpointStore(stage_folder(state_folder, run_id, stage), run_id, stage).steps()
    return max(held, default=0) < epoch.step


async def restore(
    snapshot: DirectorySnapshot,
    state_folder: Path,
    run_id: str,
    stage: int,
    epoch: Epoch,
    *,
    on_progress: Callable[[StateProgress], None],
) -> int | None:
    """Gets a stage's state from a copy, where nobody serves the stage and this machine has nothing newer.

    Returns the step; None where there was no need, or no copy. Raises StageError when a copy cannot be had.
    """
    if _is_served(snapshot, stage, epoch):
        return None
    store = CheckpointStore(stage_folder(state_folder, run_id, stage), run_id, stage)
    own_copies = CheckpointStore(copies_folder(state_folder / run_id) / f"stage-{stage}", run_id, stage)
    held, own = (max(kept.steps(), default=0) for kept in (store, own_copies))
    source = newest_copy(snapshot, epoch, stage)
    if own > held and (source is None or own >= source.step):
        await asyncio.to_thread(_adopt_copy, own_copies, own, store)  # this machine was the one that kept it
        return own
    if source is None or source.step <= held:
        return None
    await _fetch(source, run_id, store, on_progress)
    return source.step


def _is_served(snapshot: DirectorySnapshot, stage: int, epoch: Epoch) -> bool:
    return any(entry.state == SERVING and epoch_of(entry) == epoch for entry in snapshot.at(stage))


def _adopt_copy(copies: CheckpointStore, step: int, store: CheckpointStore) -> None:
    tensors, lineage = copies.load(step), copies.lineage(step)
    store.save(step, tensors, lineage)


async def _fetch(
    source: Source, run_id: str, store: CheckpointStore, on_progress: Callable[[StateProgress], None] | None = None
) -> None:
    await fetch_state(
        source.endpoints, run_id, store.incoming, stage=source.stage, step=source.step, on_progress=on_progress
    )
    await asyncio.to_thread(store.adopt, store.incoming)
    shutil.rmtree(store.incoming, ignore_errors=True)
