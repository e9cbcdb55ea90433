"""One replica among those of its stage: it counts with them, averages with them, commits with them.

The wiring of `ReplicaDuties` (what is to be done), `Contacts` (who is told), the averaging process and the peer. Where
this peer is alone in its stage, all of it comes down to committing when everything is done.

A replica that comes late, or has strayed, takes over another's state: it asks for a copy, and from that moment on takes
part in every round with an empty share, so that it gets all sums; when the copy is here it takes the steps that were
committed meanwhile, and serves.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from coordinator.agreement import (
    INITIAL,
    Action,
    Average,
    Averaged,
    Commit,
    Propose,
    Resync,
    Round,
    StageAgreement,
    Tell,
)
from coordinator.averaging import AveragingFailed, StageSum
from node.replication.calls import Line, Prepared
from node.replication.contacts import Contacts
from node.replication.duties import ReplicaDuties, sizes
from node.replication.messages import ReplicaWord
from node.replication.record import StepRecorder
from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointInvalid, LinkLost, StageError
from stage_server.fetch import FetchedState, fetch_state
from stage_server.ids import MicrobatchId
from stage_server.peer import StagePeer
from stage_server.replica_trainer import ReplicaTrainer

log = logging.getLogger(__name__)

LOOK = timedelta(seconds=0.25)
PATIENCE_FIRST = timedelta(seconds=20)  # for a round, before any was measured
PATIENCE_LEAST = timedelta(seconds=5)
PATIENCE_FACTOR = 4.0  # times the longest of the last rounds
PAUSE_AFTER_FAILURE = timedelta(seconds=0.3)
COMMIT_WAIT = timedelta(seconds=5)
PIN = timedelta(seconds=60)
EXCUSED = timedelta(seconds=15)
"""For how long a replica that held up a round while it had nothing to add is left out."""
CLOSING = "closing"
"""Stands for the sum of a step that has none: the last evaluation."""
AVERAGING_WITHIN = timedelta(minutes=2)
"""How long a new replica waits until its averaging, and the others', has started."""
INTRODUCTION = timedelta(seconds=5)
"""How long a new replica waits to hear from those that the directory names."""


class Averaging(Protocol):
    """What a group needs of `ReplicaAveraging`."""

    @property
    def address(self) -> str: ...

    @property
    def values(self) -> npt.NDArray[np.float32]: ...

    @property
    def total(self) -> npt.NDArray[np.float32]: ...

    async def sum(self, key: str, members: Any, count: int, within: timedelta) -> StageSum: ...

    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Member:
    """Who this replica is to the others."""

    run_id: str
    stage: int
    peer_id: str
    endpoint: str
    reserved_at: float  # Unix time in seconds
    throughput: float  # microbatches per second


@dataclass(frozen=True, slots=True)
class Means:
    """What a group works with."""

    line: Callable[[str], Line]
    averaging: Callable[[], Awaitable[Averaging]]
    recorder: StepRecorder | None = None
    on_serving: Callable[[bool], None] = lambda _: None


