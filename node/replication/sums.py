"""The sums of a stage's rounds as one replica makes them: its part put together, added up with the others', and kept
until the replicas have agreed on one.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coordinator.agreement import Averaged, Round
from coordinator.averaging import AveragingFailed, StageSum
from node.replication.contacts import Contacts
from node.replication.duties import ReplicaDuties
from node.tasks import Background
from stage_server.errors import LinkLost
from stage_server.ids import MicrobatchId
from stage_server.peer import StagePeer
from stage_server.replica_trainer import ReplicaTrainer

log = logging.getLogger(__name__)

PATIENCE_FIRST = timedelta(seconds=20)  # for a round, before any was measured
PATIENCE_LEAST = timedelta(seconds=5)
PATIENCE_FACTOR = 4.0  # times the longest of the last rounds
CLOSING = "closing"
"""Stands for the sum of a step that has none: the last evaluation."""


class Averaging(Protocol):
    """What is needed of `ReplicaAveraging`."""

    @property
    def address(self) -> str: ...

    @property
    def values(self) -> npt.NDArray[np.float32]: ...

    @property
    def total(self) -> npt.NDArray[np.float32]: ...

    async def sum(self, key: str, members: Any, count: int, within: timedelta) -> StageSum: ...

    async def close(self) -> None: ...


class Sums:
    """See the module's text.

    Args:
        place: names the stage within all runs, for the keys of rounds.
        duties: this replica's.
        peer: whose device thread is used.
        trainer: what holds the gradient sum.
        contacts: the other replicas.
        start: starts the averaging process.
        on_started: told when that has come to something.
        background: for the start.
    """

    def __init__(
        self,
        place: str,
        *,
        duties: ReplicaDuties,
        peer: StagePeer,
        trainer: ReplicaTrainer,
        contacts: Contacts,
        start: Callable[[], Awaitable[Averaging]],
        on_started: Callable[[], None],
        background: Background,
    ) -> None:
        self._place, self._duties, self._ledger = place, duties, duties.ledger
        self._peer, self._trainer, self._contacts = peer, trainer, contacts
        self._start, self._on_started, self._background = start, on_started, background
        self._averaging: Averaging | None = None
        self._starting: asyncio.Task[None] | None = None
        self._took: deque[float] = deque(maxlen=8)  # seconds, of the last rounds
        self._rounds: dict[int, Round] = {}
        self._totals: dict[int, Tensor] = {}
        self._alone_digest = f"alone/{duties.agreement.peer}"

    # -- the averaging process ----------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """Of this peer's averaging; empty while it has none."""
        return "" if self._averaging is None else self._averaging.address

    def begin_to_start(self) -> None:
        """Starts averaging in the background, unless it has started or is starting."""
        if self._averaging is None and (self._starting is None or self._starting.done()):
            self._starting = self._background.start(self._do_start())

    async def started(self) -> Averaging:
        """This peer's averaging. Raises LinkLost when it does not start; the next call tries again."""
        self.begin_to_start()
        if self._starting is not None:
            await asyncio.shield(self._starting)
        if self._averaging is None:
            raise LinkLost("this peer's averaging does not start")
        return self._averaging

    async def close(self) -> None:
        """Ends the averaging process."""
        if self._averaging is not None:
            await self._averaging.close()

    async def _do_start(self) -> None:
        try:
            self._averaging = await self._start()
        except AveragingFailed as error:
            log.warning("%s", error)
        self._on_started()

    # -- rounds -------------------------------------------------------------------------------------------------

    def settled_at_once(self, proposed: Round, share: frozenset[int], *, behind: bool) -> tuple[str, int] | None:
        """(digest, microbatches) where nothing has to be waited for: alone, a peer's own sum is the total."""
        self._rounds[proposed.number] = proposed
        if len(proposed.shares) > 1 or behind or self._duties.names(share) != self._ledger.counted:
            return None
        return self._alone_digest, len(share)

    async def add_up(self, proposed: Round, share: frozenset[int], *, behind: bool) -> tuple[str, int]:
        """Makes the sum hold the share, and adds up all members'. Returns (digest, microbatches in it).

        Args:
            proposed: the round.
            share: what this replica adds.
            behind: it takes over a state, and adds nothing.

        Raises:
            AveragingFailed, LinkLost: the round did not take effect here.
        """
        began = time.monotonic()
        result = await self._add_up(proposed, share, behind=behind)
        self._took.append(time.monotonic() - began)
        return result

    async def _add_up(self, proposed: Round, share: frozenset[int], *, behind: bool) -> tuple[str, int]:
        if not self._ledger.plan.commits(proposed.step):
            return CLOSING, sum(map(len, proposed.shares.values()))  # nothing to add up
        if not behind:
            names = self._duties.names(share)
            await self._peer.order(lambda: self._make_sum(names))
        if len(proposed.shares) == 1:
            return self._alone_digest, len(share)
        averaging = await self.started()
        members = [self._averager_of(peer, averaging) for peer in proposed.shares]
        if behind:
            averaging.values[:] = 0
        else:
            values = torch.from_numpy(averaging.values)
            await self._peer.order(lambda: self._trainer.write_gradients(values))
        key = f"{self._place}/{proposed.step}/{proposed.lineage}/{proposed.number}"
        result = await averaging.sum(key, members, len(share), self._patience())
        self._totals[proposed.number] = torch.from_numpy(averaging.total).clone()
        return result.digest, result.num_microbatches

    def take(self, averaged: Averaged) -> tuple[Round | None, Tensor | None]:
        """The round that was agreed on and its total (None: this peer's own sum); all others are forgotten."""
        agreed, total = self._rounds.get(averaged.round), self._totals.get(averaged.round)
        if total is None and averaged.digest not in (CLOSING, self._alone_digest):
            raise RuntimeError(f"the sum of round {averaged.round} that was agreed on is not here")
        self.forget()
        return agreed, total

    def forget(self) -> None:
        """No round of before is of any use."""
        self._rounds.clear()
        self._totals.clear()

    def _make_sum(self, names: frozenset[MicrobatchId]) -> None:
        """On the device thread: computes the gradient sum again unless it holds exactly these."""
        if names != self._ledger.counted:
            self._trainer.drop_sum()
            self._peer.add_again(self._ledger.inputs_of(names))
            self._ledger.share(names)

    def add_missing(self) -> None:
        """On the device thread: adds what was done here and is held by nobody now."""
        names = self._duties.to_recount()
        self._peer.add_again(self._ledger.inputs_of(names))
        self._ledger.share(self._ledger.counted.union(names))

    def _averager_of(self, peer: str, own: Averaging) -> str:
        if peer == self._duties.agreement.peer:
            return own.address
        contact = self._contacts.known.get(peer)
        if contact is None or contact.word is None or not contact.word.averager:
            raise LinkLost(f"replica {peer} has not started its averaging yet")
        return contact.word.averager

    def _patience(self) -> timedelta:
        if not self._took:
            return PATIENCE_FIRST
        return max(PATIENCE_LEAST, timedelta(seconds=PATIENCE_FACTOR * max(self._took)))
