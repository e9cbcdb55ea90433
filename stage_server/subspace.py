"""Subspace Models (arXiv 2506.01260), a rival that the convergence benchmark compares with.

The stream is x = e(ids) + U c: a fixed token embedding e plus a point of a fixed subspace, the same for all stages.
Every block before the last boundary writes into that subspace only, so a boundary carries the k coordinates c and
nothing is lost. The paper's modified optimizer is not rebuilt: weights are projected in the forward pass, which gives
their gradients the same projection.

Shapes: D model width, k latent width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stage_server.config import StageConfig

_WRITERS = ("self_attn.o_proj", "mlp.down_proj")
"""What writes into the stream, in a layer of transformers' Llama and Qwen3."""


def basis_Dk(config: StageConfig) -> Tensor:
    """U: orthonormal columns, a pure function of the run's seed; float32 on the CPU."""
    noise_Dk = torch.randn(config.model.hidden_size, config.latent_width, generator=_generator(config, "basis"))
    basis_Dk: Tensor = torch.linalg.qr(noise_Dk).Q.contiguous()
    return basis_Dk


def fixed_embedding_VD(config: StageConfig) -> Tensor:
    """e: the part of the embedding that is never trained, a pure function of the run's seed."""
    table_VD = torch.randn(config.model.vocab_size, config.model.hidden_size, generator=_generator(config, "embedding"))
    return table_VD * config.model.initializer_range


def project(x_D: Tensor, basis_Dk: Tensor) -> Tensor:
    """The part of vectors [..., D] that lies in the subspace."""
    basis_Dk = basis_Dk.to(x_D.dtype)
    return (x_D @ basis_Dk) @ basis_Dk.mT


def confine(layers: Iterable[nn.Module], basis_Dk: Tensor) -> None:
    """From now on the layers write into the subspace only."""

    def projected(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return project(output, basis_Dk)

    for layer in layers:
        for name in _WRITERS:
            layer.get_submodule(name).register_forward_hook(projected)


def _generator(config: StageConfig, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{config.seed}/subspace/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
