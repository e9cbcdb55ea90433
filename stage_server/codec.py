"""Numbers to bytes and back: how latents and their gradients are written on the wire.

Shapes: B batch, T tokens, h latent width. Every grid is mid-rise: with L levels over [-limit, limit], the code of x is
clamp(floor(x / limit * L/2) + L/2, 0, L-1) and the value of a code q is (q - L/2 + 1/2) * 2 * limit / L. There is no
level at zero. Fixed grids take their limit from the run; token grids take it from an 8-bit logarithmic scale per token.
"""

from __future__ import annotations

import enum
import functools
import hashlib
from dataclasses import dataclass
from typing import Final

import torch
from resbm_pb import tensors_pb2 as pb
from torch import Tensor

from stage_server.config import CodecConfig
from stage_server.errors import NotFinite, Oversized, Truncated, UnknownCodec, WrongShape
from stage_server.ids import MicrobatchId

MAX_MAGNITUDE: Final = 2.0**24
"""Largest magnitude that is believed; anything above is a sign of divergence or of a broken peer."""

_ZERO_EXPONENT: Final = 200  # scale code c > 0 means 2^((c - 200) / 4): 1e-15 to 1.4e4


class Encoding(enum.IntEnum):
    """How the numbers are written. The values are those of the wire (resbm.v1.Encoding)."""

    FP32 = pb.ENCODING_FP32
    BF16 = pb.ENCODING_BF16
    INT8_FIXED = pb.ENCODING_INT8_FIXED
    INT4_FIXED = pb.ENCODING_INT4_FIXED
    INT8_TOKEN = pb.ENCODING_INT8_TOKEN
    INT4_TOKEN = pb.ENCODING_INT4_TOKEN
    INT2_FIXED = pb.ENCODING_INT2_FIXED
    INT2_TOKEN = pb.ENCODING_INT2_TOKEN


_BITS: Final = {
    Encoding.FP32: 32,
    Encoding.BF16: 16,
    Encoding.INT8_FIXED: 8,
    Encoding.INT4_FIXED: 4,
    Encoding.INT8_TOKEN: 8,
    Encoding.INT4_TOKEN: 4,
    Encoding.INT2_FIXED: 2,
    Encoding.INT2_TOKEN: 2,
}
_FORWARD: Final = {
    "none": Encoding.FP32,
    "bf16": Encoding.BF16,
    "int8": Encoding.INT8_FIXED,
    "int4": Encoding.INT4_FIXED,
    "int4_token": Encoding.INT4_TOKEN,
    "int2": Encoding.INT2_FIXED,
}
_BACKWARD: Final = {
    "none": Encoding.FP32,
    "bf16": Encoding.BF16,
    "int8": Encoding.INT8_TOKEN,
    "int4": Encoding.INT4_TOKEN,
    "int2": Encoding.INT2_TOKEN,
}
_TOKEN_SCALED: Final = frozenset({Encoding.INT8_TOKEN, Encoding.INT4_TOKEN, Encoding.INT2_TOKEN})
_REAL: Final = frozenset({Encoding.FP32, Encoding.BF16})


@dataclass(frozen=True, slots=True)
class Packed:
    """A tensor [batch, tokens, width] as bytes, not yet compressed (resbm.v1.PackedTensor)."""

    encoding: Encoding
    batch: int
    tokens: int
    width: int
    values: bytes
    scales: bytes

    @property
    def num_bytes(self) -> int:
        """Values and scales, in bytes."""
        return len(self.values) + len(self.scales)


def forward_encoding(codec: CodecConfig) -> Encoding:
    """How a run writes latents."""
    return _FORWARD[codec.forward]


def backward_encoding(codec: CodecConfig) -> Encoding:
    """How a run writes the gradients of latents."""
    return _BACKWARD[codec.backward]


def clip_for(codec: CodecConfig, encoding: Encoding) -> float:
    """The limit of a fixed grid; the other encodings ignore it."""
    return {Encoding.INT8_FIXED: codec.clip_int8, Encoding.INT2_FIXED: codec.clip_int2}.get(encoding, codec.clip)


def values_size(encoding: Encoding, batch: int, tokens: int, width: int) -> int:
    """Bytes of the values of a [batch, tokens, width] tensor; below 8 bits the last byte is filled with zero codes."""
    return (batch * tokens * width * _BITS[encoding] + 7) // 8


