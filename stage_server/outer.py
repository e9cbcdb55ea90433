"""The outer step of DiLoCo (arXiv 2311.08105): Nesterov momentum on the replicas' mean pseudo-gradient.

    g = Σ w_i (θ − θ_i) / Σ w_i      θ: weights of the newest outer step; θ_i: replica i's own;
    m ← μ m + g                      w_i: microbatches that it has trained on since
    θ ← θ − η (g + μ m)              as torch.optim.SGD(nesterov=True)

Every operation is rounded by itself and no two are fused, so that machines of different kinds get the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stage_server.errors import CheckpointInvalid

_WEIGHT, _MOMENTUM = "weight.", "momentum."


class OuterOptimizer:
    """What the replicas of a stage have in common: weights and momentum of the newest outer step, by parameter.

    Args:
        weights: what the run starts from; copied.
        learning_rate: η.
        momentum: μ.
    """

    def __init__(self, weights: Mapping[str, Tensor], learning_rate: float, momentum: float) -> None:
        self._learning_rate, self._momentum = learning_rate, momentum
        self.weights = {name: weight.detach().clone() for name, weight in weights.items()}
        self._momenta = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor]) -> None:
        """One outer step. `gradients`: g, by parameter."""
        for name, weight in self.weights.items():
            gradient, momentum = gradients[name], self._momenta[name]
            momentum.mul_(self._momentum).add_(gradient)
            weight.sub_((gradient + momentum * self._momentum) * self._learning_rate)

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state by stable name."""
        weights = {_WEIGHT + name: weight for name, weight in self.weights.items()}
        return weights | {_MOMENTUM + name: momentum for name, momentum in self._momenta.items()}

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointInvalid unless these are what `state_tensors` would give, by name and shape."""
        own = self.state_tensors()
        if wrong := own.keys() ^ tensors.keys():
            raise CheckpointInvalid(f"the outer step's state and the stage differ in {min(wrong)}")
        for name, tensor in own.items():
            if tensors[name].shape != tensor.shape:
                raise CheckpointInvalid(f"outer {name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}")

    @torch.no_grad()
    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replaces the state by copies of the tensors. Raises CheckpointInvalid; nothing has changed then."""
        self.check(tensors)
        for name, tensor in self.state_tensors().items():
            tensor.copy_(tensors[name])
