"""The door: what is encoded comes back as it was, and whatever else comes in is refused with a code."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
import zstandard
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from resbm_pb import stage_pb2, tensors_pb2

from stage_server.codec import Packed, backward_encoding, clip_for, forward_encoding, pack, scales_size
from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.errors import (
    CorruptFrame,
    FrameError,
    NotFinite,
    Oversized,
    ProtocolViolation,
    Truncated,
    UnknownCodec,
    WrongShape,
    WrongToken,
)
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.wire import (
    LatentMicrobatch,
    TokenIds,
    WireFormat,
    _gradients_checksum,
    _latents_checksum,
    decode_held,
    encode_held,
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


# -- round trips ------------------------------------------------------------------------------------------------

SHAPES = {"batch": st.integers(1, 3), "tokens": st.integers(1, 9), "width": st.integers(1, 7)}


@settings(max_examples=150, deadline=None)
@given(
    codec=st.sampled_from(CODECS),
    vocab_size=st.sampled_from([2, 3, 255, 256, 257, 65535, 65536, 65537, 70000]) | st.integers(2, 70000),
    zstd_level=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**16),
    step=st.integers(1, 2**40),
    kind=st.sampled_from(list(MicrobatchKind)),
    index=st.integers(0, UINT32_MAX),
    **SHAPES,
)
def test_microbatches_come_back_as_they_were(
    *, codec, vocab_size, zstd_level, seed, step, kind, index, **shape
) -> None:
    run = config(codec, vocab_size=vocab_size, zstd_level=zstd_level, **shape)
    wire, name = WireFormat(run), MicrobatchId(StepIndex(step), kind, index)
    ids, latents, gradients = some_ids(run, seed), packed_latents(run, seed), packed_gradients(run, seed)

    message = wire.encode_latents(name, wire.encode_token_ids(ids), latents)
    came = wire.decode_latents(stage_pb2.Latents.FromString(message.SerializeToString()))
    assert (came.name, came.latents) == (name, latents)
    assert came.token_ids.dtype == np.int32
    assert np.array_equal(came.token_ids, ids)
    assert came.packed_token_ids == message.token_ids
    assert message.ByteSize() <= wire.max_frame_bytes

    sent = gradients if kind is MicrobatchKind.TRAIN else None
    back = wire.encode_gradients(name, 2.625, sent)
    returned = wire.decode_gradients(stage_pb2.Gradients.FromString(back.SerializeToString()))
    assert (returned.name, returned.loss, returned.gradients) == (name, 2.625, sent)
    assert back.ByteSize() <= wire.max_frame_bytes


@settings(max_examples=50, deadline=None)
@given(**SHAPES)
def test_four_bits_are_exactly_half_a_byte_a_value(batch: int, tokens: int, width: int) -> None:
    run = config("int4", batch, tokens, width, zstd_level=0)
    message, back = latents_message(run), gradients_message(run)
    assert len(message.latents.values) == math.ceil(batch * tokens * width / 2)
    assert message.latents.scales == b""
    assert len(back.gradients.values) == math.ceil(batch * tokens * width / 2)
    assert len(back.gradients.scales) == batch * tokens
    headers = message.ByteSize() - len(message.latents.values) - len(message.token_ids.data)
    assert headers <= 48


@pytest.mark.parametrize(("vocab_size", "bits"), [(2, 1), (3, 2), (256, 8), (257, 9), (2048, 11), (70000, 17)])
def test_token_ids_take_as_few_bits_as_the_vocabulary_needs(vocab_size: int, bits: int) -> None:
    run = config(vocab_size=vocab_size, zstd_level=0)
    message = WireFormat(run).encode_token_ids(some_ids(run))
    assert message.bits == bits
    assert len(message.data) == math.ceil(2 * 6 * bits / 8)


@pytest.mark.parametrize(("vocab_size", "wide"), [(65536, 16), (65537, 32)])
def test_repetitive_token_ids_are_compressed_and_random_ones_are_not(vocab_size: int, wide: int) -> None:
    run = config(vocab_size=vocab_size, tokens=200)
    wire = WireFormat(run)
    same = wire.encode_token_ids(np.full((2, 201), vocab_size - 1, np.int32))
    assert (same.compression, same.bits) == (tensors_pb2.COMPRESSION_ZSTD, wide)
    assert len(same.data) < 40
    random = wire.encode_token_ids(some_ids(run))
    assert random.compression == tensors_pb2.COMPRESSION_NONE


def test_latents_that_compress_are_compressed_and_come_back() -> None:
    run = config("none", tokens=64, width=4)
    wire, zeros = WireFormat(run), Packed(forward_encoding(run.codec), 2, 64, 4, bytes(2048), b"")
    message = wire.encode_latents(train(), wire.encode_token_ids(some_ids(run)), zeros)
    assert message.latents.values_compression == tensors_pb2.COMPRESSION_ZSTD
    assert len(message.latents.values) < 40
    assert wire.decode_latents(message).latents == zeros


@given(st.lists(st.tuples(st.integers(0, UINT64_MAX), st.sampled_from(MicrobatchKind), st.integers(0, UINT32_MAX))))
def test_held_names_come_back(names: list[tuple[int, MicrobatchKind, int]]) -> None:
    held = [MicrobatchId(StepIndex(step), kind, index) for step, kind, index in names]
    assert decode_held(encode_held(held)) == held


# -- damage -----------------------------------------------------------------------------------------------------


def content(message: LatentMicrobatch) -> tuple[object, ...]:
    return message.name, message.token_ids.tolist(), message.latents


def flip(data: bytes, place: int, mask: int) -> bytes:
    place %= len(data)
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1 :]


DAMAGE = {
    "codec": st.sampled_from(CODECS),
    "batch": st.integers(1, 2),
    "tokens": st.sampled_from([1, 2, 7, 40]),
    "vocab_size": st.sampled_from([2, 5, 300, 40000, 70000]),
    "place": st.integers(0, 10_000),
    "mask": st.integers(1, 255),
}


@settings(max_examples=400, deadline=None)
@given(**DAMAGE)
def test_no_flipped_byte_of_latents_passes_unnoticed(*, codec, batch, tokens, vocab_size, place, mask) -> None:
    run = config(codec, batch, tokens, 2, vocab_size=vocab_size)
    wire, message = WireFormat(run), latents_message(run)
    try:
        spoiled = stage_pb2.Latents.FromString(flip(message.SerializeToString(), place, mask))
        came = wire.decode_latents(spoiled)
    except (FrameError, DecodeError):
        return
    assert content(came) == content(wire.decode_latents(message))


@settings(max_examples=400, deadline=None)
@given(kind=st.sampled_from(MicrobatchKind), **DAMAGE)
def test_no_flipped_byte_of_gradients_passes_unnoticed(*, kind, codec, batch, tokens, vocab_size, place, mask) -> None:
    run = config(codec, batch, tokens, 2, vocab_size=vocab_size)
    wire, message = WireFormat(run), gradients_message(run, MicrobatchId(StepIndex(3), kind, 1))
    try:
        came = wire.decode_gradients(stage_pb2.Gradients.FromString(flip(message.SerializeToString(), place, mask)))
    except (FrameError, DecodeError):
        return
    assert came == wire.decode_gradients(message)


@pytest.mark.parametrize(("codec", "vocab_size"), [("int4", 5), ("int8", 2), ("bf16", 300), ("none", 40000)])
def test_every_single_flip_of_one_small_frame(codec: str, vocab_size: int) -> None:
    """Exhaustive where hypothesis samples: the smallest shapes leave the least room for checks of size."""
    run = config(codec, 1, 1, 1, vocab_size=vocab_size)
    wire, message = WireFormat(run), latents_message(run)
    data, expected = message.SerializeToString(), content(wire.decode_latents(message))
    for place in range(len(data)):
        for mask in range(1, 256):
            try:
                came = wire.decode_latents(stage_pb2.Latents.FromString(flip(data, place, mask)))
            except (FrameError, DecodeError):
                continue
            assert content(came) == expected, f"byte {place} of {data!r}, mask {mask:#x}"


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=200))
def test_junk_is_refused_and_nothing_worse(data: bytes) -> None:
    wire = WireFormat(config())
    for kind, decode in ((stage_pb2.Latents, wire.decode_latents), (stage_pb2.Gradients, wire.decode_gradients)):
        try:
            message = kind.FromString(data)
        except DecodeError:
            continue
        with pytest.raises(FrameError):
            decode(message)


@settings(max_examples=300, deadline=None)
@given(
    step=st.sampled_from([0, 1, UINT64_MAX]) | st.integers(0, UINT64_MAX),
    kind=st.integers(-(2**31), 2**31 - 1),
    index=st.sampled_from([0, UINT32_MAX]),
    loss=st.floats(width=32),
)
def test_no_numbers_in_a_header_raise_anything_but_a_refusal(step: int, kind: int, index: int, loss: float) -> None:
    wire = WireFormat(config())
    latents = latents_message(config())
    latents.step, latents.kind, latents.index = step, kind, index
    gradients = gradients_message(config())
    gradients.step, gradients.kind, gradients.index, gradients.loss = step, kind, index, loss
    for message, checksum, decode in (
        (latents, _latents_checksum, wire.decode_latents),
        (gradients, _gradients_checksum, wire.decode_gradients),
    ):
        message.checksum = checksum(message)
        try:
            came = decode(message)
        except FrameError:
            continue
        assert came.name == (step, kind, index)


# -- refusals, each by its code ---------------------------------------------------------------------------------


def refused_latents(change: Callable[[stage_pb2.Latents], None], **run: object) -> int:
    """The code that a changed frame gets, its checksum being right."""
    message = latents_message(config(**run))  # type: ignore[arg-type]
    change(message)
    message.checksum = _latents_checksum(message)
    return code_of(lambda: WireFormat(config(**run)).decode_latents(message))  # type: ignore[arg-type]


def refused_gradients(change: Callable[[stage_pb2.Gradients], None], name: MicrobatchId | None = None) -> int:
    message = gradients_message(config(), name)
    change(message)
    message.checksum = _gradients_checksum(message)
    return code_of(lambda: WireFormat(config()).decode_gradients(message))


def put(path: str, value: object) -> Callable[[object], None]:
    """Sets a field, or applies a function to it."""

    def change(message: object) -> None:
        *parents, field = path.split(".")
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, field, value(getattr(message, field)) if callable(value) else value)

    return change


def test_a_frame_as_it_should_be_passes_this_bench() -> None:
    """Without it the tests below would pass if everything were refused."""
    message = latents_message(config())
    message.checksum = _latents_checksum(message)
    assert WireFormat(config()).decode_latents(message).name == train()


@pytest.mark.parametrize(
    "path", ["latents.batch", "latents.tokens", "latents.width", "token_ids.batch", "token_ids.length"]
)
@pytest.mark.parametrize("value", [0, 1, 4, UINT32_MAX])
def test_a_wrong_shape_is_refused(path: str, value: int) -> None:
    assert refused_latents(put(path, value)) == WrongShape.code


@pytest.mark.parametrize("encoding", [0, 1, 2, 3, 5, 6, 7, 99, -1])
def test_an_encoding_that_is_not_the_runs_is_refused(encoding: int) -> None:
    assert refused_latents(put("latents.encoding", encoding)) == UnknownCodec.code


def test_the_forward_encoding_is_no_backward_encoding() -> None:
    assert refused_gradients(put("gradients.encoding", tensors_pb2.ENCODING_INT4_FIXED)) == UnknownCodec.code


@pytest.mark.parametrize("path", ["latents.values_compression", "latents.scales_compression", "token_ids.compression"])
@pytest.mark.parametrize("compression", [2, 77, -3])
def test_an_unknown_compression_is_refused(path: str, compression: int) -> None:
    assert refused_latents(put(path, compression)) == UnknownCodec.code


@pytest.mark.parametrize("bits", [0, 1, 5, 7, 16, 33, UINT32_MAX])
def test_token_ids_of_another_width_are_refused(bits: int) -> None:
    """61 tokens take 6 bits; were the width the sender's choice, a flipped bit in it could pass on small shapes."""
    assert refused_latents(put("token_ids.bits", bits)) == UnknownCodec.code


