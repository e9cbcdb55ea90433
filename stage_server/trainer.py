"""Training arithmetic of one stage: microbatches in, latents and gradients out, one optimizer step at a time.

No network, no threads, no asyncio: one device thread calls it. The caller guarantees that each microbatch is
backwarded once and in index order, because gradients are summed in the order of the calls.

Shapes: B batch, T tokens, h latent width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.func import functional_call

from stage_server.activations import ActivationMeter
from stage_server.codec import (
    Encoding,
    Packed,
    backward_encoding,
    clip_for,
    forward_encoding,
    pack,
    require,
    rounding_generator,
    unpack,
)
from stage_server.config import StageConfig
from stage_server.errors import CheckpointInvalid, NotFinite, ProtocolViolation
from stage_server.ids import MicrobatchId, MicrobatchKind
from stage_server.losses import local_loss_weight, next_token_loss
from stage_server.module import StageModule
from stage_server.optimizer import CommitReport, StageOptimizer
from stage_server.profile import Profile, Work

TokenIds = npt.NDArray[np.int32]
Direction = Literal["forward", "backward"]
_PARAMETER = "parameter."
_OPTIMIZER = "optimizer."


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Bytes that one stage holds for training; what the allocator and libraries add is not counted."""

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int  # kept now, for microbatches between forward and backward
    peak_activations_bytes: int  # most held at once since the start, recomputation included
    microbatch_activations_bytes: int  # of one microbatch, measured on the first; 0 before


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that is needed to compute a microbatch once more."""

    step: int
    token_ids: TokenIds
    latents: Packed | None


@dataclass(frozen=True, slots=True)
class Graph:
    """One microbatch's autograd graph: from the received latents to what is sent."""

    received_BTh: Tensor | None
    output: Tensor


