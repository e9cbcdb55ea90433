"""DiLoCo's outer step once more, in numpy and with nothing of ours: what the real one is held against."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
from torch import Tensor

Values = npt.NDArray[np.float32]


class Nesterov:
    """Outer weights and momentum of one stage, by parameter, float32."""

    def __init__(self, weights: Mapping[str, Tensor], learning_rate: float, momentum: float) -> None:
        self.weights = {name: weight.numpy().copy() for name, weight in weights.items()}
        self.momenta = {name: np.zeros_like(weight) for name, weight in self.weights.items()}
        self.learning_rate, self.momentum = np.float32(learning_rate), np.float32(momentum)

    def gradient(self, moved: Mapping[str, Tensor]) -> dict[str, Values]:
        """What a replica has moved by."""
        return {name: weight - moved[name].numpy() for name, weight in self.weights.items()}

    def mean(self, moved: list[Mapping[str, Tensor]], microbatches: list[int]) -> dict[str, Values]:
        """What several have moved by on average, each counting as much as it has trained on."""
        means = {}
        for name in self.weights:
            parts = [
                self.gradient(replica)[name] * np.float32(count)
                for replica, count in zip(moved, microbatches, strict=True)
            ]
            means[name] = np.sum(parts, axis=0, dtype=np.float32) / np.float32(sum(microbatches))
        return means

    def step(self, gradients: Mapping[str, Values]) -> None:
        for name, gradient in gradients.items():
            self.momenta[name] = self.momenta[name] * self.momentum + gradient
            moved_by = (gradient + self.momenta[name] * self.momentum) * self.learning_rate
            self.weights[name] = self.weights[name] - moved_by
