"""One peer: the ledger, the trainer and the links to both neighbours, joined.

Two threads matter. The event loop owns the ledger and the links; the device thread owns the accelerator and runs one
task at a time, which the loop takes from the ledger whenever the device is free. While the device computes, the loop
sends, receives, checks and answers.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

from resbm_pb import stage_pb2, tensors_pb2

from stage_server.checkpoint import CheckpointStore
from stage_server.codec import Packed
from stage_server.concurrency import until_first_ends
from stage_server.errors import FrameError, ProtocolViolation, RewindNeeded, StageError
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.ledger import StageLedger
from stage_server.links import Dialer, Frame, FrameStream, LinkIdentity
from stage_server.neighbours import Neighbours
from stage_server.optimizer import CommitReport
from stage_server.profile import Work
from stage_server.replica_trainer import ReplicaTrainer
from stage_server.reports import (
    CheckpointReport,
    CompleteReport,
    EvaluationReport,
    LinkReport,
    Report,
    StepReport,
    mean_loss,
)
from stage_server.step_clock import StepClock
from stage_server.totals import Replays, Result, Totals
from stage_server.trainer import Direction, StageTrainer
from stage_server.window import CreditWindow
from stage_server.wire import GradientMicrobatch, LatentMicrobatch, TokenIds, WireFormat
from stage_server.work import SOLE, Backward, Checkpoint, Commit, Forward, Outbound, Side, Task

T = TypeVar("T")

DRAIN_WITHIN = timedelta(seconds=8)
"""How long a peer that leaves stays for the present step of a shared stage."""


class StagePeer:
    """Serves one stage until the run is complete or it is told to drain. Implements NeighbourHost."""

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
        """`source` gives the first stage its token ids [B, T+1]; None on every other stage.

        `trainer` is a ReplicaTrainer where the ledger is shared.
        """
        self.identity = identity
        self.ledger = ledger
        self.totals = Totals()
        self._replays = Replays()
        self._trainer = trainer
        self._wire = wire
        self._checkpoints = checkpoints
        self._source = source
        self._report = report
        self._window = CreditWindow(ledger.num_stages)
        self.neighbours = Neighbours(self, dialer)
        self.on_progress: Callable[[], None] | None = None
        """Called whenever the ledger may have changed."""
        self.lineage: Callable[[], str] = str
        """Digest of the committed steps, kept with every checkpoint; empty where stages are not shared."""
        self.take_step: Callable[[StepIndex], CommitReport] = trainer.commit
        """Takes the optimizer step that is due, on the device thread: where replicas have agreed on it, with that."""
        self._orders: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._wake = asyncio.Event()
        self._draining = False
        self._leave_after: int | None = None  # a step to be committed before this peer leaves
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._clock = StepClock(self.totals)
        self._sent_at: dict[MicrobatchId, float] = {}
        self._evaluated: int | None = None  # the committed step whose validation loss was reported
        self._reported_complete = False
        self._pruned_to: int | None = None

    # -- life ---------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Works until drained.

        Raises RewindNeeded, StateLost, CheckpointUnwritable or NotFinite when it cannot go on.
        """
        errors = await until_first_ends(
            self._work_and_leave(), self.neighbours.keep_downstream(), self._fail_when_told()
        )
        if errors:
            raise errors[0]

    def drain(self) -> None:
        """Finish the task at hand, save, say goodbye; `run` returns then.

        Where others share the stage, first stay until the step is committed, or for a while: what this peer's sum holds
        would have to be computed again.
        """
        self._draining = True
        if self.ledger.shared and not self.ledger.is_alone:
            self._leave_after = self.ledger.step
            asyncio.get_running_loop().call_later(DRAIN_WITHIN.total_seconds(), self._leave_now)
        self._wake.set()

    def _leave_now(self) -> None:
        self._leave_after = None
        self._wake.set()

    @property
    def draining(self) -> bool:
        """Whether this peer is about to leave."""
        return self._draining

    def _is_over(self) -> bool:
        waits = self._leave_after is not None and self.ledger.committed < self._leave_after and not self.ledger.complete
        return self._draining and not waits

    def go_back(self, to_step: int) -> None:
        """Discards checkpoints after `to_step`, for a restart from there. Call when `run` has ended."""
        self._checkpoints.discard_after(to_step)

    def set_next_hop(self, endpoint: str) -> None:
        """Where the peer of the next stage is to be dialled from now on, where there is but one."""
        self.neighbours.set_next_hops({SOLE: endpoint})

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
        await self.neighbours.say_goodbye(reason)

    # -- device -------------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="device") as device:
            while not self._is_over():
                self._wake.clear()
                await self._prune(device)
                await self._obey(device)
                task = self.ledger.next_task()
                if task is None:
                    await self._wait()
                else:
                    await self._perform(device, task)
            if self.ledger.unsaved:
                await self._perform(device, Checkpoint(StepIndex(self.ledger.committed)))

    async def order(self, what: Callable[[], T]) -> T:
        """Runs something on the device thread, between two tasks, and returns its result.

        Who gives up waiting has either kept it from being begun, or is let go when it has ended: nothing touches the
        weights behind anybody's back.
        """
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        order = (what, done)
        self._orders.append(order)
        self._wake.set()
        try:
            return await asyncio.shield(done)
        except asyncio.CancelledError:
            if order in self._orders:
                self._orders.remove(order)
            else:
                await asyncio.wait({done})
            raise

    async def _obey(self, device: ThreadPoolExecutor) -> None:
        while self._orders:
            what, done = self._orders.popleft()
            try:
                with self._clock.computing():
                    done.set_result(await asyncio.get_running_loop().run_in_executor(device, what))
            except StageError as error:
                done.set_exception(error)
            except BaseException:
                done.cancel()
                raise

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
        self.neighbours.send(self._enter(task, outcome))
        self.woken()

    def _compute(self, task: Task) -> Any:
        """On the device thread."""
        match task:
            case Forward(name, payload, late=True):
                return self._compute_forward_late(name, payload)
            case Forward(name, payload):
                return self._compute_forward(name, payload)
            case Backward(name, payload, late):
                backward = self._replicas().backward_late if late else self._trainer.backward
                upstream = backward(name, payload.gradients)
                return None if upstream is None else self._wire.encode_gradients(name, payload.loss, upstream)
            case Commit(step):
                return self.take_step(step)
            case Checkpoint(step):
                started = time.monotonic()
                with self._trainer.profile.span(Work.CHECKPOINT):
                    size = self._checkpoints.save(step, self._trainer.state_tensors(), self.lineage())
                return CheckpointReport(step, timedelta(seconds=time.monotonic() - started), size)

    def _compute_forward(self, name: MicrobatchId, payload: LatentMicrobatch | None) -> Any:
        token_ids, packed_ids, latents = self._inputs(name, payload)
        if name.kind is MicrobatchKind.EVALUATE:
            return self._answer(name, packed_ids, self._trainer.evaluate(name, token_ids, latents))
        if self.ledger.is_last:
            loss, gradients = self._trainer.forward_backward(name, token_ids, latents)
            return loss, None if gradients is None else self._wire.encode_gradients(name, loss, gradients)
        return self._wire.encode_latents(name, packed_ids, self._trainer.forward(name, token_ids, latents))

    def _compute_forward_late(self, name: MicrobatchId, payload: LatentMicrobatch) -> Any:
        trainer = self._replicas()
        token_ids, packed_ids, latents = self._inputs(name, payload)
        if name.kind is MicrobatchKind.EVALUATE:
            return self._answer(name, packed_ids, trainer.evaluate_late(name, token_ids, latents))
        if self.ledger.is_last:
            loss, gradients = trainer.forward_backward_late(name, token_ids, latents)
            return loss, None if gradients is None else self._wire.encode_gradients(name, loss, gradients)
        return self._wire.encode_latents(name, packed_ids, trainer.forward_late(name, token_ids, latents))

    def _answer(self, name: MicrobatchId, packed_ids: tensors_pb2.TokenIds, result: Packed | float) -> Any:
        """What an evaluation gives: a loss, which goes up, or latents, which go down."""
        if isinstance(result, float):
            return result, self._wire.encode_gradients(name, result, None)
        return self._wire.encode_latents(name, packed_ids, result)

    def _inputs(
        self, name: MicrobatchId, payload: LatentMicrobatch | None
    ) -> tuple[TokenIds, tensors_pb2.TokenIds, Packed | None]:
        """Token ids, the same as they travel, and latents; the first stage reads its data."""
        if payload is not None:
            return payload.token_ids, payload.packed_token_ids, payload.latents
        token_ids = self._read(name)
        return token_ids, self._wire.encode_token_ids(token_ids), None

    def add_again(self, items: Sequence[tuple[MicrobatchId, Any, Any]]) -> None:
        """Adds what `StageLedger.inputs_of` gave to the gradient sum once more. On the device thread."""
        for name, payload, gradients in items:
            token_ids, _, latents = self._inputs(name, payload)
            self._replicas().add_again([(name, token_ids, latents, gradients.gradients if gradients else None)])

    def _replicas(self) -> ReplicaTrainer:
        if not isinstance(self._trainer, ReplicaTrainer):
            raise ProtocolViolation("this stage is served by one peer alone")
        return self._trainer

    def _read(self, name: MicrobatchId) -> TokenIds:
        if self._source is None:
            raise ProtocolViolation(f"stage {self.identity.stage} has no data of its own, yet {name} came without any")
        with self._trainer.profile.span(Work.DATA):
            return self._source(name)

    # -- outcomes -----------------------------------------------------------------------------------------------

    def _enter(self, task: Task, outcome: Any) -> Sequence[Outbound]:
        """Writes what was computed into the ledger; returns what goes out."""
        match task:
            case Forward(late=True) | Backward(late=True):
                return self._enter_late(task, outcome)
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
                self.neighbours.report()
        return []

    def _enter_late(self, task: Forward | Backward, outcome: Any) -> Sequence[Outbound]:
        """What was computed for others, and counts for nothing here."""
        if isinstance(task, Backward):
            self.totals.microbatches[Result.REPLAYED] += 1
            return self.ledger.finished(task.name, task.payload.loss, outcome)
        if self.ledger.is_last:
            self.totals.microbatches[Result.REPLAYED] += 1
            return self.ledger.finished(task.name, *outcome)
        return self.ledger.forwarded(task.name, outcome)

    def _enter_finished(self, name: MicrobatchId, loss: float, body: Any) -> Sequence[Outbound]:
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
        self.neighbours.step_ended(step)
        self._window.step_ended()
        # What others have done in this peer's place leaves no trace of its own.
        self._sent_at = {name: at for name, at in self._sent_at.items() if name.step > step}
        self._replays.step_ended(step)
        self.neighbours.report()
        wall, pace, compute, wait, link = self._clock.lap()
        plan = self.ledger.plan
        self._report(
            StepReport(
                step=step,
                loss=mean_loss(losses) if losses else None,  # replicas of an empty share may learn of them too late
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

    def _note_evaluation(self, name: MicrobatchId, outbound: Sequence[Outbound]) -> Sequence[Outbound]:
        if name.kind is MicrobatchKind.EVALUATE:
            self.note_evaluation()
        return outbound

    def note_evaluation(self) -> None:
        """Reports the validation loss once the last evaluation microbatch of a step is done, here or elsewhere."""
        losses, committed = self.ledger.losses(MicrobatchKind.EVALUATE), self.ledger.committed
        if committed != self._evaluated and 0 < len(losses) == self.ledger.plan.evaluation_microbatches:
            self._evaluated = committed
            self._report(EvaluationReport(committed, mean_loss(losses)))

    def _note_round_trip(self, name: MicrobatchId) -> None:
        sent_at = self._sent_at.pop(name, None)
        if not self.ledger.is_first or sent_at is None:
            return
        now = time.monotonic()
        self._window.completed(timedelta(seconds=now), timedelta(seconds=now - sent_at))
        self.ledger.window = self._window.size

    async def _prune(self, device: ThreadPoolExecutor) -> None:
        """Removes checkpoints below the floor, away from the event loop: they may be gigabytes."""
        floor = self.ledger.floor
        if floor is not None and floor != self._pruned_to:
            await asyncio.get_running_loop().run_in_executor(device, self._checkpoints.prune, floor)
            self._pruned_to = floor

    # -- NeighbourHost ------------------------------------------------------------------------------------------

    async def serve_link(self, stream: FrameStream) -> None:
        """Runs the link that an upstream peer has opened, until it ends."""
        try:
            await self.neighbours.serve(stream)
        except RewindNeeded as error:
            if not self._failure.done():
                self._failure.set_exception(error)

    def link_opened(self, side: Side, committed: int, held: Sequence[MicrobatchId]) -> None:
        self._replays.opened(side, committed, held)

    def look_again(self) -> None:
        """What is to be computed next may have changed, though nothing has come from a neighbour."""
        self._wake.set()

    def woken(self) -> None:
        self._wake.set()
        if self.on_progress is not None:
            self.on_progress()

    def told(self, report: LinkReport) -> None:
        self._report(report)

    def frame_received(self, side: Side, frame: Frame, peer: str) -> None:
        data = frame.latents if isinstance(frame, stage_pb2.UpstreamFrame) else frame.gradients
        try:
            answers = self._receive(side, frame, peer)
        except FrameError:
            self.totals.microbatches[Result.REFUSED] += len(data.microbatches)
            raise
        self.neighbours.send(answers, only=peer if side is Side.UPSTREAM else None)
        self.woken()

    def _receive(self, side: Side, frame: Frame, peer: str) -> list[Outbound]:
        if isinstance(frame, stage_pb2.UpstreamFrame):
            self._check_direction(side, Side.UPSTREAM)
            latents = [self._wire.decode_latents(message) for message in frame.latents.microbatches]
            return [item for m in latents for item in self.ledger.receive_latents(m.name, m, peer)]
        self._check_direction(side, Side.DOWNSTREAM)
        return [item for message in frame.gradients.microbatches for item in self._receive_gradients(message, peer)]

    def _receive_gradients(self, message: stage_pb2.Gradients, peer: str) -> Sequence[Outbound]:
        m = self._wire.decode_gradients(message)
        train = m.name.kind is MicrobatchKind.TRAIN
        self.totals.hops.returned(m.name, time.monotonic())
        self.neighbours.answered(m.name, peer)
        # A gradient is for the trainer. An evaluation's result is relayed: written anew, since `message` is a view
        # that would keep its whole frame alive.
        payload: GradientMicrobatch | stage_pb2.Gradients = (
            m if train else self._wire.encode_gradients(m.name, m.loss, None)
        )
        return self._note_evaluation(m.name, self.ledger.receive_gradients(m.name, m.loss, payload, peer))

    @staticmethod
    def _check_direction(side: Side, expected: Side) -> None:
        if side is not expected:
            raise ProtocolViolation(f"the {side} neighbour sent a frame that only the {expected} one sends")