class StageTrainer:
    """Forward, backward and commit of one stage.

    Args:
        config: the run's.
        run_id: seeds stochastic rounding.
        stage: index s.
        device: where the weights live.
        activation_budget_bytes: activations kept between forward and backward; microbatches over it are computed again.
    """

    def __init__(
        self,
        config: StageConfig,
        run_id: str,
        stage: int,
        *,
        device: torch.device | str = "cpu",
        activation_budget_bytes: int,
    ) -> None:
        self.config, self.run_id, self.stage = config, run_id, stage
        self.device = torch.device(device)
        self.profile = Profile()
        self.module = StageModule(config, stage, self.device)
        self._parameters = dict(self.module.named_global_parameters())
        self._optimizer = StageOptimizer(self._parameters, config.optimizer, config.stages, config.plan.steps)
        self._meter = ActivationMeter(self._parameters.values(), activation_budget_bytes)
        self.codec_errors: dict[Direction, float] = {}
        self._graphs: dict[MicrobatchId, Graph] = {}
        self._inputs: dict[MicrobatchId, Inputs] = {}

    def forward(self, name: MicrobatchId, token_ids: TokenIds, latents: Packed | None) -> Packed:
        """Latents for the next stage. Not for the last stage.

        Args:
            name: of the microbatch; a second forward under one name replaces the first.
            token_ids: int32 [B, T+1], ids below vocab_size.
            latents: from the stage before, [B, T, h]; None on stage 0.

        Raises:
            FrameError: the latents are refused, see `codec.unpack`; or this stage's own are not finite.
        """
        self._forget(name)
        inputs = Inputs(name.step, token_ids, latents)
        if not self._meter.may_keep(len(self._graphs)):
            self._inputs[name] = inputs
            with torch.no_grad():
                return self._pack_latents(name, self._graph(inputs).output)
        graph = self._graph(inputs)
        if self._meter.may_keep(len(self._graphs)):  # only now known for the first microbatch
            self._graphs[name] = graph
        else:
            self._inputs[name] = inputs
        self._meter.held(len(self._graphs) + (name in self._inputs))
        return self._pack_latents(name, graph.output)

    def backward(self, name: MicrobatchId, gradients: Packed) -> Packed | None:
        """Add the microbatch's share to this stage's gradients; the gradient for the stage before, None on stage 0.

        Raises:
            ProtocolViolation: the microbatch has not been forwarded, or is backwarded already; nothing has changed.
            FrameError: the gradients are refused; nothing has changed.
            NotFinite: this stage's own gradient is not finite: its sums are spoilt, call `discard`.
        """
        if name not in self._graphs and name not in self._inputs:
            raise ProtocolViolation(f"gradients for {name}, which is not between forward and backward here")
        gradient_BTh = self._unpack(gradients, backward_encoding(self.config.codec))
        graph = self._graphs.pop(name, None)
        if graph is None:
            graph = self._graph(self._inputs.pop(name))
            self._meter.held(len(self._graphs) + 1)
        return self._backward(name, graph, gradient_BTh)

    def forward_backward(
        self, name: MicrobatchId, token_ids: TokenIds, latents: Packed | None
    ) -> tuple[float, Packed | None]:
        """The last stage's forward and backward: loss in nats per token, and the gradient for the stage before.

        The loss is the microbatch's own mean; the gradient is of the step's loss, so it carries 1 / microbatches.

        Raises:
            FrameError: the latents are refused, or the loss is not finite; nothing has changed.
            NotFinite: this stage's own gradient is not finite: its sums are spoilt, call `discard`.
        """
        graph = self._graph(Inputs(name.step, token_ids, latents))
        self._meter.held(1)
        loss = _finite(float(graph.output.detach()), name)
        return loss, self._backward(name, graph, self.loss_weight())

    @torch.no_grad()
    def evaluate(self, name: MicrobatchId, token_ids: TokenIds, latents: Packed | None) -> Packed | float:
        """Forward only: latents for the next stage, or on the last stage the loss in nats per token."""
        output = self._graph(Inputs(name.step, token_ids, latents)).output
        return _finite(float(output), name) if self.module.is_last else self._pack_latents(name, output)

    def commit(self, step: int) -> CommitReport:
        """One optimizer step (1-based) with the gradients summed since the last.

        Raises:
            NotFinite: a gradient is not finite; weights and optimizer have not changed.
        """
        if self._graphs or self._inputs:
            raise ProtocolViolation(f"step {step} cannot be committed: {self.num_in_flight} microbatches are in flight")
        with self.profile.span(Work.OPTIMIZER):
            return self._optimizer.step(step)

    def discard(self) -> None:
        """Forget every microbatch in flight and all gradients; weights and optimizer stay as last committed."""
        self._graphs.clear()
        self._inputs.clear()
        self._optimizer.zero_gradients()

    @property
    def num_in_flight(self) -> int:
        """Microbatches between forward and backward."""
        return len(self._graphs) + len(self._inputs)

    def loss_weight(self) -> Tensor:
        """Weight of one microbatch's loss in the step's: 1 / microbatches_per_step, float32 scalar."""
        return torch.tensor(1.0 / self.config.plan.microbatches_per_step, device=self.device)

    def parameters_fp32(self) -> Iterator[tuple[str, Tensor]]:
        """The live weights by global name, sorted."""
        return ((name, parameter.detach()) for name, parameter in self._parameters.items())

    def state_tensors(self) -> dict[str, Tensor]:
        """All that bit-exact resumption needs, by stable name: the live tensors, not copies."""
        parameters = {_PARAMETER + name: parameter for name, parameter in self.parameters_fp32()}
        return parameters | self._optimizer.state_tensors()

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace weights and optimizer state by copies of the tensors, and discard what is in flight.

        Raises:
            CheckpointInvalid: names or shapes are not this stage's; nothing has changed.
        """
        weights = {name.removeprefix(_PARAMETER): t for name, t in tensors.items() if name.startswith(_PARAMETER)}
        others = {name: t for name, t in tensors.items() if not name.startswith(_PARAMETER)}
        if strange := [name for name in others if not name.startswith(_OPTIMIZER)]:
            raise CheckpointInvalid(f"{strange[0]} does not belong to this stage")
        if wrong := weights.keys() ^ self._parameters.keys():
            raise CheckpointInvalid(f"weights of stage {self.stage} and the state differ in {min(wrong)}")
        for name, parameter in self._parameters.items():
            if weights[name].shape != parameter.shape:
                raise CheckpointInvalid(f"{name} has shape {list(weights[name].shape)}, not {list(parameter.shape)}")
        self._optimizer.load_state_tensors(others)
        for name, parameter in self._parameters.items():
            parameter.copy_(weights[name])
        self.discard()

    def memory(self) -> MemoryReport:
        """What is held now, and the most activations that ever were."""
        parameters = self._parameters.values()
        return MemoryReport(
            parameters_bytes=sum(p.nbytes for p in parameters),
            gradients_bytes=sum(p.grad.nbytes for p in parameters if p.grad is not None),
            optimizer_bytes=self._optimizer.state_bytes(),
            activations_bytes=len(self._graphs) * self._meter.microbatch_bytes,
            peak_activations_bytes=self._meter.peak_bytes,
            microbatch_activations_bytes=self._meter.microbatch_bytes,
        )

    def _graph(self, inputs: Inputs, weights: Mapping[str, Tensor] | None = None) -> Graph:
        """Compute a microbatch: what the stage sends or, on the last stage, its loss; with `weights` or its own."""
        received_BTh = None
        if inputs.latents is not None:
            received_BTh = self._unpack(inputs.latents, forward_encoding(self.config.codec))
            received_BTh.requires_grad_(torch.is_grad_enabled())
        ids = torch.from_numpy(inputs.token_ids).to(self.device, torch.int64)
        with self.profile.span(Work.FORWARD), self._meter.measuring() as note, autocast(self.config, self.device):
            arguments = (ids[:, :-1], received_BTh, local_loss_weight(self.config, inputs.step))
            output = functional_call(self.module, dict(weights), arguments) if weights else self.module(*arguments)
            if self.module.is_last:
                output = next_token_loss(output, ids[:, 1:])
            note(output)
            if received_BTh is not None:
                note(received_BTh)
        return Graph(received_BTh, output)

    def _backward(self, name: MicrobatchId, graph: Graph, gradient: Tensor) -> Packed | None:
        with self.profile.span(Work.BACKWARD):
            torch.autograd.backward(graph.output, gradient)
        if graph.received_BTh is None:
            return None
        sent_BTh = graph.received_BTh.grad
        if sent_BTh is None:
            raise NotFinite(f"{name} gave no gradient for stage {self.stage - 1}")
        codec = self.config.codec
        encoding = backward_encoding(codec)
        generator = rounding_generator(codec, self.run_id, name, self.stage - 1)
        with self.profile.span(Work.PACK):
            packed = pack(sent_BTh, encoding, clip_for(codec, encoding), generator)
        self._note_codec_error("backward", name, sent_BTh, packed)
        return packed

    def _pack_latents(self, name: MicrobatchId, output_BTh: Tensor) -> Packed:
        encoding = forward_encoding(self.config.codec)
        with self.profile.span(Work.PACK):
            packed = pack(output_BTh, encoding, clip_for(self.config.codec, encoding))
        self._note_codec_error("forward", name, output_BTh, packed)
        return packed

    @torch.no_grad()
    def _note_codec_error(self, direction: Direction, name: MicrobatchId, x_BTh: Tensor, packed: Packed) -> None:
        """Relative error ‖written − x‖ / ‖x‖ of one microbatch a step: telling costs as much as reading it once."""
        if name.kind is MicrobatchKind.TRAIN and name.index == 0:
            written_BTh = unpack(packed, clip_for(self.config.codec, packed.encoding), x_BTh.device)
            norm = float(x_BTh.float().norm())
            self.codec_errors[direction] = float((written_BTh - x_BTh).norm()) / norm if norm else 0.0

    def _unpack(self, packed: Packed, encoding: Encoding) -> Tensor:
        plan = self.config.plan
        require(packed, encoding, plan.batch, plan.tokens, self.config.latent_width)
        with self.profile.span(Work.UNPACK):
            return unpack(packed, clip_for(self.config.codec, encoding), self.device)

    def _forget(self, name: MicrobatchId) -> None:
        self._graphs.pop(name, None)
        self._inputs.pop(name, None)


def autocast(config: StageConfig, device: torch.device) -> AbstractContextManager[None]:
    """The run's compute precision: bf16 autocast, or float32 as it is."""
    context: AbstractContextManager[None] = torch.autocast(
        device.type, dtype=torch.bfloat16, enabled=config.compute.precision == "bf16"
    )
    return context


def _finite(loss: float, name: MicrobatchId) -> float:
    if not math.isfinite(loss):
        raise NotFinite(f"loss of {name} is {loss}")
    return loss
