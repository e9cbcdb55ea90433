"""Real frames counted to the byte: what is values, scales, token ids, and all the rest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from resbm_pb import stage_pb2

from stage_server.codec import Packed
from stage_server.config import StageConfig
from stage_server.ids import MicrobatchId
from stage_server.wire import WireFormat

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Bytes:
    """Bytes of one direction of one link, by what they are."""

    values: int = 0
    scales: int = 0
    ids: int = 0
    headers: int = 0  # names, shapes, checksums, protobuf's tags, and one status frame a microbatch

    @property
    def total(self) -> int:
        return self.values + self.scales + self.ids + self.headers

    def plus(self, other: Bytes) -> Bytes:
        return Bytes(
            self.values + other.values,
            self.scales + other.scales,
            self.ids + other.ids,
            self.headers + other.headers,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """What some microbatches cost on one link."""

    num_tokens: int = 0
    dense_bytes: int = 0  # bf16 activations and gradients, both directions
    forward: Bytes = Bytes()
    backward: Bytes = Bytes()

    @property
    def compression(self) -> float:
        return self.dense_bytes / (self.forward.total + self.backward.total)

    def plus(self, other: Traffic) -> Traffic:
        return Traffic(
            self.num_tokens + other.num_tokens,
            self.dense_bytes + other.dense_bytes,
            self.forward.plus(other.forward),
            self.backward.plus(other.backward),
        )


class FrameCounter:
    """Serialises microbatches as a link does, one a frame, and counts. Decodes each frame again, as a check."""

    def __init__(self, config: StageConfig) -> None:
        self._wire = WireFormat(config)
        self._num_sent = 0
        self.traffic = Traffic()

    def forward(self, name: MicrobatchId, token_ids: TokenIds, latents: Packed) -> None:
        """One microbatch's way to the next stage."""
        wire = self._wire
        message = wire.encode_latents(name, wire.encode_token_ids(token_ids), latents)
        sent = stage_pb2.LatentsFrame(microbatches=[message], sequence=self._next_sequence())
        frame = stage_pb2.UpstreamFrame(latents=sent).SerializeToString()
        body = stage_pb2.UpstreamFrame.FromString(frame).latents.microbatches[0]
        wire.decode_latents(body)
        status = len(stage_pb2.UpstreamFrame(status=self._status(name)).SerializeToString())
        values, scales, ids = len(body.latents.values), len(body.latents.scales), len(body.token_ids.data)
        count = Bytes(values, scales, ids, len(frame) - values - scales - ids + status)
        self.traffic = self.traffic.plus(Traffic(wire.batch * wire.tokens, wire.dense_bytes, forward=count))

    def backward(self, name: MicrobatchId, loss: float, gradients: Packed) -> None:
        """One microbatch's way back."""
        message = self._wire.encode_gradients(name, loss, gradients)
        sent = stage_pb2.GradientsFrame(microbatches=[message], sequence=self._next_sequence())
        frame = stage_pb2.DownstreamFrame(gradients=sent).SerializeToString()
        body = stage_pb2.DownstreamFrame.FromString(frame).gradients.microbatches[0]
        self._wire.decode_gradients(body)
        status = len(stage_pb2.DownstreamFrame(status=self._status(name)).SerializeToString())
        values, scales = len(body.gradients.values), len(body.gradients.scales)
        count = Bytes(values, scales, 0, len(frame) - values - scales + status)
        self.traffic = self.traffic.plus(Traffic(0, self._wire.dense_bytes, backward=count))

    def _next_sequence(self) -> int:
        self._num_sent += 1
        return self._num_sent

    def _status(self, name: MicrobatchId) -> stage_pb2.LinkStatus:
        """Links send one a second and one a commit; one for each microbatch is more than that."""
        return stage_pb2.LinkStatus(
            frames_sent=self._num_sent,
            committed_step=name.step,
            durable_step=name.step,
            sequence=self._num_sent,
        )
