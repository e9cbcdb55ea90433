"""Messages of small runs for tests of the door: made as a peer makes them, ready to be spoiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from resbm_pb import stage_pb2

from stage_server.codec import Packed, backward_encoding, clip_for, forward_encoding, pack
from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.errors import (
    FrameError,
)
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.wire import (
    TokenIds,
    WireFormat,
)

CODECS = ("none", "bf16", "int8", "int4")
UINT64_MAX, UINT32_MAX = 2**64 - 1, 2**32 - 1


@cache
def config(
    codec: str = "int4", batch: int = 2, tokens: int = 5, width: int = 3, *, vocab_size: int = 61, zstd_level: int = 1
) -> StageConfig:
    return StageConfig(
        stages=2,
        model=ModelConfig(
            vocab_size=vocab_size, hidden_size=max(4, 2 * width), num_hidden_layers=2, num_attention_heads=1,
            num_key_value_heads=1,
        ),
        bottleneck=BottleneckConfig(width=width),
        codec=CodecConfig(forward=codec, backward=codec, zstd_level=zstd_level),
        plan=PlanConfig(batch=batch, tokens=tokens),
    )  # fmt: skip


def train(step: int = 1, index: int = 0) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def evaluate(step: int = 1, index: int = 0) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.EVALUATE, index)


def noise(config: StageConfig, seed: int = 0) -> torch.Tensor:
    shape = (config.plan.batch, config.plan.tokens, config.latent_width)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def packed_latents(config: StageConfig, seed: int = 0) -> Packed:
    encoding = forward_encoding(config.codec)
    return pack(noise(config, seed), encoding, clip_for(config.codec, encoding))


def packed_gradients(config: StageConfig, seed: int = 0) -> Packed:
    encoding = backward_encoding(config.codec)
    return pack(noise(config, seed) * 1e-3, encoding, clip_for(config.codec, encoding))


def some_ids(config: StageConfig, seed: int = 0) -> TokenIds:
    shape = (config.plan.batch, config.plan.tokens + 1)
    ids = np.random.default_rng(seed).integers(0, config.model.vocab_size, shape, dtype=np.int32)
    ids.flat[0] = config.model.vocab_size - 1
    return ids


def latents_message(config: StageConfig, name: MicrobatchId | None = None, seed: int = 0) -> stage_pb2.Latents:
    wire = WireFormat(config)
    ids = wire.encode_token_ids(some_ids(config, seed))
    return wire.encode_latents(name or train(), ids, packed_latents(config, seed))


def gradients_message(config: StageConfig, name: MicrobatchId | None = None, seed: int = 0) -> stage_pb2.Gradients:
    name = name or train()
    gradients = packed_gradients(config, seed) if name.kind is MicrobatchKind.TRAIN else None
    return WireFormat(config).encode_gradients(name, 1.5, gradients)


def code_of(refused: Callable[[], object]) -> int:
    """The stable code with which something is refused."""
    with pytest.raises(FrameError) as error:
        refused()
    assert type(error.value).code == error.value.code
    assert error.value.cause
    assert error.value.remedy
    return int(error.value.code)
