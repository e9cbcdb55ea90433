"""All stages of a run in one process, chained by hand: the source of real latents and gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from node.config import RunConfig
from stage_server.codec import Packed
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.trainer import StageTrainer

TokenIds = npt.NDArray[np.int32]


class Crossings(Protocol):
    """Told of everything that crosses a boundary."""

    def forward(self, name: MicrobatchId, token_ids: TokenIds, latents: Packed) -> None: ...
    def backward(self, name: MicrobatchId, loss: float, gradients: Packed) -> None: ...


class Chain:
    """Trains a run as its swarm would, without a network."""

    def __init__(self, config: RunConfig, weights_of: Chain | None = None) -> None:
        """`weights_of`: start from the weights of another chain of the same model."""
        self._config = config
        self._stages = [
            StageTrainer(config, config.run_id, stage, activation_budget_bytes=1 << 40)
            for stage in range(config.stages)
        ]
        if weights_of is not None:
            for stage, other in zip(self._stages, weights_of._stages, strict=True):
                stage.load_state_tensors(other.state_tensors())

    def step(self, step: int, read: Callable[[MicrobatchId], TokenIds], crossings: Sequence[Crossings]) -> float:
        """One optimizer step (1-based): the mean loss, nats per token."""
        count = self._config.plan.microbatches_per_step
        loss = sum(self._microbatch(_name(step, index), read, crossings) for index in range(count)) / count
        for stage in self._stages:
            stage.commit(step)
        return loss

    def _microbatch(
        self, name: MicrobatchId, read: Callable[[MicrobatchId], TokenIds], crossings: Sequence[Crossings]
    ) -> float:
        token_ids, latents = read(name), None
        *before, last = self._stages
        for stage in before:
            latents = stage.forward(name, token_ids, latents)
            for crossing in crossings:
                crossing.forward(name, token_ids, latents)
        loss, gradients = last.forward_backward(name, token_ids, latents)
        for stage in reversed(before):
            if gradients is None:
                raise RuntimeError("only the first stage returns no gradient")
            for crossing in crossings:
                crossing.backward(name, loss, gradients)
            gradients = stage.backward(name, gradients)
        return loss


def _name(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)