def scales_size(encoding: Encoding, batch: int, tokens: int, width: int) -> int:  # one signature with values_size
    """Bytes of the scales: one per token for the token-scaled encodings, whatever the width; none for the others."""
    return batch * tokens if encoding in _TOKEN_SCALED else 0


def rounding_generator(codec: CodecConfig, run_id: str, name: MicrobatchId, boundary: int) -> torch.Generator | None:
    """The randomness of one gradient's stochastic rounding: a pure function of its name. None: round to nearest."""
    if codec.rounding == "nearest":
        return None
    text = f"{run_id}/{name.step}/{int(name.kind)}/{name.index}/{boundary}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")
    return torch.Generator().manual_seed(seed)


def pack(x_BTh: Tensor, encoding: Encoding, clip: float, generator: torch.Generator | None = None) -> Packed:
    """Write a tensor. Quantises on the tensor's device and moves only the bytes.

    Args:
        x_BTh: floating point, any device, [B, T, h].
        encoding: how to write it.
        clip: limit of the fixed grids; values beyond it get the outermost level.
        generator: rounds to a neighbouring level at random, without bias inside the grid; None rounds to nearest.

    Raises:
        NotFinite: NaN, infinity, or a magnitude above `MAX_MAGNITUDE` (for token grids: above their top scale).
    """
    batch, tokens, width = x_BTh.shape
    x_BTh = x_BTh.detach().float()
    scales = b""
    if encoding in _TOKEN_SCALED:
        codes_BT = _scale_codes(x_BTh.abs().amax(-1))
        steps_BT1 = _inverse_scales(x_BTh.device).index_select(0, codes_BT.flatten().int()).view(batch, tokens, 1)
        scales = _to_bytes(codes_BT)
        values = _pack_grid(x_BTh * steps_BT1, _BITS[encoding], generator)
    else:
        _refuse_absurd(x_BTh)
        if encoding in _REAL:
            values = _to_bytes(x_BTh if encoding is Encoding.FP32 else x_BTh.bfloat16())
        else:
            values = _pack_grid(x_BTh * (1.0 / clip), _BITS[encoding], generator)
    return Packed(encoding, batch, tokens, width, values, scales)


def unpack(packed: Packed, clip: float, device: torch.device | str = "cpu") -> Tensor:
    """Read a tensor: float32 [B, T, h] on `device`. Moves the bytes and computes there.

    Raises:
        UnknownCodec: an encoding this version does not know.
        WrongShape: an empty dimension.
        Truncated, Oversized: more or fewer bytes than shape and encoding demand.
        NotFinite: NaN, infinity or an absurd magnitude.
    """
    encoding = _known(packed.encoding)
    batch, tokens, width = packed.batch, packed.tokens, packed.width
    if min(batch, tokens, width) < 1:
        raise WrongShape(f"tensor of shape [{batch}, {tokens}, {width}] is empty")
    _require_size("values", len(packed.values), values_size(encoding, batch, tokens, width))
    _require_size("scales", len(packed.scales), scales_size(encoding, batch, tokens, width))
    count = batch * tokens * width
    raw = _from_bytes(packed.values, device)
    if encoding in _REAL:
        x = raw.view(torch.float32 if encoding is Encoding.FP32 else torch.bfloat16).float()
        _refuse_absurd(x)
        return x.view(batch, tokens, width)
    limit = 1.0 if encoding in _TOKEN_SCALED else clip
    x_BTh = _unpack_grid(raw, _BITS[encoding], limit)[:count].view(batch, tokens, width)
    if encoding not in _TOKEN_SCALED:
        return x_BTh
    scales = _scales(x_BTh.device).index_select(0, _from_bytes(packed.scales, device).int())
    return x_BTh.mul_(scales.view(batch, tokens, 1))


def require(packed: Packed, encoding: Encoding, batch: int, tokens: int, width: int) -> None:
    """Refuse a tensor that is not the run's: UnknownCodec for its encoding, WrongShape for its shape."""
    if _known(packed.encoding) is not encoding:
        raise UnknownCodec(f"encoding is {Encoding(packed.encoding).name}, the run's is {encoding.name}")
    if (packed.batch, packed.tokens, packed.width) != (batch, tokens, width):
        raise WrongShape(
            f"shape is [{packed.batch}, {packed.tokens}, {packed.width}], the run's is [{batch}, {tokens}, {width}]"
        )


def _known(encoding: int) -> Encoding:
    try:
        return Encoding(encoding)
    except ValueError:
        raise UnknownCodec(f"encoding {encoding} is not known") from None


