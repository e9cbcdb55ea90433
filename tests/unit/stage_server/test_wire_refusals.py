"""The door: whatever is not as it should be is refused, each breach with its code."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from resbm_pb import stage_pb2, tensors_pb2
from support.wire_frames import (
    UINT32_MAX,
    UINT64_MAX,
    code_of,
    config,
    evaluate,
    gradients_message,
    latents_message,
    some_ids,
    train,
)

from stage_server.codec import backward_encoding, scales_size
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
from stage_server.ids import MicrobatchId
from stage_server.wire import (
    MAX_SCALE_CODE,
    WireFormat,
    _gradients_checksum,
    _latents_checksum,
    decode_held,
)

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


@pytest.mark.parametrize(("code", "refused"), [(MAX_SCALE_CODE + 1, True), (255, True), (MAX_SCALE_CODE, False)])
def test_a_scale_that_no_gradient_needs_is_refused(code: int, refused: bool) -> None:
    back = gradients_message(config())
    back.gradients.scales = bytes([code]) + back.gradients.scales[1:]
    back.checksum = _gradients_checksum(back)
    if refused:
        assert code_of(lambda: WireFormat(config()).decode_gradients(back)) == NotFinite.code
    else:
        assert WireFormat(config()).decode_gradients(back).gradients is not None


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


def test_a_compressed_payload_is_hardly_longer_than_a_plain_one() -> None:
    """Empty blocks decompress to nothing: with them a frame could carry any number of bytes that are kept."""
    frame = zstandard.compress(ZEROS)
    header, blocks = frame[:6], frame[6:]
    padded = header + b"\0\0\0" * 100 + blocks
    assert zstandard.decompress(padded) == ZEROS
    assert refused_zstd(padded) == Oversized.code


def test_scales_have_the_size_of_their_tokens() -> None:
    run = config("int8")
    assert scales_size(backward_encoding(run.codec), 2, 5, 3) == 10
    assert len(gradients_message(run).gradients.scales) == 10
