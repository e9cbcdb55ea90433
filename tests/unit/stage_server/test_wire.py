"""What is encoded comes back as it was, and no damage on the way passes unnoticed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from resbm_pb import stage_pb2, tensors_pb2
from support.wire_frames import (
    CODECS,
    UINT32_MAX,
    UINT64_MAX,
    config,
    gradients_message,
    latents_message,
    packed_gradients,
    packed_latents,
    some_ids,
    train,
)

from stage_server.codec import Packed, forward_encoding
from stage_server.errors import (
    FrameError,
)
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.wire import (
    LatentMicrobatch,
    WireFormat,
    _gradients_checksum,
    _latents_checksum,
    decode_held,
    encode_held,
)

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
