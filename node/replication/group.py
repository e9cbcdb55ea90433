"""One replica among those of its stage: it counts with them, averages with them, commits with them.

The wiring of `ReplicaDuties` (what is to be done), `Contacts` (who is told), `Sums` (what is added up) and the peer.
Where this peer is alone in its stage, all of it comes down to committing when everything is done.

A replica that comes late, or has strayed, takes over another's state: it asks for a copy, and from that moment on takes
part in every round with an empty share, so that it gets all sums; when the copy is here it takes the steps that were
committed meanwhile, and serves (`Takeover`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

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
from coordinator.averaging import AveragingFailed
from node.replication.calls import Line, Prepared
from node.replication.contacts import Contacts
from node.replication.duties import ReplicaDuties, sizes
from node.replication.messages import ReplicaWord
from node.replication.record import StepRecorder
from node.replication.sums import Averaging, Sums
from node.replication.takeover import Missed, OnProgress, StateOffer, Takeover
from node.tasks import Background
from stage_server.checkpoint import CheckpointStore
from stage_server.concurrency import cancelled
from stage_server.errors import CheckpointInvalid, LinkLost, StageError
from stage_server.peer import StagePeer
from stage_server.replica_trainer import ReplicaTrainer

log = logging.getLogger(__name__)

LOOK = timedelta(seconds=0.25)
PAUSE_AFTER_FAILURE = timedelta(seconds=0.3)
EXCUSED = timedelta(seconds=15)
"""For how long a replica that held up rounds is left out."""
FAILURES_WITH_LATER, FAILURES_WITH_EARLIER = 3, 6
"""Rounds in a row that a replica may hold up though it serves. Of two that cannot exchange with each other, the one
with the earlier claim goes on first; the other hears of it and takes over its state. Both must not go on at once."""
AVERAGING_WITHIN = timedelta(minutes=2)
"""How long a new replica waits until its averaging, and the others', has started."""
INTRODUCTION = timedelta(seconds=5)
"""How long a new replica waits to hear from those that the directory names."""


@dataclass(frozen=True, slots=True)
class Member:
    """Who this replica is to the others."""

    run_id: str
    named: str  # the run as its peers name it to each other: in another epoch it is another one
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
    on_transfer: OnProgress = lambda _: None


