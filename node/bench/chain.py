"""All stages of a run in one process, chained by hand: the source of real latents and gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from node.config import RunConfig
from stage_server.codec import Packed
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.reports import mean_loss
from stage_server.trainer import StageTrainer

if TYPE_CHECKING:
    from torch import Tensor

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
        loss = mean_loss([self._microbatch(_name(step, index), read, crossings) for index in range(count)])
        for stage in self._stages:
            stage.commit(step)
        return loss

    def evaluate(self, read: Callable[[MicrobatchId], TokenIds]) -> float:
        """Mean loss of the run's validation microbatches with the present weights, nats per token."""
        indices = range(self._config.plan.evaluation_microbatches)
        names = [_evaluation(index) for index in indices]
        return mean_loss([self._validation_loss(name, read(name)) for name in names])

    def evaluate_with_strange_latents(self, read: Callable[[MicrobatchId], TokenIds]) -> float:
        """The same when the last stage gets the latents of another text: a wire that says something makes this worse.

        The first microbatch's stranger is the last one.
        """
        *before, last = self._stages
        names = [_evaluation(index) for index in range(self._config.plan.evaluation_microbatches)]
        latents = [self._latents(before, name, read(name)) for name in names]
        losses = [last.evaluate(name, read(name), latents[index - 1]) for index, name in enumerate(names)]
        return mean_loss([_as_loss(loss) for loss in losses])

    def num_parameters(self) -> int:
        """Of all stages together."""
        return sum(tensor.numel() for stage in self._stages for _, tensor in stage.parameters_fp32())

    def state_tensors(self) -> dict[str, Tensor]:
        """All that bit-exact resumption needs, `<stage>/<name>`: the live tensors, not copies."""
        return {
            f"{number}/{name}": tensor
            for number, stage in enumerate(self._stages)
            for name, tensor in stage.state_tensors().items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from such a state. Raises CheckpointInvalid."""
        for number, stage in enumerate(self._stages):
            prefix = f"{number}/"
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            stage.load_state_tensors(own)

    def _validation_loss(self, name: MicrobatchId, token_ids: TokenIds) -> float:
        *before, last = self._stages
        return _as_loss(last.evaluate(name, token_ids, self._latents(before, name, token_ids)))

    def _latents(self, stages: Sequence[StageTrainer], name: MicrobatchId, token_ids: TokenIds) -> Packed | None:
        """What the last of these stages sends; None of no stage."""
        latents: Packed | None = None
        for stage in stages:
            sent = stage.evaluate(name, token_ids, latents)
            if isinstance(sent, float):
                raise RuntimeError("only the last stage has a loss")
            latents = sent
        return latents

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


def _evaluation(index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(0), MicrobatchKind.EVALUATE, index)


def _as_loss(output: Packed | float) -> float:
    if not isinstance(output, float):
        raise RuntimeError("the last stage has no loss")
    return output
