"""What a stage's arithmetic needs beyond `StageTrainer` where other replicas share its microbatches.

Gradient sums leave and come back as one flat vector, so that replicas can add theirs up. A sum can be made again for a
share of what was computed. And a microbatch of the newest committed step can be computed once more with the weights
that the step started from, for a neighbour that lost its gradient: that adds to nothing.

Shapes: B batch, T tokens, h latent width, N values of all parameters together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stage_server.codec import Packed, backward_encoding
from stage_server.errors import CheckpointInvalid, ProtocolViolation
from stage_server.ids import MicrobatchId
from stage_server.optimizer import CommitReport
from stage_server.trainer import Graph, Inputs, StageTrainer, TokenIds

_EARLIER = "earlier."


@dataclass(frozen=True, slots=True)
class Agreed:
    """What the replicas of a stage have agreed to take a step with."""

    num_microbatches: int  # in this replica's gradient sum: its share
    total_N: Tensor | None = None  # of all contributions; None: nothing was exchanged, or this replica is alone
    weight: int = 0  # of the total, see `ReplicaTrainer.write_contribution`


class ReplicaTrainer(StageTrainer):
    """See the module's text. The constructor is that of `StageTrainer`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.before_commit: Callable[[int, ReplicaTrainer], None] | None = None
        """Called on the device thread when the gradient is what a step will be taken with."""
        self._earlier: dict[str, Tensor] = {}
        self._late_graphs: dict[MicrobatchId, Graph] = {}

    @property
    def num_values(self) -> int:
        """N."""
        return sum(parameter.numel() for parameter in self._parameters.values())

    @property
    def has_earlier_weights(self) -> bool:
        """Whether late microbatches can be computed here."""
        return bool(self._earlier)

    @property
    def replicas_are_equal(self) -> bool:
        """Whether replicas that have agreed on all steps so far hold the same state, bit for bit."""
        return True

    # -- sums ---------------------------------------------------------------------------------------------------

    def exchanges(self, step: int) -> bool:
        """Whether replicas add anything up before they take this step."""
        return True

    def can_be_whole(self, weight: int) -> bool:
        """Whether a step's total may have this weight."""
        return weight == self.config.plan.microbatches_per_step

    def write_contribution(self, step: int, num_microbatches: int, out_N: Tensor) -> int:
        """Writes what this replica adds to the step's total, [N] float32; returns the weight of it, in microbatches.

        `num_microbatches`: in the gradient sum.
        """
        self.write_gradients(out_N)
        return num_microbatches

    @torch.no_grad()
    def write_gradients(self, out_N: Tensor) -> None:
        """Copies the gradient sum, float32, parameters in name order; zeros where there is none."""
        for name, part in self._parts(out_N):
            gradient = self._parameters[name].grad
            if gradient is None:
                part.zero_()
            else:
                part.copy_(gradient)

    @torch.no_grad()
    def read_gradients(self, total_N: Tensor) -> None:
        """Replaces the gradient sum."""
        for name, part in self._parts(total_N):
            parameter = self._parameters[name]
            parameter.grad = part.to(parameter.device, parameter.dtype, copy=True)

    def _parts(self, values_N: Tensor) -> Iterator[tuple[str, Tensor]]:
        """The parameters' parts of a vector, by name and in their shapes."""
        start = 0
        for name, parameter in self._parameters.items():
            yield name, values_N[start : start + parameter.numel()].view(parameter.shape)
            start += parameter.numel()

    def add_again(self, items: Iterable[tuple[MicrobatchId, TokenIds, Packed | None, Packed | None]]) -> None:
        """Adds microbatches to the gradient sum that were computed before: (name, token ids, latents, gradients).

        Latents are None on the first stage, gradients on the last.
        """
        for name, token_ids, latents, gradients in items:
            graph = self._graph(Inputs(name.step, token_ids, latents))
            if gradients is None:
                torch.autograd.backward(graph.output, self.loss_weight())
            else:
                torch.autograd.backward(graph.output, self._unpack(gradients, backward_encoding(self.config.codec)))

    def drop_sum(self) -> None:
        """Sets the gradient sum to nothing. Microbatches in flight stay."""
        self._optimizer.zero_gradients()

    # -- commit -------------------------------------------------------------------------------------------------

    def commit_agreed(self, step: int, agreed: Agreed) -> CommitReport:
        """The step (1-based) as the replicas have agreed to take it. The gradient sum holds this replica's share."""
        if agreed.total_N is not None:
            self.read_gradients(agreed.total_N)
        return self.commit(step)

    def commit(self, step: int) -> CommitReport:
        """As `StageTrainer.commit`, and remembers the weights of before. What is in flight was done by others."""
        self._graphs.clear()
        self._inputs.clear()
        self._late_graphs.clear()
        if self.before_commit is not None:
            self.before_commit(step, self)
        if not self.module.is_first:
            self._earlier = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        return super().commit(step)

    # -- late ---------------------------------------------------------------------------------------------------

    def forward_late(self, name: MicrobatchId, token_ids: TokenIds, latents: Packed | None) -> Packed:
        """As `forward`, with the weights of before the newest commit."""
        graph = self._graph(Inputs(name.step, token_ids, latents), self._require_earlier())
        self._late_graphs[name] = graph
        return self._pack_latents(name, graph.output)

    def backward_late(self, name: MicrobatchId, gradients: Packed) -> Packed | None:
        """As `backward`, for a late microbatch; the gradient sum stays as it is.

        Raises:
            ProtocolViolation: the microbatch is not late here.
        """
        graph = self._late_graphs.pop(name, None)
        if graph is None:
            raise ProtocolViolation(f"gradients for {name}, which is not late here")
        return self._backward(name, graph, self._unpack(gradients, backward_encoding(self.config.codec)))

    def forward_backward_late(
        self, name: MicrobatchId, token_ids: TokenIds, latents: Packed | None
    ) -> tuple[float, Packed | None]:
        """As `forward_backward`, with the weights of before; the gradient sum stays as it is."""
        graph = self._graph(Inputs(name.step, token_ids, latents), self._require_earlier())
        return float(graph.output.detach()), self._backward(name, graph, self.loss_weight())

    @torch.no_grad()
    def evaluate_late(self, name: MicrobatchId, token_ids: TokenIds, latents: Packed | None) -> Packed | float:
        """As `evaluate`, with the weights of before."""
        output = self._graph(Inputs(name.step, token_ids, latents), self._require_earlier()).output
        return float(output) if self.module.is_last else self._pack_latents(name, output)

    def _require_earlier(self) -> Mapping[str, Tensor]:
        if not self._earlier:
            raise ProtocolViolation("the weights of before the newest commit are not here")
        return self._earlier

    # -- state --------------------------------------------------------------------------------------------------

    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """The state of another replica becomes this one's. Raises CheckpointInvalid."""
        self.load_state_tensors(tensors)

    def state_tensors(self) -> dict[str, Tensor]:
        """As `StageTrainer.state_tensors`, and the weights of before."""
        return super().state_tensors() | {_EARLIER + name: tensor for name, tensor in self._earlier.items()}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As `StageTrainer.load_state_tensors`, and the weights of before. Raises CheckpointInvalid."""
        earlier = {name.removeprefix(_EARLIER): t for name, t in tensors.items() if name.startswith(_EARLIER)}
        for name, tensor in earlier.items():
            if name not in self._parameters or tensor.shape != self._parameters[name].shape:
                raise CheckpointInvalid(f"{_EARLIER}{name} does not belong to this stage")
        super().load_state_tensors({name: t for name, t in tensors.items() if not name.startswith(_EARLIER)})
        self._late_graphs.clear()
        self._earlier = {name: tensor.to(self.device, copy=True) for name, tensor in earlier.items()}