class ReplicaGroup:
    """See the module's text. All methods on one event loop. Implements ReplicaHost."""

    def __init__(
        self, member: Member, peer: StagePeer, trainer: ReplicaTrainer, checkpoints: CheckpointStore, means: Means
    ) -> None:
        self.run_id, self.stage = member.named, member.stage
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
        self._background = Background()
        self._contacts = Contacts(self._word, self._heard, means.line, self._background)
        self._sums = Sums(
            f"{member.named}/{member.stage}",
            duties=self._duties,
            peer=peer,
            trainer=trainer,
            contacts=self._contacts,
            start=means.averaging,
            on_started=self._averaging_started,
            background=self._background,
        )
        self._offer = StateOffer(peer, trainer, checkpoints)
        self._seen: tuple[object, ...] = ()
        self._lineages = {committed: lineage}
        self._round: asyncio.Task[None] | None = None  # the one that is being added up
        self._resyncing: asyncio.Task[None] | None = None
        self._takeover: Takeover | None = None  # set while this replica's state is not what was agreed on
        self._excused: dict[str, float] = {}  # by peer: until when, monotonic seconds
        self._failures: Counter[str] = Counter()  # by peer: rounds in a row that it has held up
        self._recounting = False
        self._level_at = committed
        self._listed_at: float | None = None  # monotonic seconds; when the directory was first heard
        self._introduced = False
        self._left = False
        peer.ledger.paused = True
        self._standing = lineage  # of the state that this replica really has, whatever it is about to take over
        peer.lineage = lambda: self._lineages.get(self._ledger.committed, self._standing)
        peer.on_progress = self._progress
        if means.recorder is not None:
            trainer.before_commit = means.recorder.before_commit

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Takes part for ever. Raises what it cannot go on with."""
        try:
            failure = self._background.failure
            while not failure.done():
                self._look()
                await asyncio.wait({failure}, timeout=LOOK.total_seconds())
            failure.result()
        finally:
            await self._close()

    async def _close(self) -> None:
        self._left = True
        self._peer.on_progress = None
        self._round = self._resyncing = None
        try:
            await self._background.close()
        finally:
            try:
                await self._contacts.close()
            finally:
                await self._sums.close()

    def listed(self, endpoints: Mapping[str, str]) -> None:
        """The other replicas of the stage, as the directory has them: endpoint by peer id."""
        if self._listed_at is None:
            self._listed_at = time.monotonic()
        self._contacts.listed(endpoints)
        self._look()

    def level(self, *, since: float = 0.0) -> frozenset[str]:
        """The other replicas that serve, and have committed all that this one has: heard lately, and since then.

        `since`: monotonic seconds.
        """
        committed = self._ledger.committed
        heard = self._contacts.in_sight().items()
        level = {peer for peer, word in heard if word.serving and word.tally.committed >= committed}
        return frozenset(peer for peer in level if self._contacts[peer].heard_at >= since)

    def _look(self) -> None:
        """Who takes part now; tells the agreement when that has changed."""
        self._contacts.forget_old()
        heard = self._contacts.in_sight()
        if heard:
            self._sums.begin_to_start()
        # Who cannot average yet takes no part: nobody waits for a process that is only starting.
        able = heard if self._sums.address else {}
        now = time.monotonic()
        self._excused = {peer: until for peer, until in self._excused.items() if until > now}
        words = {peer: word for peer, word in able.items() if word.averager and peer not in self._excused}
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
        self._peer.look_again()  # what others had begun may be left to this replica

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
        if self._takeover is None:
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
            averager=self._sums.address,
            serving=self.serving and not self._peer.draining,
            tally=self._agreement.tally(),
            news=self._duties.news(),
        )

    def hear(self, word: ReplicaWord, proposed: Round | None) -> ReplicaWord:
        """Another replica's word, and its proposal if it makes one; returns this replica's word.

        Raises LinkLost: this replica has left.
        """
        if self._left:
            raise LinkLost("this replica has left")
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
        self._peer.look_again()  # others have begun something, or have given it up

    def _progress(self) -> None:
        """The ledger or the agreement may have changed."""
        self._sums.progressed()
        if self._level_at != self._ledger.committed and self._duties.is_level:
            self._level_at = self._ledger.committed
            self._standing = self._agreement.lineage
            self._offer.committed()
        self._act(self._duties.reconcile())
        if not self._recounting and self._takeover is None and self._duties.to_recount():
            self._recounting = True
            self._background.start(self._recount())

    async def _recount(self) -> None:
        """Adds what was done here and is held by nobody now."""
        try:
            await self._peer.order(self._sums.add_missing)
        finally:
            self._recounting = False
        self._progress()

    def _averaging_started(self) -> None:
        self._contacts.changed()
        self._look()

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
                case Average(proposed, _):
                    self._begin_round(proposed)
                case Commit(step, averaged):
                    self._commit(step, averaged)
                case Resync(peer, _):
                    before = self._resyncing
                    if before is not None:
                        before.cancel()
                    self._resyncing = self._background.start(self._take_over(peer, before))
        if self._round is not None and not self._agreement.is_frozen:
            self._drop_round()
        was_frozen = self._ledger.frozen
        self._duties.freeze()
        if was_frozen and not self._ledger.frozen:
            self._peer.look_again()

    # -- rounds -------------------------------------------------------------------------------------------------

    def _begin_round(self, proposed: Round) -> None:
        self._drop_round()
        settled = self._sums.settled_at_once(proposed, behind=self._takeover is not None)
        if settled is None:
            self._round = self._background.start(self._average(proposed))
        else:
            self._act(self._agreement.averaged(proposed.number, *settled))

    def _drop_round(self) -> None:
        if self._round is not None:
            self._round.cancel()
            self._round = None

    async def _average(self, proposed: Round) -> None:
        digest: str | None
        try:
            digest, count = await self._sums.add_up(proposed, behind=self._takeover is not None)
        except (AveragingFailed, LinkLost) as error:
            log.warning("round %d of step %d: %s", proposed.number, proposed.step, error)
            self._excuse(proposed, error)
            await asyncio.sleep(PAUSE_AFTER_FAILURE.total_seconds())
            digest, count = None, 0
        self._round = None
        self._act(self._agreement.averaged(proposed.number, digest, count))
        self._progress()

    def _excuse(self, failed: Round, error: Exception) -> None:
        """Who cannot keep up with rounds takes no part for a while: all others would wait for it again.

        One that takes over a state has nothing to add, so once is enough; it will have to take over a newer state. What
        one that serves had to add is computed again by others, so it is given some rounds.
        """
        for gone in self._failures.keys() - self._contacts.known.keys():
            del self._failures[gone]
        for peer in failed.shares:
            contact = self._contacts.known.get(peer)
            word = contact.word if contact is not None else None
            if word is None or not word.averager or _id_of(word.averager) not in str(error):
                continue
            self._failures[peer] += 1
            if self._failures[peer] >= self._most_failures(word):
                log.warning("replica %s is left out of rounds for a while", peer)
                self._excused[peer] = time.monotonic() + EXCUSED.total_seconds()
        self._look()

    def _most_failures(self, word: ReplicaWord) -> int:
        if not word.serving:
            return 1
        own = self._member.reserved_at, self._member.peer_id
        return FAILURES_WITH_LATER if (word.reserved_at, word.peer_id) > own else FAILURES_WITH_EARLIER

    # -- commits ------------------------------------------------------------------------------------------------

    def _commit(self, step: int, averaged: Averaged) -> None:
        round_, agreed = self._sums.take(averaged)
        for peer in self._failures.keys() & (round_.shares.keys() if round_ is not None else ()):
            del self._failures[peer]
        self._lineages[step] = self._agreement.lineage
        if self._means.recorder is not None:
            self._means.recorder.committed(step, self._agreement.lineage, round_)
        for old in [old for old in self._lineages if old < step - 2 * self._ledger.checkpoint_every - 2]:
            del self._lineages[old]
        if self._takeover is not None:
            self._takeover.missed(Missed(step, self._agreement.lineage, agreed))
        else:
            share = frozenset[int]() if round_ is None else round_.shares[self._member.peer_id]
            self._peer.take_step = partial(self._sums.commit, self._duties.names(share), agreed)
            self._ledger.agreed(step)
        self._peer.woken()

    # -- state --------------------------------------------------------------------------------------------------

    async def prepare_state(self) -> Prepared:
        """Puts the committed state on disk, right after a commit if one comes soon. Raises StageError."""
        if self._left:
            raise LinkLost("this replica has left")
        if not self.serving:
            raise CheckpointInvalid("this peer is taking over a state itself")
        return await self._offer.prepare()

    async def _take_over(self, peer: str, before: asyncio.Task[None] | None) -> None:
        """Becomes a copy of that replica. A failure is told to the agreement, which decides anew.

        Args:
            peer: that replica.
            before: an attempt that was given up. Until it has ended its weights are still being put in place.
        """
        self.serving = False
        self._means.on_serving(False)
        self._ledger.paused = True
        if before is not None:
            await asyncio.wait({before})
        held = None if self._takeover is None else self._takeover.held  # by one that was given up
        takeover = self._takeover = Takeover(self._peer, self._trainer, self._checkpoints, self._member.run_id, held)
        self._drop_round()
        try:
            await self._sums.started()
            donor = self._contacts[peer].endpoint
            prepared = await self._ask_for_state(peer, donor)
            log.info("taking over the state of step %d from %s", prepared.step, peer)
            self._lineages = {prepared.step: prepared.lineage}
            self._sums.forget()
            self._act(self._agreement.resynced(*self._stand_after(prepared, peer)))
            saved = await takeover.fetch([donor, *self._other_donors(peer)], prepared, self._means.on_transfer)
            newest = await takeover.catch_up()
            self._go_on(saved if newest is None else newest, durable=saved)
        except (StageError, AveragingFailed, KeyError) as error:
            log.warning("the state of %s is not to be had: %s", peer, error)
            await asyncio.sleep(PAUSE_AFTER_FAILURE.total_seconds())
            self._stand_where_it_stands(takeover.held)

    def _stand_after(self, prepared: Prepared, peer: str) -> tuple[int, str]:
        """(step, lineage) where the agreement stands with that state: the closing step has none of its own."""
        plan, word = self._ledger.plan, self._contacts[peer].word
        if word is not None and word.tally.committed == plan.last_step and prepared.step == plan.steps:
            return word.tally.committed, word.tally.lineage
        return prepared.step, prepared.lineage

    async def _ask_for_state(self, peer: str, endpoint: str) -> Prepared:
        """It may take its time, but not in silence."""
        line = self._means.line(endpoint)
        asking = asyncio.create_task(line.prepare_state())
        try:
            while not asking.done():
                await asyncio.wait({asking}, timeout=LOOK.total_seconds())
                if not asking.done() and peer not in self._contacts.in_sight():
                    raise LinkLost("it is out of sight")
            return asking.result()
        finally:
            await cancelled(asking)
            await line.close()

    def _other_donors(self, peer: str) -> list[str]:
        """Replicas that may have a checkpoint of the very state that this one has been asked for."""
        words = self._contacts.in_sight().values()
        return [word.endpoint for word in words if word.peer_id != peer and word.serving]

    def _go_on(self, step: int, *, durable: int) -> None:
        """The state is here, and everything that was committed is in it."""
        committed = min(step, self._ledger.plan.steps)
        self._takeover = None
        self._ledger.adopted(committed, durable=durable, has_earlier_weights=self._trainer.has_earlier_weights)
        if self._duties.is_closed:
            self._ledger.agreed(self._ledger.plan.last_step)
        self._standing = self._agreement.lineage
        log.info("serving from step %d on", committed)
        self._serve()
        self._look()
        self._progress()

    def _stand_where_it_stands(self, held: Prepared | None) -> None:
        """The takeover failed: this replica has whatever state it has. If that is not enough, it takes over another."""
        if held is not None:
            self._standing = held.lineage
            earlier = self._trainer.has_earlier_weights
            self._ledger.adopted(held.step, durable=self._checkpoints.steps()[-1], has_earlier_weights=earlier)
        committed = self._ledger.committed
        self._lineages = {committed: self._standing}
        self._level_at = committed
        self._resyncing = self._takeover = None
        self._act(self._agreement.resynced(committed, self._standing))
        if self._resyncing is None and self._introduced:
            self._serve()


def _id_of(averager: str) -> str:
    """The peer id in an averager's address."""
    return averager.rpartition("/")[2]
