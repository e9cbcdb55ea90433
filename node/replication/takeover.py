"""A state on its way from one replica to another: both ends.

Who takes over a state is given every commit that is agreed on from the moment the copy was made. When the copy is here
it takes those steps, and stands where the others stand.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path

from node.replication.calls import Prepared
from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointInvalid
from stage_server.fetch import FetchedState, fetch_state
from stage_server.peer import StagePeer
from stage_server.replica_trainer import Agreed, ReplicaTrainer
from stage_server.state_plan import StateProgress

log = logging.getLogger(__name__)

OnProgress = Callable[[StateProgress], None]

COMMIT_WAIT = timedelta(seconds=5)
PIN = timedelta(seconds=60)


class StateOffer:
    """The giving end: the committed state, put on disk for others to fetch."""

    def __init__(self, peer: StagePeer, trainer: ReplicaTrainer, checkpoints: CheckpointStore) -> None:
        self._peer, self._trainer, self._checkpoints = peer, trainer, checkpoints
        self._committed = asyncio.Event()

    def committed(self) -> None:
        """A step was committed here."""
        self._committed.set()

    async def prepare(self) -> Prepared:
        """Puts the state on disk, right after a commit if one comes soon. Raises CheckpointUnwritable."""
        if not self._peer.ledger.complete:
            await self._commit_or_pause()
        prepared = await self._peer.order(self._save)
        await asyncio.to_thread(self._checkpoints.listing, prepared.step)  # hashes it before anybody waits for that
        return prepared

    async def _commit_or_pause(self) -> None:
        self._committed.clear()
        try:
            async with asyncio.timeout(COMMIT_WAIT.total_seconds()):
                await self._committed.wait()
        except TimeoutError:
            log.info("no commit for a while: the state as it is")

    def _save(self) -> Prepared:
        """On the device thread."""
        step, lineage = self._peer.ledger.committed, self._peer.lineage()
        if step not in self._checkpoints.steps() or self._checkpoints.lineage(step) != lineage:
            self._checkpoints.save(step, self._trainer.state_tensors(), lineage)
        self._checkpoints.pin(step, PIN)
        return Prepared(step, lineage)


@dataclass(frozen=True, slots=True)
class Missed:
    """A step that was committed while the copy was on its way."""

    step: int
    lineage: str  # after it
    agreed: Agreed


class Takeover:
    """The taking end, once. `held`: as below, of an attempt before this one."""

    def __init__(
        self,
        peer: StagePeer,
        trainer: ReplicaTrainer,
        checkpoints: CheckpointStore,
        run_id: str,
        held: Prepared | None = None,
    ) -> None:
        self._peer, self._trainer, self._checkpoints = peer, trainer, checkpoints
        self._run_id = run_id
        self._missed: deque[Missed] = deque()
        self.held = held
        """Where this replica's weights stand, if no longer where the ledger does."""

    def missed(self, missed: Missed) -> None:
        """A step was committed."""
        self._missed.append(missed)

    async def fetch(self, donors: Sequence[str], prepared: Prepared, on_progress: OnProgress) -> int:
        """Makes the state this peer's own; the step it is of. Raises StageError.

        `donors`: who was asked first; the others may have the same state, where replicas are equal.
        """
        folder = self._checkpoints.incoming
        donors = donors if self._trainer.replicas_are_equal else donors[:1]
        fetched = await fetch_state(
            donors, self._run_id, folder, step=prepared.step, lineage=prepared.lineage, on_progress=on_progress
        )
        await self._peer.order(lambda: self._enter(folder, fetched))
        return fetched.step

    async def catch_up(self) -> int | None:
        """Takes the steps that were committed since the copy was made. Returns the last of them, None if none was.

        When it returns, nothing more can have been committed until the caller waits for anything.
        """
        newest = None
        while self._missed:
            missed = self._missed.popleft()
            newest = missed.step
            if self._peer.ledger.plan.commits(newest):
                await self._peer.order(partial(self._take_step, missed))
        return newest

    def _enter(self, folder: Path, fetched: FetchedState) -> None:
        """On the device thread: the state becomes this peer's, and the newest checkpoint on its disk."""
        self._trainer.take_over(fetched.tensors)
        self.held = Prepared(fetched.step, fetched.lineage)
        self._checkpoints.discard_after(fetched.step)
        if self._trainer.replicas_are_equal:
            self._checkpoints.adopt(folder)
        else:  # what was taken over is not all that came
            self._checkpoints.save(fetched.step, self._trainer.state_tensors(), fetched.lineage)
        shutil.rmtree(folder, ignore_errors=True)

    def _take_step(self, missed: Missed) -> None:
        """On the device thread."""
        if missed.agreed.total_N is None and self._trainer.exchanges(missed.step):
            raise CheckpointInvalid(f"the sum of step {missed.step} is not here")
        self._trainer.commit_agreed(missed.step, missed.agreed)
        self.held = Prepared(missed.step, missed.lineage)
