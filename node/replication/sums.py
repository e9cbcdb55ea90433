"""The sums of a stage's rounds as one replica makes them: its part put together, added up with the others', and kept
until the replicas have agreed on one.

What is added up, and at which steps, is the trainer's business (`ReplicaTrainer.write_contribution`, `exchanges`).
Where nothing is, a round settles who has counted what: then its digest names the shares.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from coordinator.agreement import Averaged, Round, digest_of_shares
from coordinator.averaging import AveragingFailed, Reason, StageSum
from node.replication.contacts import Contacts
from node.replication.duties import ReplicaDuties
from node.tasks import Background
from stage_server.errors import LinkLost
from stage_server.ids import MicrobatchId
from stage_server.optimizer import CommitReport
from stage_server.peer import StagePeer
from stage_server.replica_trainer import Agreed, ReplicaTrainer

log = logging.getLogger(__name__)

PATIENCE_FIRST = timedelta(seconds=20)  # for a round, before any was measured,
PATIENCE_A_VALUE = timedelta(microseconds=8)  # and for each value of it: 4 bytes there and back at 8 Mbit/s
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
        self._progress = asyncio.Event()
        self._rounds: dict[int, Round] = {}
        self._totals: dict[int, Agreed] = {}
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

    def settled_at_once(self, proposed: Round, *, behind: bool) -> tuple[str, int] | None:
        """(digest, microbatches) where nothing has to be waited for; None where it has."""
        self._rounds[proposed.number] = proposed
        self._totals.pop(proposed.number, None)  # of a round that was given up with all of its step
        digest = self._digest_without_exchange(proposed)
        if digest is None or not (behind or self._duties.is_level):
            return None
        return digest, _num_shared(proposed)

    async def add_up(self, proposed: Round, *, behind: bool) -> tuple[str, int]:
        """Makes the total of a round. Returns (digest, microbatches that the round settles).

        Args:
            proposed: the round.
            behind: this replica takes over a state, and adds nothing.

        Raises:
            AveragingFailed, LinkLost: the round did not take effect here.
        """
        if not behind:
            await self._level()
        digest = self._digest_without_exchange(proposed)
        if digest is None:
            began = time.monotonic()
            digest = await self._exchange(proposed, behind=behind)
            self._took.append(time.monotonic() - began)
        return digest, _num_shared(proposed)

    def take(self, averaged: Averaged) -> tuple[Round | None, Agreed]:
        """The round that was agreed on, and what the step is taken with; all others are forgotten.

        For `commit`, or for a replica that has no share of any step yet.
        """
        agreed = self._rounds.get(averaged.round)
        total = self._totals.get(averaged.round)
        if total is None and (agreed is None or self._digest_without_exchange(agreed) != averaged.digest):
            raise RuntimeError(f"the sum of round {averaged.round} that was agreed on is not here")
        self.forget()
        return agreed, total or Agreed(0)

    def forget(self) -> None:
        """No round of before is of any use."""
        self._rounds.clear()
        self._totals.clear()

    def commit(self, names: frozenset[MicrobatchId], agreed: Agreed, step: int) -> CommitReport:
        """Takes the step; `names` is this replica's share of it. On the device thread."""
        self._make_sum(names)
        return self._trainer.commit_agreed(step, replace(agreed, num_microbatches=len(names)))

    def progressed(self) -> None:
        """A step that was agreed on may have been taken."""
        self._progress.set()

    def add_missing(self) -> None:
        """On the device thread: adds what was done here and is held by nobody now."""
        names = self._duties.to_recount()
        self._peer.add_again(self._ledger.inputs_of(names))
        self._ledger.share(self._ledger.counted.union(names))

    def _digest_without_exchange(self, proposed: Round) -> str | None:
        """What stands for the total of a round that has none; None where there is something to add up."""
        if not self._ledger.plan.commits(proposed.step):
            return CLOSING
        if not self._trainer.exchanges(proposed.step):
            return digest_of_shares(proposed)
        return self._alone_digest if len(proposed.shares) == 1 else None

    async def _level(self) -> None:
        """Until what was agreed on is taken: before that, the gradient sum is still the step's before."""
        while not self._duties.is_level:
            self._progress.clear()
            await self._progress.wait()

    async def _exchange(self, proposed: Round, *, behind: bool) -> str:
        averaging = await self.started()
        members = [self._averager_of(peer, averaging) for peer in proposed.shares]
        if behind:
            averaging.values[:] = 0
            weight = 0
        else:
            names = self._duties.names(proposed.shares[self._duties.agreement.peer])
            weight = await self._peer.order(partial(self._write, names, proposed.step, averaging.values))
        result = await averaging.sum(
            round_key(self._place, proposed), members, weight, self._patience(len(averaging.values))
        )
        weight = result.num_microbatches
        if not self._trainer.can_be_whole(weight):
            raise AveragingFailed(Reason.NOT_VERIFIED, f"the sum of step {proposed.step} holds {weight} microbatches")
        self._totals[proposed.number] = Agreed(0, torch.from_numpy(averaging.total).clone(), weight)
        return f"{result.digest}/{weight}"

    def _write(self, names: frozenset[MicrobatchId], step: int, values: npt.NDArray[np.float32]) -> int:
        """On the device thread: what this replica puts into the total, and its weight."""
        self._make_sum(names)
        return self._trainer.write_contribution(step, len(names), torch.from_numpy(values))

    def _make_sum(self, names: frozenset[MicrobatchId]) -> None:
        """On the device thread: computes the gradient sum again unless it holds exactly these."""
        if names != self._ledger.counted:
            self._trainer.drop_sum()
            self._peer.add_again(self._ledger.inputs_of(names))
            self._ledger.share(names)

    def _averager_of(self, peer: str, own: Averaging) -> str:
        if peer == self._duties.agreement.peer:
            return own.address
        contact = self._contacts.known.get(peer)
        if contact is None or contact.word is None or not contact.word.averager:
            raise LinkLost(f"replica {peer} has not started its averaging yet")
        return contact.word.averager

    def _patience(self, num_values: int) -> timedelta:
        if not self._took:
            return PATIENCE_FIRST + num_values * PATIENCE_A_VALUE
        return max(PATIENCE_LEAST, timedelta(seconds=PATIENCE_FACTOR * max(self._took)))


def round_key(place: str, proposed: Round) -> str:
    """What the members of a round meet under.

    It names the shares: two leaders that do not see each other may give one number to different ones, and members of
    both would add up a microbatch twice and leave another out.
    """
    return f"{place}/{proposed.step}/{proposed.lineage}/{proposed.number}/{digest_of_shares(proposed)}"


def _num_shared(proposed: Round) -> int:
    return sum(map(len, proposed.shares.values()))
