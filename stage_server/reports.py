"""What a stage tells the one who runs it: plain values, no formatting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

from stage_server.ids import StepIndex
from stage_server.profile import WorkTimes
from stage_server.trainer import MemoryReport
from stage_server.window import NO_PACE, Pace
from stage_server.work import Side


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """Traffic of the link to the next stage, both directions, all frames counted."""

    dense_bytes: int
    wire_bytes_forward: int
    wire_bytes_backward: int


@dataclass(frozen=True, slots=True)
class StepReport:
    """A step is committed here. `link` is None on the last stage."""

    step: StepIndex
    loss: float | None  # nats per token, of the microbatches that were heard of here; None: of none
    num_tokens: int
    num_microbatches: int
    wall: timedelta
    compute: timedelta
    wait: timedelta
    gradient_norm: float
    link: LinkBytes | None
    work: WorkTimes  # since the commit before
    pace: Pace = NO_PACE  # inside the step


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Validation loss (nats per token) of the weights after `committed_step` steps."""

    committed_step: int
    loss: float


@dataclass(frozen=True, slots=True)
class CheckpointReport:
    """A checkpoint is on disk."""

    step: StepIndex
    duration: timedelta
    size_bytes: int


@dataclass(frozen=True, slots=True)
class LinkReport:
    """A link has opened or was lost."""

    side: Side
    open: bool
    detail: str


@dataclass(frozen=True, slots=True)
class CompleteReport:
    """Every step of the run is committed and saved here."""

    step: StepIndex
    memory: MemoryReport


def mean_loss(losses: Sequence[float]) -> float:
    """A step's loss from its microbatches': their exactly rounded mean, the same on every Python version and machine.

    (From Python 3.12 on `sum` compensates rounding errors of floats and before it does not.)
    """
    return math.fsum(losses) / len(losses)


Report = StepReport | EvaluationReport | CheckpointReport | LinkReport | CompleteReport