def _require_size(field: str, size_bytes: int, expected_bytes: int) -> None:
    if size_bytes < expected_bytes:
        raise Truncated(f"{field} has {size_bytes} bytes, its shape demands {expected_bytes}")
    if size_bytes > expected_bytes:
        raise Oversized(f"{field} has {size_bytes} bytes, its shape allows {expected_bytes}")


def _refuse_absurd(x: Tensor) -> None:
    """aminmax hands NaN on, so one pass without a copy finds NaN, infinity and absurd magnitudes."""
    low, high = torch.aminmax(x)
    if not bool((low >= -MAX_MAGNITUDE) & (high <= MAX_MAGNITUDE)):
        raise NotFinite(f"values range from {float(low):g} to {float(high):g}, the limit is {MAX_MAGNITUDE:g}")


def _scale_codes(absmax_BT: Tensor) -> Tensor:
    """The smallest scale that holds each token: uint8 codes, ceil(4 log2(absmax)) + 200, 0 for a zero row.

    Searched in a table of exact values: log2 differs in its last bit from one processor to the next.
    """
    codes_BT = torch.bucketize(absmax_BT, _scales(absmax_BT.device)[1:], out_int32=True) + 1  # NaN sorts above all
    if bool((codes_BT > 255).any()):
        raise NotFinite(f"a token's largest magnitude is {float(absmax_BT.max()):g}, the top scale is {_TOP_SCALE:g}")
    return codes_BT.mul_(absmax_BT != 0).to(torch.uint8)


def _pack_grid(unit_BTh: Tensor, bits: int, generator: torch.Generator | None) -> bytes:
    """Codes of values scaled to [-1, 1], packed. Overwrites its argument."""
    half = 2 ** (bits - 1)
    steps = unit_BTh.mul_(half)
    if generator is not None:
        # floor(x + u - 1/2) with u uniform in [0, 1): either neighbouring level, x on average. Drawn on the generator's
        # own device, so that every device rounds alike.
        steps.add_(torch.rand(steps.shape, generator=generator, device=generator.device).to(steps.device)).sub_(0.5)
    codes = steps.floor_().add_(half).clamp_(0, 2 * half - 1).to(torch.uint8).flatten()
    return _to_bytes(codes if bits == 8 else _pack_codes(codes, bits))


def _pack_codes(codes: Tensor, bits: int) -> Tensor:
    """4-bit or 2-bit codes, two or four a byte, the earlier in the lower bits."""
    per_byte = 8 // bits
    if missing := -codes.numel() % per_byte:
        codes = torch.nn.functional.pad(codes, (0, missing))
    words = codes.view({2: torch.int16, 4: torch.int32}[per_byte])  # little-endian: the earlier code is the low byte
    packed = words.clone()
    for place in range(1, per_byte):
        packed |= words >> place * (8 - bits)
    return packed.to(torch.uint8)


def _unpack_grid(raw: Tensor, bits: int, limit: float) -> Tensor:
    """Values of packed codes, flat; those that fill the last byte too."""
    return _byte_values(bits, limit, raw.device).index_select(0, raw.int()).flatten()


@functools.lru_cache(maxsize=32)
def _byte_values(bits: int, limit: float, device: torch.device) -> Tensor:
    """What each byte stands for: [256, codes per byte]."""
    half = 2 ** (bits - 1)
    levels = (torch.arange(2 * half, dtype=torch.float32) - half + 0.5) / half * limit
    codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, bits) & 2 * half - 1
    return torch.take(levels, codes).to(device)


_TOP_SCALE: Final = 2.0 ** ((255 - _ZERO_EXPONENT) / 4)


@functools.lru_cache(maxsize=8)
def _scales(device: torch.device) -> Tensor:
    """Scale of each code, [256]; code 0 is a zero row."""
    values = [0.0] + [2.0 ** ((code - _ZERO_EXPONENT) / 4) for code in range(1, 256)]
    return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=8)
def _inverse_scales(device: torch.device) -> Tensor:
    """1 / scale of each code, [256]; 0 for a zero row."""
    scales = _scales(device)
    return scales.reciprocal().masked_fill_(scales == 0, 0.0)


def _to_bytes(x: Tensor) -> bytes:
    data: bytes = x.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes()
    return data


def _from_bytes(data: bytes, device: torch.device | str) -> Tensor:
    # torch wants writable memory; the copy is as small as the frame
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(device)