@pytest.mark.parametrize("bits", [0, 6, 32, 17])
def test_compressed_token_ids_of_another_width_are_refused(bits: int) -> None:
    def change(message: stage_pb2.Latents) -> None:
        message.token_ids.data = zstandard.compress(bytes(4 * 12))
        message.token_ids.compression = tensors_pb2.COMPRESSION_ZSTD
        message.token_ids.bits = bits

    assert refused_latents(change) == UnknownCodec.code


@pytest.mark.parametrize("path", ["latents.values", "token_ids.data"])
def test_short_and_long_payloads_are_refused(path: str) -> None:
    assert refused_latents(put(path, lambda data: data[:-1])) == Truncated.code
    assert refused_latents(put(path, b"")) == Truncated.code
    assert refused_latents(put(path, lambda data: data + b"\0")) == Oversized.code
    assert refused_latents(put(path, bytes(100_000))) == Oversized.code


@pytest.mark.parametrize("path", ["gradients.values", "gradients.scales"])
def test_short_and_long_gradients_are_refused(path: str) -> None:
    assert refused_gradients(put(path, lambda data: data[:-1])) == Truncated.code
    assert refused_gradients(put(path, lambda data: data + b"\0")) == Oversized.code


def test_scales_where_the_encoding_has_none_are_refused() -> None:
    assert refused_latents(put("latents.scales", b"\1")) == Oversized.code


