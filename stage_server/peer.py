"""One peer: the ledger, the trainer and the links to both neighbours, joined.

Two threads matter. The event loop owns the ledger and the links; the device thread owns the accelerator and runs one
task at a time, which the loop takes from the ledger whenever the device is free. While the device computes, the loop
sends, receives, checks and answers.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

from resbm_pb import stage_pb2

from stage_server.checkpoint import CheckpointStore
from stage_server.concurrency import until_first_ends
from stage_server.errors import FrameError, LinkLost, ProtocolViolation, RewindNeeded, StateLost
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.ledger import Backward, Checkpoint, Commit, Forward, Forwarded, Side, StageLedger, Task
from stage_server.links import Dialer, Frame, FrameStream, GoodbyeReason, LinkIdentity, LinkSession, Outbound
from stage_server.profile import Work
from stage_server.reports import (
    CheckpointReport,
    CompleteReport,
    EvaluationReport,
    LinkBytes,
    LinkReport,
    Report,
    StepReport,
    mean_loss,
)
from stage_server.totals import Replays, Result, Totals
from stage_server.trainer import Direction, StageTrainer
from stage_server.window import CreditWindow, Pace, PaceMeter
from stage_server.wire import GradientMicrobatch, LatentMicrobatch, TokenIds, WireFormat

REDIAL_FIRST = timedelta(milliseconds=50)
REDIAL_LONGEST = timedelta(seconds=2)
GOODBYE_LIMIT = timedelta(seconds=2)


class StagePeer:
    """Serves one stage until the run is complete or it is told to drain. Implements LinkHost."""

    def __init__(
        self,
        *,
        identity: LinkIdentity,
        ledger: StageLedger,
        trainer: StageTrainer,
        wire: WireFormat,
        checkpoints: CheckpointStore,
        source: Callable[[MicrobatchId], TokenIds] | None,
        dialer: Dialer,
        report: Callable[[Report], None],
    ) -> None:
        """`source` gives the first stage its token ids [B, T+1]; None on every other stage."""
        self.identity = identity
        self.ledger = ledger
        self.totals = Totals()
        self._replays = Replays()
        self._trainer = trainer
        self._wire = wire
        self._checkpoints = checkpoints
        self._source = source
        self._dialer = dialer
        self._report = report
        self._window = CreditWindow(ledger.num_stages)
        self._sessions: dict[Side, LinkSession] = {}
        self._next_hop: str | None = None
        self._next_hop_known = asyncio.Event()
        self._wake = asyncio.Event()
        self._draining = False
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = _StepClock(self.totals)
        self._sent_at: dict[MicrobatchId, float] = {}
        self._reported_complete = False
        self._pruned_to: int | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Works until drained.

        Raises RewindNeeded, StateLost, CheckpointUnwritable or NotFinite when it cannot go on.
        """
        errors = await until_first_ends(self._work_and_leave(), self._keep_downstream(), self._fail_when_told())
        if errors:
            raise errors[0]

    def drain(self) -> None:
        """Finish the task at hand, save, say goodbye; `run` returns then."""
        self._draining = True
        self._wake.set()

    def go_back(self, to_step: int) -> None:
        """Discards checkpoints after `to_step`, for a restart from there. Call when `run` has ended."""
        self._checkpoints.discard_after(to_step)

    def set_next_hop(self, endpoint: str) -> None:
        """Where the downstream peer is to be dialled from now on."""
        self._next_hop = endpoint
        self._next_hop_known.set()

    @property
    def links_open(self) -> dict[Side, bool]:
        return {side: side in self._sessions for side in Side}

    @property
    def next_hop(self) -> str | None:
        """Where the downstream peer is dialled; None while unknown."""
        return self._next_hop

    @property
    def codec_errors(self) -> Mapping[Direction, float]:
        """Relative error of what was written last in each direction, see `StageTrainer`."""
        return self._trainer.codec_errors

    async def _fail_when_told(self) -> None:
        await self._failure

    async def _work_and_leave(self) -> None:
        await self._work()
        await self._leave()

    async def _leave(self) -> None:
        complete = self.ledger.complete
        reason = stage_pb2.Goodbye.REASON_RUN_COMPLETE if complete else stage_pb2.Goodbye.REASON_DRAINING
        sessions = list(self._sessions.values())
        await asyncio.gather(*(session.say_goodbye(reason, GOODBYE_LIMIT) for session in sessions))

    # -- device -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="device") as device:
            while not self._draining:
                self._wake.clear()
                await self._prune(device)
                task = self.ledger.next_task()
                if task is None:
                    await self._wait()
                else:
                    await self._perform(device, task)
            if self.ledger.unsaved:
                await self._perform(device, Checkpoint(StepIndex(self.ledger.committed)))

    async def _wait(self) -> None:
        if self.ledger.complete and not self._reported_complete:
            self._reported_complete = True
            self._report(CompleteReport(StepIndex(self.ledger.committed), self._trainer.memory()))
        with self._clock.waiting():
            await self._wake.wait()

    async def _perform(self, device: ThreadPoolExecutor, task: Task) -> None:
        loop = asyncio.get_running_loop()
        with self._clock.computing():
            outcome = await loop.run_in_executor(device, partial(self._compute, task))
        for item in self._enter(task, outcome):
            self._send(item)

    def _compute(self, task: Task) -> Any:
        """On the device thread."""
        match task:
            case Forward(name, payload):
                return self._compute_forward(name, payload)
            case Backward(name, payload):
                upstream = self._trainer.backward(name, payload.gradients)
                return None if upstream is None else self._wire.encode_gradients(name, payload.loss, upstream)
            case Commit(step):
                return self._trainer.commit(step)
            case Checkpoint(step):
                started = time.monotonic()
                with self._trainer.profile.span(Work.CHECKPOINT):
                    size = self._checkpoints.save(step, self._trainer.state_tensors())
                return CheckpointReport(step, timedelta(seconds=time.monotonic() - started), size)

    def _compute_forward(self, name: MicrobatchId, payload: LatentMicrobatch | None) -> Any:
        if payload is None:
            token_ids = self._read(name)
            packed_ids, latents = self._wire.encode_token_ids(token_ids), None
        else:
            token_ids, packed_ids, latents = payload.token_ids, payload.packed_token_ids, payload.latents
        if name.kind is MicrobatchKind.EVALUATE:
            result = self._trainer.evaluate(name, token_ids, latents)
            if isinstance(result, float):
                return result, self._wire.encode_gradients(name, result, None)
            return self._wire.encode_latents(name, packed_ids, result)
        if self.ledger.is_last:
            loss, gradients = self._trainer.forward_backward(name, token_ids, latents)
            return loss, None if gradients is None else self._wire.encode_gradients(name, loss, gradients)
        return self._wire.encode_latents(name, packed_ids, self._trainer.forward(name, token_ids, latents))

    def _read(self, name: MicrobatchId) -> TokenIds:
        if self._source is None:
            raise ProtocolViolation(f"stage {self.identity.stage} has no data of its own, yet {name} came without any")
        with self._trainer.profile.span(Work.DATA):
            return self._source(name)

    # -- outcomes -----------------------------------------------------------------------------------------------

    def _enter(self, task: Task, outcome: Any) -> list[Outbound]:
        """Writes what was computed into the ledger; returns what goes out."""
        match task:
            case Forward(name, _) if self.ledger.is_last:
                loss, body = outcome
                self._replays.forwarded(name)
                return self._enter_finished(name, loss, body)
            case Forward(name, _):
                self.totals.dense_bytes_forward += self._wire.dense_bytes
                self._replays.forwarded(name)
                if name.kind is MicrobatchKind.EVALUATE:
                    self._count_finished(name)
                if name.kind is MicrobatchKind.TRAIN:
                    self._clock.forwarded()
                if self.ledger.is_first and name.kind is MicrobatchKind.TRAIN:
                    self._sent_at[name] = time.monotonic()
                return self._note_evaluation(name, self.ledger.forwarded(name, outcome))
            case Backward(name, payload):
                self.totals.dense_bytes_backward += self._wire.dense_bytes
                self._note_round_trip(name)
                return self._enter_finished(name, payload.loss, outcome)
            case Commit(step):
                self._enter_commit(step, outcome)
            case Checkpoint(step):
                self.ledger.checkpointed(step)
                self._report(outcome)
                self._report_to_neighbours()
        return []

    def _enter_finished(self, name: MicrobatchId, loss: float, body: Any) -> list[Outbound]:
        self._count_finished(name)
        if name.kind is MicrobatchKind.TRAIN:
            self._clock.done()
        return self._note_evaluation(name, self.ledger.finished(name, loss, body))

    def _count_finished(self, name: MicrobatchId) -> None:
        """This stage has nothing more to compute for the microbatch."""
        first_time = Result.TRAINED if name.kind is MicrobatchKind.TRAIN else Result.EVALUATED
        self.totals.microbatches[Result.REPLAYED if self._replays.finished(name) else first_time] += 1

    def _enter_commit(self, step: StepIndex, outcome: Any) -> None:
        losses = self.ledger.losses(MicrobatchKind.TRAIN)
        self.ledger.committed_step(step)
        self._window.step_ended()
        self._report_to_neighbours()
        wall, pace, compute, wait, link = self._clock.lap()
        plan = self.ledger.plan
        self._report(
            StepReport(
                step=step,
                loss=mean_loss(losses),
                num_tokens=plan.microbatches_per_step * self._wire.batch * self._wire.tokens,
                num_microbatches=plan.microbatches_per_step,
                wall=wall,
                pace=pace,
                compute=compute,
                wait=wait,
                gradient_norm=outcome.gradient_norm,
                link=None if self.ledger.is_last else link,
                work=self._trainer.profile.lap(),
            )
        )

    def _note_evaluation(self, name: MicrobatchId, outbound: list[Outbound]) -> list[Outbound]:
        """Reports the validation loss once the last evaluation microbatch of a step is done."""
        if name.kind is MicrobatchKind.EVALUATE:
            losses = self.ledger.losses(MicrobatchKind.EVALUATE)
            if len(losses) == self.ledger.plan.evaluation_microbatches:
                self._report(EvaluationReport(self.ledger.committed, mean_loss(losses)))
        return outbound

    def _note_round_trip(self, name: MicrobatchId) -> None:
        sent_at = self._sent_at.pop(name, None)
        if not self.ledger.is_first or sent_at is None:
            return
        now = time.monotonic()
        self._window.completed(timedelta(seconds=now), timedelta(seconds=now - sent_at))
        self.ledger.window = self._window.size

    def _send(self, item: Outbound) -> None:
        side = Side.DOWNSTREAM if isinstance(item, Forwarded) else Side.UPSTREAM
        session = self._sessions.get(side)
        if session and self.ledger.wants(side, item.name):
            session.send(item)

    def _report_to_neighbours(self) -> None:
        for session in self._sessions.values():
            session.report()

    async def _prune(self, device: ThreadPoolExecutor) -> None:
        """Removes checkpoints below the floor, away from the event loop: they may be gigabytes."""
        floor = self.ledger.floor
        if floor is not None and floor != self._pruned_to:
            await asyncio.get_running_loop().run_in_executor(device, self._checkpoints.prune, floor)
            self._pruned_to = floor

    # -- links --------------------------------------------------------------------------------------------------

    async def serve_link(self, stream: FrameStream) -> None:
        """Runs the link that the upstream peer has opened, until it ends."""
        try:
            await self._run_session(stream, Side.UPSTREAM)
        except RewindNeeded as error:
            if not self._failure.done():
                self._failure.set_exception(error)
        except (LinkLost, FrameError, StateLost):
            return  # reported by _run_session; anybody can dial, so no caller's word ends this peer

    async def _keep_downstream(self) -> None:
        pause = REDIAL_FIRST
        while True:
            try:
                stream = await self._dialer.dial(await self._known_next_hop())  # for ever unknown on the last stage
                opened_at = time.monotonic()
                try:
                    await self._run_session(stream, Side.DOWNSTREAM)
                finally:
                    if time.monotonic() - opened_at > REDIAL_LONGEST.total_seconds():
                        pause = REDIAL_FIRST
            except (LinkLost, FrameError):
                await asyncio.sleep(pause.total_seconds() * random.uniform(0.7, 1.3))
                pause = min(2 * pause, REDIAL_LONGEST)

    async def _known_next_hop(self) -> str:
        while self._next_hop is None:
            await self._next_hop_known.wait()
        return self._next_hop

    async def _run_session(self, stream: FrameStream, side: Side) -> None:
        session = LinkSession(stream, side, self)
        detail = "closed"
        try:
            await session.run()
        except FrameError as error:
            self.totals.frames_refused += 1
            detail = str(error)
            raise
        except LinkLost as error:
            detail = error.cause
            raise
        finally:
            if self._sessions.get(side) is session:
                del self._sessions[side]
                self.ledger.closed(side)
                self._report_to_neighbours()
                self._report(LinkReport(side, open=False, detail=detail))

    # -- LinkHost -----------------------------------------------------------------------------------------------

    def holdings(self, side: Side) -> tuple[int, list[MicrobatchId]]:
        return self.ledger.committed, self.ledger.holdings(side)

    def link_opened(
        self, session: LinkSession, side: Side, peer: LinkIdentity, committed: int, held: Iterable[MicrobatchId]
    ) -> list[Outbound]:
        held = list(held)
        backlog = self.ledger.opened(side, committed, held)
        self._replays.opened(side, committed, held)
        before = self._sessions.get(side)
        self._sessions[side] = session
        if before is not None:
            before.supersede()
        self._report(LinkReport(side, open=True, detail=f"{peer.peer_id}, {len(backlog)} microbatches to send again"))
        self._wake.set()
        return backlog

    def link_received(self, side: Side, frame: Frame) -> None:
        data = frame.latents if isinstance(frame, stage_pb2.UpstreamFrame) else frame.gradients
        try:
            answers = self._receive(side, frame)
        except FrameError:
            self.totals.microbatches[Result.REFUSED] += len(data.microbatches)
            raise
        for item in answers:
            self._send(item)
        self._wake.set()

    def _receive(self, side: Side, frame: Frame) -> list[Outbound]:
        if isinstance(frame, stage_pb2.UpstreamFrame):
            self._check_direction(side, Side.UPSTREAM)
            latents = [self._wire.decode_latents(message) for message in frame.latents.microbatches]
            return [item for m in latents for item in self.ledger.receive_latents(m.name, m)]
        self._check_direction(side, Side.DOWNSTREAM)
        return [item for message in frame.gradients.microbatches for item in self._receive_gradients(message)]

    def _receive_gradients(self, message: stage_pb2.Gradients) -> list[Outbound]:
        m = self._wire.decode_gradients(message)
        train = m.name.kind is MicrobatchKind.TRAIN
        self.totals.hops.returned(m.name, time.monotonic())
        # A gradient is for the trainer. An evaluation's result is relayed: written anew, since `message` is a view
        # that would keep its whole frame alive.
        payload: GradientMicrobatch | stage_pb2.Gradients = (
            m if train else self._wire.encode_gradients(m.name, m.loss, None)
        )
        return self._note_evaluation(m.name, self.ledger.receive_gradients(m.name, m.loss, payload))

    @staticmethod
    def _check_direction(side: Side, expected: Side) -> None:
        if side is not expected:
            raise ProtocolViolation(f"the {side} neighbour sent a frame that only the {expected} one sends")

    def link_status(self, side: Side) -> tuple[int, int | None]:
        return self.ledger.status(side)

    def link_received_status(self, side: Side, committed: int, durable: int | None) -> None:
        changed = self.ledger.receive_status(side, committed, durable)
        other = self._sessions.get(Side.DOWNSTREAM if side is Side.UPSTREAM else Side.UPSTREAM)
        if changed and other is not None:
            other.report()
        self._wake.set()

    def link_goodbye(self, side: Side, reason: GoodbyeReason) -> None:
        self._report(LinkReport(side, open=True, detail=f"leaves: {stage_pb2.Goodbye.Reason.Name(reason)}"))

    def count_sent(self, side: Side, num_bytes: int, items: Sequence[Outbound]) -> None:
        self.totals.sent_bytes[side] += num_bytes
        now = time.monotonic()
        for item in items:
            if side is Side.DOWNSTREAM and item.name.kind is MicrobatchKind.TRAIN:
                self.totals.hops.sent(item.name, now)

    def count_received(self, side: Side, num_bytes: int) -> None:
        self.totals.received_bytes[side] += num_bytes