class ReplicaGroup:
    """See the module's text. All methods on one event loop. Implements ReplicaHost."""

    def __init__(
        self, member: Member, peer: StagePeer, trainer: ReplicaTrainer, checkpoints: CheckpointStore, means: Means
    ) -> None:
        self.run_id, self.stage = member.run_id, member.stage
        self.serving = False
        """Whether this replica computes microbatches: it has met the others, and is level with them."""
        self.throughput = member.throughput
        """Microbatches per second that this replica serves; follows what is measured."""
        self._member, self._peer, self._ledger, self._trainer = member, peer, peer.ledger, trainer
        self._checkpoints, self._means = checkpoints, means
        committed = peer.ledger.committed
        lineage = (checkpoints.lineage(committed) if committed else "") or INITIAL
        # Later than anything that an earlier life of this peer has told.
        version = int(time.time() * 1000)
        self._agreement = StageAgreement(member.peer_id, sizes(peer.ledger.plan), committed, lineage, version)
        self._duties = ReplicaDuties(peer.ledger, self._agreement)
        self._contacts = Contacts(self._word, self._heard, means.line)
        self._seen: tuple[object, ...] = ()
        self._lineages = {committed: lineage}
        self._totals: dict[int, Tensor] = {}
        self._rounds: dict[int, Round] = {}
        self._averaging: Averaging | None = None
        self._round: tuple[Round, asyncio.Task[None]] | None = None
        self._takeover: asyncio.Task[None] | None = None
        self._behind: deque[tuple[int, Tensor | None]] | None = None  # commits to be taken when the copy is here
        self._excused: dict[str, float] = {}  # by peer: until when, monotonic seconds
        self._recounting = False
        self._level_at = committed
        self._listed_at: float | None = None  # monotonic seconds; when the directory was first heard
        self._introduced = False
        peer.ledger.paused = True
        self._starting: asyncio.Task[None] | None = None
        self._rounds_took: deque[float] = deque(maxlen=8)
        self._committed_event = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._alone_digest = f"alone/{member.peer_id}"
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._held: tuple[int, str] | None = (
            None  # (step, lineage) of a state taken over that the ledger does not know of
        )
        self._standing = lineage  # of the state that this replica really has, whatever it is about to take over
        peer.lineage = lambda: self._lineages.get(self._ledger.committed, self._standing)
        peer.on_progress = self._progress
        if means.recorder is not None:
            trainer.before_commit = means.recorder.before_commit

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Takes part for ever. Raises what it cannot go on with."""
        try:
            while not self._failure.done():
                self._look()
                await asyncio.wait({self._failure}, timeout=LOOK.total_seconds())
            self._failure.result()
        finally:
            await self._close()

    async def _close(self) -> None:
        self._peer.on_progress = None
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._contacts.close()
        if self._averaging is not None:
            await self._averaging.close()

    def listed(self, endpoints: Mapping[str, str]) -> None:
        """The other replicas of the stage, as the directory has them: endpoint by peer id."""
        if self._listed_at is None:
            self._listed_at = time.monotonic()
        self._contacts.listed(endpoints)
        self._look()

    def level(self) -> frozenset[str]:
        """The other replicas that were heard lately, serve, and have committed all that this one has."""
        committed = self._ledger.committed
        heard = self._contacts.in_sight().items()
        return frozenset(peer for peer, word in heard if word.serving and word.tally.committed >= committed)

    def _look(self) -> None:
        """Who takes part now; tells the agreement when that has changed."""
        self._contacts.forget_old()
        heard = self._contacts.in_sight()
        if heard and self._averaging is None and (self._starting is None or self._starting.done()):
            self._starting = self._start(self._start_averaging())
        # Who cannot average yet takes no part: nobody waits for a process that is only starting.
        able = heard if self._averaging is not None else {}
        now = time.monotonic()
        words = {p: word for p, word in able.items() if word.averager and self._excused.get(p, 0.0) < now}
        self._notice(words)
        self._introduce(heard, words)

    def _notice(self, words: Mapping[str, ReplicaWord]) -> None:
        """Tells ledger, sources and agreement of those who take part, when that has changed."""
        told = tuple(sorted((peer, word.serving, word.throughput, word.reserved_at) for peer, word in words.items()))
        if (told, self.serving, self.throughput) == self._seen:
            return
        self._seen = told, self.serving, self.throughput
        member = self._member
        sources = {peer: word.throughput for peer, word in words.items() if word.serving}
        if self.serving or not sources:
            sources[member.peer_id] = self.throughput
        self._duties.in_sight(sources)
        self._ledger.alone(not words)
        claims = {peer: word.reserved_at for peer, word in words.items()} | {member.peer_id: member.reserved_at}
        self._act(self._agreement.in_sight(words, claims))
        for word in words.values():
            self._act(self._agreement.receive_tally(word.tally))

    def _introduce(self, heard: Mapping[str, ReplicaWord], words: Mapping[str, ReplicaWord]) -> None:
        """Nothing is computed before the others were heard and can be averaged with: they may be steps ahead."""
        if self._introduced or self._listed_at is None:
            return
        waited = time.monotonic() - self._listed_at
        if self._contacts.unheard and waited < INTRODUCTION.total_seconds():
            return
        behind = any(word.tally.committed > self._ledger.committed for word in heard.values())
        if len(words) < len(heard) and (behind or waited < AVERAGING_WITHIN.total_seconds()):
            return
        self._introduced = True
        if self._behind is None:
            self._serve()

    def _serve(self) -> None:
        self._ledger.paused = False
        self.serving = True
        self._means.on_serving(True)
        self._peer.neighbours.report()  # before the first frame of a step that they do not expect yet
        self._contacts.changed()
        self._peer.woken()

    # -- talking ------------------------------------------------------------------------------------------------

    def _word(self) -> ReplicaWord:
        member = self._member
        return ReplicaWord(
            peer_id=member.peer_id,
            endpoint=member.endpoint,
            reserved_at=member.reserved_at,
            throughput=self.throughput,
            averager=self._averaging.address if self._averaging is not None else "",
            serving=self.serving and not self._peer.draining,
            tally=self._agreement.tally(),
            news=self._duties.news(),
        )

    def hear(self, word: ReplicaWord, proposed: Round | None) -> ReplicaWord:
        """Another replica's word, and its proposal if it makes one; returns this replica's word."""
        if word.peer_id != self._member.peer_id:
            self._heard(word)
        if proposed is not None:
            self._act(self._agreement.receive_round(proposed))
        return self._word()

    def _heard(self, word: ReplicaWord) -> None:
        self._contacts.hears(word)
        self._look()
        self._duties.receive_news(word.peer_id, word.news)
        self._peer.note_evaluation()
        self._act(self._agreement.receive_tally(word.tally))
        self._progress()

    def _progress(self) -> None:
        """The ledger or the agreement may have changed."""
        if self._level_at != self._ledger.committed and self._duties.is_level:
            self._level_at = self._ledger.committed
            self._standing = self._agreement.lineage
            self._committed_event.set()
        self._act(self._duties.reconcile())
        if not self._recounting and self._behind is None and self._duties.to_recount():
            self._recounting = True
            self._start(self._recount())

    # -- doing --------------------------------------------------------------------------------------------------

    def _act(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case Tell():
                    self._contacts.changed()
                case Propose(proposed, members):
                    for peer in members:
                        self._contacts.propose(peer, proposed)
                    if self._member.peer_id in members:
                        self._act(self._agreement.receive_round(proposed))
                case Average(proposed, share):
                    self._drop_round()
                    self._rounds[proposed.number] = proposed
                    if not self._is_settled_alone(proposed, share):
                        self._round = proposed, self._start(self._average(proposed, share))
                case Commit(step, averaged):
                    self._commit(step, averaged)
                case Resync(peer, _):
                    if self._takeover is not None:
                        self._takeover.cancel()
                    self._takeover = self._start(self._take_over(peer))
        if self._round is not None and not self._agreement.is_frozen:
            self._drop_round()
        self._duties.freeze()

    def _drop_round(self) -> None:
        if self._round is not None:
            self._round[1].cancel()
            self._round = None

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self._failure.done():
            self._failure.set_exception(error)

    # -- sums ---------------------------------------------------------------------------------------------------

    def _is_settled_alone(self, proposed: Round, share: frozenset[int]) -> bool:
        """Alone, a peer's own sum is the total, and nothing has to be waited for."""
        if len(proposed.shares) > 1 or self._behind is not None or self._duties.names(share) != self._ledger.counted:
            return False
        self._act(self._agreement.averaged(proposed.number, self._alone_digest, len(share)))
        return True

    async def _average(self, proposed: Round, share: frozenset[int]) -> None:
        started = time.monotonic()
        try:
            digest, count = await self._averaged(proposed, share)
        except (AveragingFailed, LinkLost) as error:
            log.warning("round %d of step %d: %s", proposed.number, proposed.step, error)
            self._excuse(proposed, error)
            await asyncio.sleep(PAUSE_AFTER_FAILURE.total_seconds())
            digest, count = None, 0
        else:
            self._rounds_took.append(time.monotonic() - started)
        self._round = None
        self._act(self._agreement.averaged(proposed.number, digest, count))
        self._progress()

    def _excuse(self, failed: Round, error: Exception) -> None:
        """Who takes over a state and cannot keep up with rounds meanwhile takes no part for a while.

        It has nothing to add, and all others would wait for it again. It will have to take over a newer state.
        """
        for peer in failed.shares:
            contact = self._contacts.known.get(peer)
            word = contact.word if contact is not None else None
            if word is not None and not word.serving and word.averager and _id_of(word.averager) in str(error):
                self._excused[peer] = time.monotonic() + EXCUSED.total_seconds()
        self._look()

    async def _averaged(self, proposed: Round, share: frozenset[int]) -> tuple[str, int]:
        """Makes the sum hold the share, and adds up all members'. Returns (digest, microbatches in it)."""
        if not self._ledger.plan.commits(proposed.step):
            return CLOSING, sum(map(len, proposed.shares.values()))  # nothing to add up
        if self._behind is None:
            names = self._duties.names(share)
            await self._peer.order(lambda: self._make_sum(names))
        if len(proposed.shares) == 1:
            return self._alone_digest, len(share)
        averaging = await self._require_averaging()
        members = [self._averager_of(peer, averaging) for peer in proposed.shares]
        if self._behind is None:
            values = torch.from_numpy(averaging.values)
            await self._peer.order(lambda: self._trainer.write_gradients(values))
        else:
            averaging.values[:] = 0
        key = f"{self.run_id}/{self.stage}/{proposed.step}/{proposed.lineage}/{proposed.number}"
        result = await averaging.sum(key, members, len(share), self._patience())
        self._totals[proposed.number] = torch.from_numpy(averaging.total).clone()
        return result.digest, result.num_microbatches

    def _make_sum(self, names: frozenset[MicrobatchId]) -> None:
        """On the device thread: computes the gradient sum again unless it holds exactly these."""
        if names != self._ledger.counted:
            self._trainer.drop_sum()
            self._peer.add_again(self._ledger.inputs_of(names))
            self._ledger.share(names)

    async def _recount(self) -> None:
        """Adds what was done here and is held by nobody now."""
        try:
            await self._peer.order(self._add_missing)
        finally:
            self._recounting = False
        self._progress()

    def _add_missing(self) -> None:
        """On the device thread."""
        names = self._duties.to_recount()
        self._peer.add_again(self._ledger.inputs_of(names))
        self._ledger.share(self._ledger.counted.union(names))

    async def _require_averaging(self) -> Averaging:
        if self._starting is None:
            self._starting = self._start(self._start_averaging())
        await asyncio.shield(self._starting)
        if self._averaging is None:
            self._starting = None  # the next round tries again
            raise LinkLost("this peer's averaging does not start")
        return self._averaging

    async def _start_averaging(self) -> None:
        try:
            self._averaging = await self._means.averaging()
        except AveragingFailed as error:
            log.warning("%s", error)
        self._contacts.changed()
        self._look()

    def _averager_of(self, peer: str, own: Averaging) -> str:
        if peer == self._member.peer_id:
            return own.address
        contact = self._contacts.known.get(peer)
        if contact is None or contact.word is None or not contact.word.averager:
            raise LinkLost(f"replica {peer} has not started its averaging yet")
        return contact.word.averager

    def _patience(self) -> timedelta:
        if not self._rounds_took:
            return PATIENCE_FIRST
        return max(PATIENCE_LEAST, timedelta(seconds=PATIENCE_FACTOR * max(self._rounds_took)))

    # -- commits ------------------------------------------------------------------------------------------------

    def _commit(self, step: int, averaged: Averaged) -> None:
        total = self._totals.get(averaged.round)
        self._totals.clear()
        self._lineages[step] = self._agreement.lineage
        agreed = self._rounds.get(averaged.round)
        self._rounds.clear()
        has_total = total is not None or averaged.digest in (CLOSING, self._alone_digest)
        if not has_total:
            raise RuntimeError(f"the sum of step {step} that was agreed on is not here")
        if self._means.recorder is not None:
            self._means.recorder.committed(step, self._agreement.lineage, agreed)
        for old in [old for old in self._lineages if old < step - 2 * self._ledger.checkpoint_every - 2]:
            del self._lineages[old]
        if self._behind is not None:
            self._behind.append((step, total))
        else:
            self._peer.total = total
            self._ledger.agreed(step)
        self._peer.woken()

    # -- state --------------------------------------------------------------------------------------------------

    async def prepare_state(self) -> Prepared:
        """Puts the committed state on disk, right after a commit if one comes soon. Raises StageError."""
        if not self.serving:
            raise CheckpointInvalid("this peer is taking over a state itself")
        self._committed_event.clear()
        try:
            async with asyncio.timeout(COMMIT_WAIT.total_seconds()):
                await self._committed_event.wait()
        except TimeoutError:
            log.info("no commit for a while: the state as it is")
        prepared = await self._peer.order(self._save_state)
        await asyncio.to_thread(self._checkpoints.listing, prepared.step)  # hashes it before anybody waits for that
        return prepared

    def _save_state(self) -> Prepared:
        """On the device thread."""
        step = self._ledger.committed
        lineage = self._lineages[step]
        if step not in self._checkpoints.steps() or self._checkpoints.lineage(step) != lineage:
            self._checkpoints.save(step, self._trainer.state_tensors(), lineage)
        self._checkpoints.pin(step, PIN)
        return Prepared(step, lineage)

    async def _take_over(self, peer: str) -> None:
        """Becomes a copy of that replica. A failure is told to the agreement, which decides anew."""
        self.serving = False
        self._means.on_serving(False)
        self._ledger.paused = True
        self._behind = deque()
        self._drop_round()
        try:
            await self._require_averaging()
            contact = self._contacts[peer]
            line = self._means.line(contact.endpoint)
            try:
                prepared = await line.prepare_state()
            finally:
                await line.close()
            log.info("taking over the state of step %d from %s", prepared.step, peer)
            self._lineages = {prepared.step: prepared.lineage}
            self._totals.clear()
            self._rounds.clear()
            self._act(self._agreement.resynced(prepared.step, prepared.lineage))
            donors = [contact.endpoint, *self._other_donors(peer)]
            folder = self._checkpoints.incoming
            fetched = await fetch_state(
                donors,
                self.run_id,
                folder,
                step=prepared.step,
                lineage=prepared.lineage,
            )
            await self._peer.order(lambda: self._enter(folder, fetched))
            await self._catch_up(fetched.step)
        except (StageError, AveragingFailed, KeyError) as error:
            log.warning("the state of %s is not to be had: %s", peer, error)
            await asyncio.sleep(PAUSE_AFTER_FAILURE.total_seconds())
            self._stand_where_it_stands()

    def _stand_where_it_stands(self) -> None:
        """The takeover failed: this replica has whatever state it has. If that is not enough, it takes over another."""
        if self._held is not None:
            step, self._standing = self._held
            self._held = None
            earlier = self._trainer.has_earlier_weights
            self._ledger.adopted(step, durable=self._checkpoints.steps()[-1], has_earlier_weights=earlier)
        committed = self._ledger.committed
        self._lineages = {committed: self._standing}
        self._level_at = committed
        self._takeover = None
        self._behind = None
        self._act(self._agreement.resynced(committed, self._standing))
        if self._takeover is None and self._introduced:
            self._serve()

    def _other_donors(self, peer: str) -> list[str]:
        """Replicas that may have a checkpoint of the very state that this one has been asked for."""
        words = self._contacts.in_sight().values()
        return [word.endpoint for word in words if word.peer_id != peer and word.serving]

    def _enter(self, folder: Path, fetched: FetchedState) -> None:
        """On the device thread: the state becomes this peer's, and the newest checkpoint on its disk."""
        self._trainer.load_state_tensors(fetched.tensors)
        self._held = fetched.step, fetched.lineage
        self._checkpoints.discard_after(fetched.step)
        self._checkpoints.adopt(folder)
        shutil.rmtree(folder, ignore_errors=True)

    async def _catch_up(self, step: int) -> None:
        """Takes the steps that were committed since the copy was made, then serves."""
        assert self._behind is not None
        saved = step
        while self._behind:
            step, total = self._behind.popleft()
            if self._ledger.plan.commits(step):
                await self._peer.order(partial(self._take_step, step, total))
        # From here on in one go: nothing can be committed in between.
        committed = min(step, self._ledger.plan.steps)
        self._behind = self._held = None
        earlier = self._trainer.has_earlier_weights
        self._ledger.adopted(committed, durable=saved, has_earlier_weights=earlier)
        if self._duties.is_closed:
            self._ledger.agreed(self._ledger.plan.last_step)
        self._standing = self._agreement.lineage
        log.info("serving from step %d on", committed)
        self._serve()
        self._look()
        self._progress()

    def _take_step(self, step: int, total: Tensor | None) -> None:
        """On the device thread."""
        if total is None:
            raise CheckpointInvalid(f"the sum of step {step} is not here")
        self._trainer.read_gradients(total)
        self._trainer.commit(step)
        self._held = step, self._lineages[step]


def _id_of(averager: str) -> str:
    """The peer id in an averager's address."""
    return averager.rpartition("/")[2]
