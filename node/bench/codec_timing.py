"""Timing and memory of the codec and of the wire format, on one thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from resbm_pb import stage_pb2

from node import resident
from node.bench.codec import GROWTH_CALLS, Plan, Shape
from node.bench.common import Spread
from node.bench.tensors import gradients_like, latents_like, zipf_ids
from stage_server.codec import Encoding, Packed, clip_for, pack, unpack
from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.wire import WireFormat

_NAME = MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, 0)
_CODECS = {"INT4": "int4", "INT8": "int8", "BF16": "bf16", "FP32": "none"}


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Of one operation, beside its input and what was there before."""

    input_bytes: int  # the tensor as float32
    peak_bytes: int  # most held during a call, result included
    growth_bytes: int  # still resident after GROWTH_CALLS calls


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation of one shape."""

    seconds_per_call: Spread
    memory: MemoryUse | None  # None: this system does not tell


@contextmanager
def one_thread() -> Iterator[None]:
    """Computes with one thread within."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Subject:
    """A tensor of one shape in one encoding, and all that is done with it."""

    def __init__(self, shape: Shape, direction: str, encoding: Encoding) -> None:
        codec = _CODECS[encoding.name[:4]]
        self._config = StageConfig(
            stages=2,
            model=ModelConfig(
                vocab_size=32768 if shape.hidden >= 4096 else 2048,
                hidden_size=shape.hidden,
                num_attention_heads=1,
                num_key_value_heads=1,
            ),
            bottleneck=BottleneckConfig(width=shape.width),
            codec=CodecConfig(forward=codec, backward=codec),
            plan=PlanConfig(batch=shape.batch, tokens=shape.tokens),
        )
        self._encoding = encoding
        self._clip = clip_for(self._config.codec, encoding)
        self._wire = WireFormat(self._config)
        self._is_forward = direction == "forward"
        size = (shape.batch, shape.tokens, shape.width)
        self._x_BTh = latents_like(size, seed=0) if self._is_forward else gradients_like(size, seed=0)
        self._ids = zipf_ids((shape.batch, shape.tokens + 1), self._config.model.vocab_size, seed=0)
        self._packed = self._pack()
        self._frame = self._encode()

    def measure(self, plan: Plan) -> dict[str, Measured]:
        """Every operation, by name."""
        operations: dict[str, Callable[[], object]] = {
            "pack": self._pack,
            "unpack": lambda: unpack(self._packed, self._clip),
            "encode": self._encode,
            "decode": self._decode,
        }
        return {
            name: Measured(seconds_per_call(operation, plan), memory_use(operation, self._x_BTh.nbytes))
            for name, operation in operations.items()
        }

    def _pack(self) -> Packed:
        return pack(self._x_BTh, self._encoding, self._clip)

    def _encode(self) -> bytes:
        if self._is_forward:
            ids = self._wire.encode_token_ids(self._ids)
            latents = stage_pb2.LatentsFrame(microbatches=[self._wire.encode_latents(_NAME, ids, self._packed)])
            return stage_pb2.UpstreamFrame(latents=latents).SerializeToString()
        gradients = stage_pb2.GradientsFrame(microbatches=[self._wire.encode_gradients(_NAME, 1.0, self._packed)])
        return stage_pb2.DownstreamFrame(gradients=gradients).SerializeToString()

    def _decode(self) -> object:
        if self._is_forward:
            latents = stage_pb2.UpstreamFrame.FromString(self._frame).latents
            return self._wire.decode_latents(latents.microbatches[0])
        gradients = stage_pb2.DownstreamFrame.FromString(self._frame).gradients
        return self._wire.decode_gradients(gradients.microbatches[0])


def seconds_per_call(operation: Callable[[], object], plan: Plan) -> Spread:
    """As many calls as fill the plan's time, several times over."""
    calls = 1
    while (seconds := _timed(operation, calls)) < 0.2 * plan.seconds_per_repeat:
        calls *= 2
    calls = max(1, round(calls * plan.seconds_per_repeat / seconds))
    return Spread.of([_timed(operation, calls) / calls for _ in range(plan.repeats)])


def _timed(operation: Callable[[], object], calls: int) -> float:
    started = time.perf_counter()
    for _ in range(calls):
        operation()
    return time.perf_counter() - started


def memory_use(operation: Callable[[], object], input_bytes: int) -> MemoryUse | None:
    """Resident memory around many calls. Freed memory goes back to the system first, so that all of it is seen."""
    forget_peak = Path("/proc/self/clear_refs")
    if not forget_peak.exists():
        return None
    resident.give_back_freed()
    forget_peak.write_text("5")
    before, mapped = resident.now_bytes(), resident.mapped_bytes()
    for _ in range(GROWTH_CALLS):
        operation()
    peak = resident.peak_bytes()
    before += max(0, resident.mapped_bytes() - mapped)  # code that was read from disk meanwhile is held by no call
    resident.give_back_freed()
    return MemoryUse(input_bytes, max(0, peak - before), max(0, resident.now_bytes() - before))
