"""Microbatches as protobuf messages, and the door where messages from outside are refused.

Everything is checked here once: names, shapes, sizes, encodings, checksums, token ids. Decompression is bounded by the
size that the shape demands, so that a small frame can never become a large buffer. What passes is trusted inside.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import zstandard
from resbm_pb import stage_pb2, tensors_pb2

from stage_server.codec import (
    Encoding,
    Packed,
    backward_encoding,
    forward_encoding,
    scales_size,
    unpack,
    values_size,
)
from stage_server.config import StageConfig
from stage_server.errors import (
    CorruptFrame,
    NotFinite,
    Oversized,
    ProtocolViolation,
    Truncated,
    UnknownCodec,
    WrongShape,
    WrongToken,
)
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.profile import Profile, Work

PROTOCOL_VERSION = 2
DENSE_BYTES_PER_VALUE = 2  # bf16, what the uncompressed activations would have cost
MAX_LOSS = 1e4  # nats per token; anything above is not a loss
MAX_SCALE_CODE = 220  # 2^5: gradients of a mean loss are far below 1; the codec's own top leaves room to amplify them
_ZSTD_OVERHEAD_BYTES = 256  # more than a frame around incompressible bytes has
_WORTH_COMPRESSING_BYTES = 64  # a zstandard frame has about 10 bytes of its own
_WORTH_KEEPING = 0.97  # decompression is not free: below 3 % saved, bytes go as they are

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class LatentMicrobatch:
    """One microbatch as it came from upstream: token ids [B, T+1] and latents [B, T, h]."""

    name: MicrobatchId
    token_ids: TokenIds
    latents: Packed
    packed_token_ids: tensors_pb2.TokenIds  # as they came, to be passed on unchanged


@dataclass(frozen=True, slots=True)
class GradientMicrobatch:
    """One microbatch as it came from downstream; `gradients` [B, T, h] is None for an evaluation."""

    name: MicrobatchId
    loss: float
    gradients: Packed | None


class WireFormat:
    """Encodes and decodes the microbatches of one run. `profile` is told the time that takes."""

    def __init__(self, config: StageConfig, profile: Profile | None = None) -> None:
        self._profile = profile or Profile()
        self.batch = config.plan.batch
        self.tokens = config.plan.tokens
        self.width = config.latent_width
        self.vocab_size = config.model.vocab_size
        self.forward = forward_encoding(config.codec)
        self.backward = backward_encoding(config.codec)
        self.dense_bytes = self.batch * self.tokens * config.model.hidden_size * DENSE_BYTES_PER_VALUE
        self._level = config.codec.zstd_level
        self._token_bits = max(1, (self.vocab_size - 1).bit_length())
        self._wide_token = np.dtype("<u2" if self._token_bits <= 16 else "<u4")

    @property
    def max_frame_bytes(self) -> int:
        """No honest frame with one microbatch is larger: 4 bytes a value, a scale a token, ids, headers."""
        num_tokens = self.batch * (self.tokens + 1)
        return num_tokens * (4 * self.width + 1 + 4) + 4096

    # -- latents ------------------------------------------------------------------------------------------------

    def encode_token_ids(self, token_ids: TokenIds) -> tensors_pb2.TokenIds:
        """[B, T+1] ids as the smaller of: packed at ceil(log2 V) bits, or 16/32-bit compressed."""
        with self._profile.span(Work.ENCODE):
            bits = self._token_bits
            packed = _pack_bits(token_ids.reshape(-1), bits)
            message = tensors_pb2.TokenIds(batch=token_ids.shape[0], length=token_ids.shape[1], bits=bits, data=packed)
            if self._level:
                wide = self._wide_token
                compressed = zstandard.compress(token_ids.astype(wide).tobytes(), self._level)
                if len(compressed) < len(packed):
                    message.bits, message.data = 8 * wide.itemsize, compressed
                    message.compression = tensors_pb2.COMPRESSION_ZSTD
            return message

    def encode_latents(self, name: MicrobatchId, token_ids: tensors_pb2.TokenIds, latents: Packed) -> stage_pb2.Latents:
        """The message for one microbatch on its way forward."""
        with self._profile.span(Work.ENCODE):
            message = stage_pb2.Latents(
                step=name.step,
                kind=_wire_kind(name),
                index=name.index,
                token_ids=token_ids,
                latents=self._encode_packed(latents, compress_values=True),
            )
            message.checksum = _latents_checksum(message)
            return message

    def decode_latents(self, message: stage_pb2.Latents) -> LatentMicrobatch:
        """Validates and unpacks; raises a FrameError that says what is wrong."""
        with self._profile.span(Work.DECODE):
            name = decode_name(message.step, message.kind, message.index)
            if message.checksum != _latents_checksum(message):
                raise CorruptFrame(f"the checksum of the latents of {name} does not match")
            packed_token_ids = tensors_pb2.TokenIds()
            packed_token_ids.CopyFrom(message.token_ids)  # a view would keep the whole frame alive
            return LatentMicrobatch(
                name,
                self._decode_token_ids(message.token_ids),
                self._decode_packed(message.latents, self.forward),
                packed_token_ids,
            )

    # -- gradients ----------------------------------------------------------------------------------------------

    def encode_gradients(self, name: MicrobatchId, loss: float, gradients: Packed | None) -> stage_pb2.Gradients:
        """The message for one microbatch on its way back."""
        with self._profile.span(Work.ENCODE):
            message = stage_pb2.Gradients(step=name.step, kind=_wire_kind(name), index=name.index, loss=loss)
            if gradients is not None:
                # 4-bit gradient codes are nearly incompressible (0.95 of their size); their scales are not.
                message.gradients.CopyFrom(self._encode_packed(gradients, compress_values=False))
            message.checksum = _gradients_checksum(message)
            return message

    def decode_gradients(self, message: stage_pb2.Gradients) -> GradientMicrobatch:
        """Validates and unpacks; raises a FrameError that says what is wrong."""
        with self._profile.span(Work.DECODE):
            name = decode_name(message.step, message.kind, message.index)
            if message.checksum != _gradients_checksum(message):
                raise CorruptFrame(f"the checksum of the gradients of {name} does not match")
            if not (math.isfinite(message.loss) and abs(message.loss) <= MAX_LOSS):
                raise NotFinite(f"the loss of {name} is {message.loss}")
            if message.HasField("gradients") != (name.kind is MicrobatchKind.TRAIN):
                raise ProtocolViolation(f"gradients go with training and only with it, not so for {name}")
            gradients = self._decode_packed(message.gradients, self.backward) if message.HasField("gradients") else None
            return GradientMicrobatch(name, message.loss, gradients)

    # -- parts --------------------------------------------------------------------------------------------------

    def _encode_packed(self, packed: Packed, *, compress_values: bool) -> tensors_pb2.PackedTensor:
        level = self._level
        values, values_compression = _squeeze(packed.values, level if compress_values else 0)
        scales, scales_compression = _squeeze(packed.scales, level)
        return tensors_pb2.PackedTensor(
            encoding=int(packed.encoding),  # type: ignore[arg-type]
            batch=packed.batch,
            tokens=packed.tokens,
            width=packed.width,
            values=values,
            scales=scales,
            values_compression=values_compression,
            scales_compression=scales_compression,
        )

    def _decode_packed(self, message: tensors_pb2.PackedTensor, encoding: Encoding) -> Packed:
        if int(message.encoding) != encoding:
            raise UnknownCodec(f"encoding {message.encoding} where the run has {encoding.name} ({int(encoding)})")
        shape = (message.batch, message.tokens, message.width)
        if shape != (self.batch, self.tokens, self.width):
            raise WrongShape(f"a tensor of shape {shape} where the run has {(self.batch, self.tokens, self.width)}")
        values = _unsqueeze(message.values, message.values_compression, values_size(encoding, *shape))
        scales = _unsqueeze(message.scales, message.scales_compression, scales_size(encoding, *shape))
        if scales and max(scales) > MAX_SCALE_CODE:
            raise NotFinite(f"a gradient beyond 32 in magnitude (scale code {max(scales)})")
        packed = Packed(encoding, *shape, values, scales)
        if encoding in (Encoding.FP32, Encoding.BF16):
            unpack(packed, 1.0)  # refuses NaN, infinity and absurd numbers; the grids have none
        return packed

    def _decode_token_ids(self, message: tensors_pb2.TokenIds) -> TokenIds:
        shape = (message.batch, message.length)
        if shape != (self.batch, self.tokens + 1):
            raise WrongShape(f"token ids of shape {shape} where the run has {(self.batch, self.tokens + 1)}")
        num_ids = self.batch * (self.tokens + 1)
        zstd = message.compression == tensors_pb2.COMPRESSION_ZSTD
        bits = 8 * self._wide_token.itemsize if zstd else self._token_bits
        if message.bits != bits:
            raise UnknownCodec(f"token ids of {message.bits} bits where the run has {bits}")
        data = _unsqueeze(message.data, message.compression, math.ceil(num_ids * bits / 8))
        ids = np.frombuffer(data, self._wide_token).astype(np.int64) if zstd else _unpack_bits(data, bits, num_ids)
        if int(ids.max()) >= self.vocab_size:
            raise WrongToken(f"token id {int(ids.max())} in a vocabulary of {self.vocab_size}")
        return ids.astype(np.int32).reshape(shape)


def decode_name(step: int, kind: int, index: int) -> MicrobatchId:
    """The name of a microbatch from its fields on the wire; raises ProtocolViolation for an unknown kind."""
    try:
        return MicrobatchId(StepIndex(step), MicrobatchKind(kind), index)
    except ValueError:
        raise ProtocolViolation(f"microbatch kind {kind} is unknown") from None


def encode_held(names: Sequence[MicrobatchId]) -> list[stage_pb2.HeldMicrobatch]:
    """Names of microbatches for the handshake."""
    return [stage_pb2.HeldMicrobatch(step=n.step, kind=_wire_kind(n), index=n.index) for n in names]


def decode_held(messages: Sequence[stage_pb2.HeldMicrobatch]) -> list[MicrobatchId]:
    """The counterpart of encode_held."""
    return [decode_name(m.step, m.kind, m.index) for m in messages]


def _wire_kind(name: MicrobatchId) -> stage_pb2.MicrobatchKind.ValueType:
    return (
        stage_pb2.MICROBATCH_KIND_TRAIN if name.kind is MicrobatchKind.TRAIN else (stage_pb2.MICROBATCH_KIND_EVALUATE)
    )


def _latents_checksum(message: stage_pb2.Latents) -> int:
    name = struct.pack("<QBI", message.step, message.kind & 0xFF, message.index)
    return _crc(name, message.token_ids.data, message.latents.values, message.latents.scales)


def _gradients_checksum(message: stage_pb2.Gradients) -> int:
    name = struct.pack("<QBIf", message.step, message.kind & 0xFF, message.index, message.loss)
    return _crc(name, message.gradients.values, message.gradients.scales)


def _crc(*parts: bytes) -> int:
    checksum = 0
    for part in parts:
        checksum = zlib.crc32(part, checksum)
    return checksum


def _squeeze(data: bytes, level: int) -> tuple[bytes, tensors_pb2.Compression.ValueType]:
    if level and len(data) >= _WORTH_COMPRESSING_BYTES:
        compressed = zstandard.compress(data, level)
        if len(compressed) < _WORTH_KEEPING * len(data):
            return compressed, tensors_pb2.COMPRESSION_ZSTD
    return data, tensors_pb2.COMPRESSION_NONE


def _unsqueeze(data: bytes, compression: int, size: int) -> bytes:
    """The plain bytes, of which there must be exactly `size`; never allocates more than that."""
    if len(data) > size + _ZSTD_OVERHEAD_BYTES:  # padding would be kept and passed on
        raise Oversized(f"a payload of {len(data)} bytes where the shape allows {size}")
    if compression == tensors_pb2.COMPRESSION_ZSTD:
        data = _decompress(data, size)
    elif compression != tensors_pb2.COMPRESSION_NONE:
        raise UnknownCodec(f"compression {compression} is unknown")
    if len(data) > size:
        raise Oversized(f"a payload of {len(data)} bytes where the shape allows {size}")
    if len(data) < size:
        raise Truncated(f"a payload of {len(data)} bytes where the shape demands {size}")
    return data


def _decompress(data: bytes, size: int) -> bytes:
    try:
        stated = zstandard.frame_content_size(data)
        if stated < 0:
            raise CorruptFrame("a zstandard payload does not state its size")
        if stated > size:
            raise Oversized(f"a payload of {stated} bytes where the shape allows {size}")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=size, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CorruptFrame(f"a zstandard payload cannot be read: {error}") from error


def _pack_bits(ids: npt.NDArray[np.int32], bits: int) -> bytes:
    columns = (ids[:, None] >> np.arange(bits, dtype=np.int32)) & 1
    return np.packbits(columns.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


def _unpack_bits(data: bytes, bits: int, num_ids: int) -> npt.NDArray[np.int64]:
    columns = np.unpackbits(np.frombuffer(data, np.uint8), count=num_ids * bits, bitorder="little")
    weights = np.left_shift(np.int64(1), np.arange(bits, dtype=np.int64))
    ids: npt.NDArray[np.int64] = columns.reshape(num_ids, bits).astype(np.int64) @ weights
    return ids
