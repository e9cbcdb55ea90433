"""Stand-ins for what crosses a boundary, where no model of the size can be trained here.

Latents leave an RMSNorm, so they have unit RMS; normal ones are as hard to compress as any with that. Gradients of
tokens differ in magnitude by a factor of 40 and more: a log-normal one for each token.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Size = tuple[int, int, int]
"""B, T, h."""

_GRADIENT_SCALE = 1e-6
_GRADIENT_SPREAD = 1.0  # standard deviation of the logarithm: 95 % of tokens within a factor of 50


def latents_like(size: Size, *, seed: int) -> Tensor:
    """Float32 [B, T, h], every token with unit RMS."""
    x_BTh = torch.randn(size, generator=torch.Generator().manual_seed(seed))
    return x_BTh / x_BTh.square().mean(-1, keepdim=True).sqrt()


def gradients_like(size: Size, *, seed: int) -> Tensor:
    """Float32 [B, T, h], every token with a magnitude of its own."""
    generator = torch.Generator().manual_seed(seed)
    x_BTh = torch.randn(size, generator=generator)
    magnitudes_BT1 = torch.randn((*size[:2], 1), generator=generator).mul_(_GRADIENT_SPREAD).exp_()
    return x_BTh * magnitudes_BT1 * _GRADIENT_SCALE


def zipf_ids(size: tuple[int, int], vocab_size: int, *, seed: int) -> npt.NDArray[np.int32]:
    """Token ids as frequent as words are: the k-th with probability proportional to 1/k."""
    weights = 1.0 / np.arange(1, vocab_size + 1)
    generator = np.random.default_rng(seed)
    return generator.choice(vocab_size, size=size, p=weights / weights.sum()).astype(np.int32)