def test_a_wrong_checksum_is_refused() -> None:
    message = latents_message(config())
    message.checksum ^= 1
    assert code_of(lambda: WireFormat(config()).decode_latents(message)) == CorruptFrame.code
    back = gradients_message(config())
    back.checksum ^= 1
    assert code_of(lambda: WireFormat(config()).decode_gradients(back)) == CorruptFrame.code


@pytest.mark.parametrize("zstd", [False, True], ids=["packed", "zstd"])
def test_a_token_id_outside_the_vocabulary_is_refused(zstd: bool) -> None:
    ids = some_ids(config())
    ids[1, 2] = 61  # still 6 bits

    def change(message: stage_pb2.Latents) -> None:
        message.token_ids.CopyFrom(WireFormat(config()).encode_token_ids(ids))
        if zstd:
            message.token_ids.bits = 16
            message.token_ids.compression = tensors_pb2.COMPRESSION_ZSTD
            message.token_ids.data = zstandard.compress(ids.astype("<u2").tobytes())

    assert refused_latents(change) == WrongToken.code


def test_the_largest_id_that_32_bits_hold_is_refused_and_not_wrapped() -> None:
    ids = np.full((2, 6), UINT32_MAX, "<u4")

    def change(message: stage_pb2.Latents) -> None:
        message.token_ids.bits = 32
        message.token_ids.compression = tensors_pb2.COMPRESSION_ZSTD
        message.token_ids.data = zstandard.compress(ids.tobytes())

    assert refused_latents(change, vocab_size=70_000) == WrongToken.code


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf, 1.1e4, -1.1e4, 3e38])
def test_a_loss_that_is_none_is_refused(loss: float) -> None:
    assert refused_gradients(put("loss", loss)) == NotFinite.code
    assert refused_gradients(put("loss", loss), evaluate()) == NotFinite.code