class _StepClock:
    """Splits wall time into computing and waiting, and cuts it at commits."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._lap_started = time.monotonic()
        self._before = (0.0, 0.0, totals.link())
        self._pace = PaceMeter()

    def computing(self) -> _Span:
        return _Span(self._totals, "compute_seconds")

    def waiting(self) -> _Span:
        return _Span(self._totals, "wait_seconds")

    def forwarded(self) -> None:
        """A training microbatch is computed forward."""
        self._pace.forwarded()

    def done(self) -> None:
        """A training microbatch is done."""
        self._pace.done(time.monotonic())

    def lap(self) -> tuple[timedelta, Pace, timedelta, timedelta, LinkBytes]:
        """(wall, pace, compute, wait, link traffic) since the lap before."""
        now, totals, link = time.monotonic(), self._totals, self._totals.link()
        compute, wait, before = self._before
        self._before = (totals.compute_seconds, totals.wait_seconds, link)
        wall = timedelta(seconds=now - self._lap_started)
        self._lap_started = now
        pace, self._pace = self._pace.pace, PaceMeter()
        traffic = LinkBytes(
            link.dense_bytes - before.dense_bytes,
            link.wire_bytes_forward - before.wire_bytes_forward,
            link.wire_bytes_backward - before.wire_bytes_backward,
        )
        seconds = timedelta(seconds=totals.compute_seconds - compute), timedelta(seconds=totals.wait_seconds - wait)
        return wall, pace, *seconds, traffic


class _Span:
    """Adds the time between enter and exit to one counter."""

    def __init__(self, totals: Totals, counter: str) -> None:
        self._totals = totals
        self._counter = counter

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        elapsed = time.monotonic() - self._started
        setattr(self._totals, self._counter, getattr(self._totals, self._counter) + elapsed)
