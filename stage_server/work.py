"""The words of a ledger: what it asks its peer to compute (tasks), and what it has for the neighbours (outbound)."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from stage_server.ids import MicrobatchId, StepIndex


class Side(enum.StrEnum):
    """The two neighbours of a stage."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"

    @property
    def other(self) -> Side:
        return Side.DOWNSTREAM if self is Side.UPSTREAM else Side.UPSTREAM


@dataclass(frozen=True, slots=True)
class Forwarded:
    """A microbatch's payload on its way to the next stage."""

    name: MicrobatchId
    body: Any


@dataclass(frozen=True, slots=True)
class Returned:
    """A microbatch's payload on its way to the previous stage: gradient and loss, or for evaluation the loss alone."""

    name: MicrobatchId
    loss: float
    body: Any


@dataclass(frozen=True, slots=True)
class Declined:
    """An answer to latents that came too late: nobody can compute them here any more. Their sender asks another."""

    name: MicrobatchId


Outbound = Forwarded | Returned | Declined


@dataclass(frozen=True, slots=True)
class Forward:
    """Compute forward. `payload` is what upstream sent; None on the first stage, which reads the data itself."""

    name: MicrobatchId
    payload: Any
    late: bool = False  # with the weights that the newest committed step started from; adds to no sum


@dataclass(frozen=True, slots=True)
class Backward:
    """Compute backward from the gradient that downstream sent."""

    name: MicrobatchId
    payload: Any
    late: bool = False


@dataclass(frozen=True, slots=True)
class Commit:
    """All microbatches of the step are done: take the optimizer step."""

    step: StepIndex


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Write the committed state to disk."""

    step: StepIndex


Task = Forward | Backward | Commit | Checkpoint

SOLE = ""
"""The peer on a side where there can be but one."""
