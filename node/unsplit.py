"""The reference: the same run with the unsplit model, in one process, in one autograd graph.

It is made of the same parts as the swarm's stages (their modules, their optimizers, the codec), but nothing is cut: the
last stage's loss is one expression of the tokens, and autograd runs through every boundary (and brings local losses
along). A swarm must train the same bits.

Shapes: B batch, T tokens, h latent width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stage_server.codec import Encoding, backward_encoding, clip_for, forward_encoding, pack, rounding_generator, unpack
from stage_server.config import StageConfig
from stage_server.errors import CheckpointInvalid
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.losses import local_loss_weight, next_token_loss
from stage_server.module import StageModule
from stage_server.optimizer import StageOptimizer
from stage_server.reports import mean_loss
from stage_server.trainer import autocast

TokenIds = npt.NDArray[np.int32]
Microbatches = Callable[[MicrobatchId], TokenIds]


class UnsplitModel:
    """The whole model of a run, trained as the swarm trains it.

    Args:
        config: the run's.
        run_id: seeds stochastic rounding.
        device: where everything lives.
    """

    def __init__(self, config: StageConfig, run_id: str, device: torch.device | str = "cpu") -> None:
        self.config, self.run_id, self.device = config, run_id, torch.device(device)
        self.stages = [StageModule(config, stage, self.device) for stage in range(config.stages)]
        self._parameters = [dict(stage.named_global_parameters()) for stage in self.stages]
        self._optimizers = [
            StageOptimizer(parameters, config.optimizer, config.stages, config.plan.steps)
            for parameters in self._parameters
        ]

    def train_step(self, step: int, microbatch: Microbatches) -> float:
        """One optimizer step (1-based): the mean loss of its microbatches, nats per token."""
        loss = self.accumulate(step, microbatch)
        for optimizer in self._optimizers:
            optimizer.step(step)
        return loss

    def accumulate(self, step: int, microbatch: Microbatches) -> float:
        """Adds the gradients of a step's microbatches to what is there, and takes no step; their mean loss."""
        count = self.config.plan.microbatches_per_step
        weight = torch.tensor(1.0 / count, device=self.device)
        losses = []
        for index in range(count):
            name = MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)
            loss = self._loss(name, microbatch(name))
            torch.autograd.backward(loss, weight)
            losses.append(float(loss.detach()))
        return mean_loss(losses)

    def gradients(self) -> dict[int, Tensor]:
        """By stage, the gradient sum as one vector, parameters in name order."""
        return {
            stage: torch.cat(
                [p.grad.flatten() if p.grad is not None else p.new_zeros(p.numel()) for p in named.values()]
            )
            for stage, named in enumerate(self._parameters)
        }

    def zero_gradients(self) -> None:
        """Forgets all gradients."""
        for optimizer in self._optimizers:
            optimizer.zero_gradients()

    @torch.no_grad()
    def evaluate(self, step: int, microbatch: Microbatches) -> float:
        """Mean loss of the validation microbatches with the present weights, nats per token; NaN if there are none."""
        indices = range(self.config.plan.evaluation_microbatches)
        names = [MicrobatchId(StepIndex(step), MicrobatchKind.EVALUATE, index) for index in indices]
        losses = [float(self._loss(name, microbatch(name))) for name in names]
        return mean_loss(losses) if losses else float("nan")

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the weights of all stages, by global name or as in `StageTrainer.state_tensors`.

        Optimizer state is not taken over: this is for evaluation and generation.

        Raises:
            CheckpointInvalid: a weight is missing or has another shape; nothing has changed.
        """
        weights = {name.removeprefix("parameter."): tensor for name, tensor in tensors.items()}
        for name, parameter in self.parameters_fp32():
            if name not in weights or weights[name].shape != parameter.shape:
                raise CheckpointInvalid(f"{name} is missing or has another shape than the run's")
        for name, parameter in self.parameters_fp32():
            parameter.copy_(weights[name])

    def parameters_fp32(self) -> Iterator[tuple[str, Tensor]]:
        """The live weights of all stages by global name, sorted."""
        together = {name: p.detach() for parameters in self._parameters for name, p in parameters.items()}
        return iter(sorted(together.items()))

    @torch.no_grad()
    def logits(self, ids_BT: Tensor, name: MicrobatchId) -> Tensor:
        """Logits [B, T, V] of the composed model, latents written and read at every boundary."""
        with autocast(self.config, self.device):
            return self._logits(ids_BT, name)

    def generate(self, token_ids: list[int], num_tokens: int, temperature: float = 0.0, seed: int = 0) -> list[int]:
        """Continue a text.

        Args:
            token_ids: the prompt, at least one id; only the last `plan.tokens` ids are seen at any time.
            num_tokens: ids to add.
            temperature: of sampling; 0 always takes the likeliest id.
            seed: of sampling.

        Returns:
            The added ids.
        """
        generator = torch.Generator().manual_seed(seed)
        ids = list(token_ids)
        name = MicrobatchId(StepIndex(0), MicrobatchKind.EVALUATE, 0)
        for _ in range(num_tokens):
            context_1T = torch.tensor([ids[-self.config.plan.tokens :]], device=self.device)
            logits_V = self.logits(context_1T, name)[0, -1].float().cpu()
            ids.append(_choose(logits_V, temperature, generator))
        return ids[len(token_ids) :]

    def _loss(self, name: MicrobatchId, token_ids: TokenIds) -> Tensor:
        ids = torch.from_numpy(token_ids).to(self.device, torch.int64)
        with autocast(self.config, self.device):
            return next_token_loss(self._logits(ids[:, :-1], name), ids[:, 1:])

    def _logits(self, ids_BT: Tensor, name: MicrobatchId) -> Tensor:
        x: Tensor | None = None
        for stage in self.stages:
            if x is not None:
                x = _Wire.through(x, _Boundary(self.config, self.run_id, name, stage.stage - 1))
            x = stage(ids_BT, x, local_loss_weight(self.config, name.step))
        return cast(Tensor, x)  # a run has at least one stage


@dataclass(frozen=True, slots=True)
class _Boundary:
    """Where a tensor crosses: all that decides how it is written."""

    config: StageConfig
    run_id: str
    name: MicrobatchId
    boundary: int

    def carry(self, x_BTh: Tensor, encoding: Encoding, generator: torch.Generator | None) -> Tensor:
        """Write and read a tensor."""
        clip = clip_for(self.config.codec, encoding)
        return unpack(pack(x_BTh, encoding, clip, generator), clip, x_BTh.device)


class _Wire(torch.autograd.Function):
    """A boundary without a network: latents written and read forward, gradients written and read backward."""

    @staticmethod
    def through(b_BTh: Tensor, place: _Boundary) -> Tensor:
        crossed_BTh: Tensor = _Wire.apply(b_BTh, place)  # type: ignore[no-untyped-call]  # torch does not annotate it
        return crossed_BTh

    @staticmethod
    def forward(ctx: Any, b_BTh: Tensor, place: _Boundary) -> Tensor:
        ctx.place = place
        return place.carry(b_BTh, forward_encoding(place.config.codec), None)

    @staticmethod
    def backward(ctx: Any, *gradients_BTh: Tensor) -> tuple[Tensor, None]:
        place: _Boundary = ctx.place
        codec = place.config.codec
        generator = rounding_generator(codec, place.run_id, place.name, place.boundary)
        return place.carry(gradients_BTh[0], backward_encoding(codec), generator), None


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature <= 0.0:
        return int(logits_V.argmax())
    probabilities_V = torch.softmax(logits_V / temperature, -1)
    return int(torch.multinomial(probabilities_V, 1, generator=generator))


def weights_digest(weights: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 (hex) over the float32 bytes of all weights in sorted order of their global names."""
    digest = hashlib.sha256()
    for _, weight in sorted(weights, key=lambda pair: pair[0]):
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy().data)
    return digest.hexdigest()