@pytest.mark.parametrize("codec", ["none", "bf16"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_numbers_that_no_trainer_should_see_are_refused(codec: str, value: float) -> None:
    """At the door: in the trainer they would end the process instead of the stream."""
    run = config(codec)
    raw = struct.pack("<f", value) if codec == "none" else struct.pack("<f", value)[2:]

    def spoil(data: bytes) -> bytes:
        return data[: len(raw)] + raw + data[2 * len(raw) :]

    assert refused_latents(put("latents.values", spoil), codec=codec) == NotFinite.code
    back = gradients_message(run)
    back.gradients.values = spoil(back.gradients.values)
    back.checksum = _gradients_checksum(back)
    assert code_of(lambda: WireFormat(run).decode_gradients(back)) == NotFinite.code


def test_gradients_go_with_training_and_only_with_it() -> None:
    assert refused_gradients(lambda message: message.ClearField("gradients")) == ProtocolViolation.code
    tensor = gradients_message(config()).gradients
    assert refused_gradients(lambda message: message.gradients.CopyFrom(tensor), evaluate()) == ProtocolViolation.code


@pytest.mark.parametrize("kind", [0, 3, 257, 258, -1, -255, 2**31 - 1])
def test_an_unknown_kind_is_refused(kind: int) -> None:
    """Also one that is like a known one in its lowest byte, which is all that the checksum covers."""
    assert refused_latents(put("kind", kind)) == ProtocolViolation.code
    assert refused_gradients(put("kind", kind)) == ProtocolViolation.code
    held = [stage_pb2.HeldMicrobatch(step=1, kind=kind)]  # type: ignore[arg-type]
    assert code_of(lambda: decode_held(held)) == ProtocolViolation.code


# -- hostile compression ----------------------------------------------------------------------------------------

VALUES_BYTES = 15  # of 2 x 5 x 3 values at 4 bits
ZEROS = bytes(VALUES_BYTES)


def refused_zstd(data: bytes) -> int:
    def change(message: stage_pb2.Latents) -> None:
        message.latents.values = data
        message.latents.values_compression = tensors_pb2.COMPRESSION_ZSTD

    return refused_latents(change)


def without_content_size(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(write_content_size=False).compress(data)


def claiming(size: int) -> bytes:
    """A frame header (magic, descriptor with an 8-byte content size and no window) and one empty last block."""
    return struct.pack("<IBQ", 0xFD2FB528, 0b11100000, size) + b"\x01\0\0"


def test_a_well_made_zstandard_payload_passes() -> None:
    message = latents_message(config())
    message.latents.values = zstandard.compress(ZEROS)
    message.latents.values_compression = tensors_pb2.COMPRESSION_ZSTD
    message.checksum = _latents_checksum(message)
    assert WireFormat(config()).decode_latents(message).latents.values == ZEROS


@pytest.mark.parametrize("size", [VALUES_BYTES + 1, 1 << 30, 1 << 62, UINT64_MAX - 2])
def test_a_bomb_is_refused_by_what_it_states(size: int) -> None:
    assert refused_zstd(claiming(size)) == Oversized.code


def test_a_real_bomb_is_refused() -> None:
    bomb = zstandard.compress(bytes(64 << 20))
    assert len(bomb) < 10_000
    assert refused_zstd(bomb) == Oversized.code


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (without_content_size(ZEROS), CorruptFrame.code),  # its content would do, but nothing bounds the decoder
        (without_content_size(bytes(64 << 20)), Oversized.code),
        (zstandard.compress(ZEROS) + b"junk", CorruptFrame.code),
        (zstandard.compress(ZEROS) + zstandard.compress(ZEROS), CorruptFrame.code),
        (zstandard.compress(ZEROS)[:-1], CorruptFrame.code),
        (claiming(VALUES_BYTES), CorruptFrame.code),  # states what it does not hold
        (b"", CorruptFrame.code),
        (b"\x28\xb5\x2f\xfd", CorruptFrame.code),
        (ZEROS, CorruptFrame.code),
        (struct.pack("<II", 0x184D2A50, 4) + b"skip", CorruptFrame.code),
        (zstandard.compress(bytes(VALUES_BYTES - 1)), Truncated.code),
        (zstandard.compress(b""), Truncated.code),
        (zstandard.compress(bytes(VALUES_BYTES + 1)), Oversized.code),
    ],
    ids=["no size", "bomb without size", "trailing junk", "two frames", "cut", "lies", "empty", "magic alone", "plain",
         "skippable", "short", "nothing in it", "long"],
)  # fmt: skip
def test_a_zstandard_payload_is_one_frame_that_states_its_size(payload: bytes, code: int) -> None:
    assert refused_zstd(payload) == code


@settings(max_examples=200, deadline=None)
@given(tail=st.binary(max_size=60))
def test_junk_behind_the_magic_number_raises_nothing_but_a_refusal(tail: bytes) -> None:
    assert refused_zstd(b"\x28\xb5\x2f\xfd" + tail) in (CorruptFrame.code, Oversized.code, Truncated.code)


def test_scales_have_the_size_of_their_tokens() -> None:
    run = config("int8")
    assert scales_size(backward_encoding(run.codec), 2, 5, 3) == 10
    assert len(gradients_message(run).gradients.scales) == 10
