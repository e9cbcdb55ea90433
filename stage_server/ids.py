"""Names: stages, steps and microbatches."""

from __future__ import annotations

import enum
from typing import NamedTuple, NewType

StageIndex = NewType("StageIndex", int)
"""Index s of a stage, 0 (embedding) to S-1 (head)."""

StepIndex = NewType("StepIndex", int)
"""An optimizer step of the whole swarm, 1-based; "committed step 0" is the initial weights."""

PeerId = NewType("PeerId", str)
"""Base58 libp2p peer id: the identity multihash of the peer's Ed25519 public key."""

RunId = NewType("RunId", str)
"""Hex hash of the frozen run config."""


class MicrobatchKind(enum.IntEnum):
    """What a microbatch is for. The values are those of the wire (resbm.v1.MicrobatchKind)."""

    TRAIN = 1
    EVALUATE = 2


class MicrobatchId(NamedTuple):
    """The name of a microbatch, for ever. Evaluation uses the weights that `step` starts from."""

    step: StepIndex
    kind: MicrobatchKind
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here

    def __str__(self) -> str:
        return f"{self.kind.name.lower()} {self.index} of step {self.step}"
