"""From a stage's reports to events, metrics and the figures of its directory entry."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from node import resident
from node.events import (
    Checkpoint,
    Complete,
    Evaluation,
    Event,
    Link,
    LinkTraffic,
    MemoryUse,
    StageStep,
    StateTransfer,
    WorkTime,
)
from node.metrics import WorkerMetrics
from stage_server.profile import WorkTimes
from stage_server.reports import (
    CheckpointReport,
    CompleteReport,
    EvaluationReport,
    LinkReport,
    Report,
    StepReport,
)
from stage_server.state_plan import StateProgress
from stage_server.trainer import MemoryReport

_TRANSFER_SECONDS = 1.0
_RECENT_STEPS = 8  # rates are told over the last few steps


@dataclass(frozen=True, slots=True)
class Figures:
    """What a directory entry says about a peer's work."""

    loss: float | None
    compute_share: float
    microbatches: int
    tokens_per_second: float
    wire_compression: float


class EventReporter:
    """Given to a StagePeer as its `report`. Lives on the event loop's thread."""

    def __init__(self, stage: int, metrics: WorkerMetrics, emit: Callable[[Event], None]) -> None:
        self.metrics = metrics
        self.complete = False
        self.base_bytes = 0  # resident before the weights were built
        self.state_changed = asyncio.Event()
        self._stage = stage
        self._emit = emit
        self._recent: deque[StepReport] = deque(maxlen=_RECENT_STEPS)
        self._num_microbatches = 0
        self._transfer_told_at = -math.inf  # monotonic seconds

    def __call__(self, report: Report) -> None:
        if isinstance(report, StepReport):
            self._recent.append(report)
            self._num_microbatches += report.num_microbatches
        if isinstance(report, CompleteReport):
            self.complete = True
            self.state_changed.set()
        event = _as_event(self._stage, report, self.base_bytes)
        self.metrics.observe(event)
        self._emit(event)

    def transfer(self, progress: StateProgress) -> None:
        """Tells of a state's way here: at most once a second, and its end."""
        now = time.monotonic()
        if progress.done_bytes < progress.total_bytes and now - self._transfer_told_at < _TRANSFER_SECONDS:
            return
        self._transfer_told_at = now
        self._emit(
            StateTransfer(
                stage=self._stage,
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
                seconds_left=progress.seconds_left,
            )
        )

    def figures(self) -> Figures:
        """Over the last few steps."""
        recent = self._recent
        seconds = sum(report.wall.total_seconds() for report in recent)
        links = [report.link for report in recent if report.link is not None]
        wire = sum(link.wire_bytes_forward + link.wire_bytes_backward for link in links)
        return Figures(
            loss=recent[-1].loss if recent else None,
            compute_share=min(1.0, sum(r.compute.total_seconds() for r in recent) / seconds) if seconds else 0.0,
            microbatches=self._num_microbatches,
            tokens_per_second=sum(report.num_tokens for report in recent) / seconds if seconds else 0.0,
            wire_compression=sum(link.dense_bytes for link in links) / wire if wire else 0.0,
        )


def _as_event(stage: int, report: Report, base_bytes: int) -> Event:
    match report:
        case StepReport():
            return _step_event(stage, report)
        case EvaluationReport(committed_step, loss):
            return Evaluation(stage=stage, step=committed_step, loss=loss)
        case CheckpointReport(step, duration, size_bytes):
            return Checkpoint(stage=stage, step=step, seconds=duration.total_seconds(), size_bytes=size_bytes)
        case LinkReport(side, is_open, detail):
            return Link(stage=stage, side=side.value, state="open" if is_open else "lost", detail=detail)
        case CompleteReport(step, memory):
            return Complete(stage=stage, step=step, memory=_memory_use(memory, base_bytes))


def _step_event(stage: int, report: StepReport) -> StageStep:
    link = report.link
    return StageStep(
        stage=stage,
        step=report.step,
        loss=report.loss,
        tokens=report.num_tokens,
        seconds=report.wall.total_seconds(),
        steady_seconds=report.pace.seconds,
        steady_microbatches=report.pace.microbatches,
        microbatches=report.num_microbatches,
        compute_seconds=report.compute.total_seconds(),
        wait_seconds=report.wait.total_seconds(),
        gradient_norm=report.gradient_norm,
        link=None
        if link is None
        else LinkTraffic(
            dense_bytes=link.dense_bytes,
            wire_bytes_forward=link.wire_bytes_forward,
            wire_bytes_backward=link.wire_bytes_backward,
        ),
        work=_work_times(report.work),
    )


def _work_times(work: WorkTimes) -> dict[str, WorkTime]:
    return {
        kind.value: WorkTime(seconds=spent.wall_seconds, cpu_seconds=spent.cpu_seconds) for kind, spent in work.items()
    }


def _memory_use(memory: MemoryReport, base_bytes: int) -> MemoryUse:
    return MemoryUse(
        base_bytes=base_bytes,
        peak_bytes=resident.peak_bytes(),
        parameters_bytes=memory.parameters_bytes,
        gradients_bytes=memory.parameters_bytes,  # gone after a commit; each parameter has one before it
        optimizer_bytes=memory.optimizer_bytes,
        activations_bytes=memory.peak_activations_bytes,
    )
