"""What the codec promises: sizes, error bounds, and refusal of what is not a tensor of the run."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage_server.codec import (
    MAX_MAGNITUDE,
    Encoding,
    Packed,
    backward_encoding,
    clip_for,
    forward_encoding,
    pack,
    require,
    rounding_generator,
    scales_size,
    unpack,
    values_size,
)
from stage_server.config import CodecConfig
from stage_server.errors import NotFinite, Oversized, Truncated, UnknownCodec, WrongShape
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex

CLIP = 2.7
BITS = {"FP32": 32, "BF16": 16, "INT8_FIXED": 8, "INT4_FIXED": 4, "INT2_FIXED": 2}
BITS |= {"INT8_TOKEN": 8, "INT4_TOKEN": 4, "INT2_TOKEN": 2}
FIXED = [Encoding.INT8_FIXED, Encoding.INT4_FIXED, Encoding.INT2_FIXED]
TOKEN = [Encoding.INT8_TOKEN, Encoding.INT4_TOKEN, Encoding.INT2_TOKEN]

encodings = st.sampled_from(list(Encoding))
shapes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
seeds = st.integers(0, 2**32 - 1)


def tensor(shape: tuple[int, ...], seed: int, spread: float = 1.0) -> torch.Tensor:
    """Normal numbers with token magnitudes spread over many powers of two, some zero rows and some at the clip."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape).astype(np.float32)
    x *= np.float32(2.0) ** rng.uniform(-20 * spread, 5 * spread, (*shape[:2], 1)).astype(np.float32)
    x[rng.random(shape[:2]) < 0.1] = 0
    x[rng.random(shape) < 0.05] = CLIP
    return torch.from_numpy(x)


@given(encodings, shapes, seeds)
def test_sizes_are_exactly_those_of_shape_and_encoding(
    encoding: Encoding, shape: tuple[int, int, int], seed: int
) -> None:
    packed = pack(tensor(shape, seed), encoding, CLIP)
    assert len(packed.values) == values_size(encoding, *shape) == math.ceil(math.prod(shape) * BITS[encoding.name] / 8)
    assert len(packed.scales) == scales_size(encoding, *shape)
    assert packed.num_bytes == len(packed.values) + len(packed.scales)
    assert (packed.batch, packed.tokens, packed.width) == shape


def test_four_bits_cost_half_a_byte_and_no_scales_forward() -> None:
    packed = pack(torch.zeros(2, 3, 5), Encoding.INT4_FIXED, CLIP)
    assert len(packed.values) == 15
    assert packed.scales == b""


@given(shapes, seeds)
def test_fp32_is_lossless(shape: tuple[int, int, int], seed: int) -> None:
    x = tensor(shape, seed)
    assert torch.equal(unpack(pack(x, Encoding.FP32, CLIP), CLIP), x)


@given(shapes, seeds)
def test_bf16_rounds_to_nearest_even(shape: tuple[int, int, int], seed: int) -> None:
    x = tensor(shape, seed)
    assert torch.equal(unpack(pack(x, Encoding.BF16, CLIP), CLIP), x.bfloat16().float())


@given(st.sampled_from(FIXED), shapes, seeds)
def test_fixed_grid_errs_by_half_a_step_inside_the_clip(
    encoding: Encoding, shape: tuple[int, int, int], seed: int
) -> None:
    x = tensor(shape, seed, spread=0.1)
    step = 2 * CLIP / 2 ** BITS[encoding.name]
    y = unpack(pack(x, encoding, CLIP), CLIP)
    assert float((y - x.clamp(-CLIP, CLIP)).abs().max()) <= step / 2 * (1 + 1e-5)
    assert float(y.abs().max()) <= CLIP - step / 2 * (1 - 1e-5)  # the outermost level


@given(st.sampled_from(TOKEN), shapes, seeds)
def test_token_grid_never_clips_and_errs_by_half_a_step_of_its_token(
    encoding: Encoding, shape: tuple[int, int, int], seed: int
) -> None:
    x = tensor(shape, seed)
    packed = pack(x, encoding, CLIP)
    codes = torch.tensor(list(packed.scales)).view(shape[:2])
    scales = torch.where(codes > 0, 2.0 ** ((codes - 200) / 4), 0.0)
    absmax = x.abs().amax(-1)
    assert bool((scales >= absmax).all()), "a scale below the largest magnitude would clip"
    small = 2.0 ** (-199 / 4)
    assert bool((scales <= (absmax * 2**0.25).clamp_min(small) * (1 + 1e-6)).all()), "one step of scale too coarse"
    errors = (unpack(packed, CLIP) - x).abs().amax(-1)
    assert bool((errors <= scales / 2 ** BITS[encoding.name] * (1 + 1e-5)).all())


@pytest.mark.parametrize("encoding", TOKEN)
def test_zero_rows_come_back_as_exact_zeros(encoding: Encoding) -> None:
    x = torch.zeros(1, 2, 3)
    x[0, 1] = torch.tensor([0.0, 1e-3, -2e-3])
    packed = pack(x, encoding, CLIP)
    assert packed.scales[0] == 0
    assert torch.equal(unpack(packed, CLIP)[0, 0], torch.zeros(3))


def test_scale_of_an_exact_power_is_that_power() -> None:
    x = torch.tensor([[[1.0], [2.0**-49.75], [1e-30], [2.0**13]]])
    assert list(pack(x, Encoding.INT8_TOKEN, CLIP).scales) == [200, 1, 1, 252]


def test_low_nibble_comes_first() -> None:
    step = 2 * CLIP / 16
    x = torch.tensor([[[-7.5 * step, 7.5 * step, 0.5 * step]]])  # codes 0, 15, 8
    assert pack(x, Encoding.INT4_FIXED, CLIP).values == bytes([0xF0, 0x08])


def test_two_bits_are_four_codes_a_byte_the_earliest_lowest() -> None:
    step = 2 * CLIP / 4
    x = torch.tensor([[[-1.5 * step, 1.5 * step, 0.5 * step, -0.5 * step, 1.5 * step]]])  # codes 0, 3, 2, 1, 3
    packed = pack(x, Encoding.INT2_FIXED, CLIP)
    assert packed.values == bytes([0b01_10_11_00, 0b11])
    torch.testing.assert_close(unpack(packed, CLIP), x)


@given(st.sampled_from(FIXED), shapes, seeds)
def test_fixed_grid_is_idempotent(encoding: Encoding, shape: tuple[int, int, int], seed: int) -> None:
    once = pack(tensor(shape, seed), encoding, CLIP)
    assert pack(unpack(once, CLIP), encoding, CLIP) == once


@pytest.mark.parametrize("encoding", list(Encoding))
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 4 * MAX_MAGNITUDE])
def test_what_is_not_a_believable_number_is_never_written(encoding: Encoding, bad: float) -> None:
    x = torch.ones(1, 3, 4)
    x[0, 1, 2] = bad
    with pytest.raises(NotFinite):
        pack(x, encoding, CLIP)


@pytest.mark.parametrize(("encoding", "dtype"), [(Encoding.FP32, torch.float32), (Encoding.BF16, torch.bfloat16)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 4 * MAX_MAGNITUDE])
def test_what_is_not_a_believable_number_is_never_read(encoding: Encoding, dtype: torch.dtype, bad: float) -> None:
    raw = torch.tensor([1.0, bad], dtype=dtype).view(torch.uint8).numpy().tobytes()
    with pytest.raises(NotFinite):
        unpack(Packed(encoding, 1, 1, 2, raw, b""), CLIP)


@given(encodings, shapes, st.integers(-3, 3), st.integers(-2, 2))
def test_wrong_lengths_are_refused(
    encoding: Encoding, shape: tuple[int, int, int], more: int, more_scales: int
) -> None:
    values, scales = values_size(encoding, *shape) + more, scales_size(encoding, *shape) + more_scales
    packed = Packed(encoding, *shape, bytes(max(0, values)), bytes(max(0, scales)))
    delta = (len(packed.values) - (values - more)) or (len(packed.scales) - (scales - more_scales))
    if delta:
        with pytest.raises(Truncated if delta < 0 else Oversized):
            unpack(packed, CLIP)
    else:
        assert unpack(packed, CLIP).shape == shape


@given(st.sampled_from(FIXED + TOKEN), shapes, seeds)
def test_every_byte_string_of_the_right_length_reads_as_finite_numbers(
    encoding: Encoding, shape: tuple[int, int, int], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    packed = Packed(
        encoding, *shape, rng.bytes(values_size(encoding, *shape)), rng.bytes(scales_size(encoding, *shape))
    )
    assert bool(torch.isfinite(unpack(packed, CLIP)).all())


def test_unknown_encodings_and_empty_shapes_are_refused() -> None:
    with pytest.raises(UnknownCodec):
        unpack(Packed(0, 1, 1, 1, b"", b""), CLIP)  # type: ignore[arg-type]
    with pytest.raises(UnknownCodec):
        unpack(Packed(99, 1, 1, 1, b"", b""), CLIP)  # type: ignore[arg-type]
    with pytest.raises(WrongShape):
        unpack(Packed(Encoding.FP32, 1, 0, 4, b"", b""), CLIP)


def test_require_refuses_another_encoding_or_shape() -> None:
    packed = pack(torch.ones(1, 2, 4), Encoding.INT4_FIXED, CLIP)
    require(packed, Encoding.INT4_FIXED, 1, 2, 4)
    with pytest.raises(UnknownCodec):
        require(packed, Encoding.INT8_FIXED, 1, 2, 4)
    with pytest.raises(WrongShape):
        require(packed, Encoding.INT4_FIXED, 2, 1, 4)
    with pytest.raises(UnknownCodec):
        require(dataclasses.replace(packed, encoding=77), Encoding.INT4_FIXED, 1, 2, 4)


NAME = MicrobatchId(StepIndex(3), MicrobatchKind.TRAIN, 1)


def test_stochastic_rounding_depends_on_the_name_alone() -> None:
    codec = CodecConfig(rounding="stochastic")
    x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(0))

    def packed(run: str, name: MicrobatchId, boundary: int) -> Packed:
        return pack(x, Encoding.INT4_TOKEN, CLIP, rounding_generator(codec, run, name, boundary))

    first = packed("run", NAME, 0)
    assert packed("run", NAME, 0) == first
    others = [packed("other", NAME, 0), packed("run", NAME._replace(index=2), 0), packed("run", NAME, 1)]
    assert all(other.values != first.values for other in others)
    assert rounding_generator(CodecConfig(), "run", NAME, 0) is None


@settings(max_examples=10)
@given(st.sampled_from(TOKEN), seeds)
def test_stochastic_rounding_is_unbiased_inside_the_grid(encoding: Encoding, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    row = torch.tensor([1.0, 0.31, -0.07, 0.0, 0.55, -0.7])  # the 1.0 sets the scale; its own level lies below it
    x = row.repeat(1, 20_000, 1)
    mean = unpack(pack(x, encoding, CLIP, generator), CLIP).mean((0, 1))
    step = 2.0 / 2 ** BITS[encoding.name]
    assert float((mean - row)[1:].abs().max()) < 6 * step / 2 / math.sqrt(20_000)


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("none", Encoding.FP32, Encoding.FP32),
        ("bf16", Encoding.BF16, Encoding.BF16),
        ("int8", Encoding.INT8_FIXED, Encoding.INT8_TOKEN),
        ("int4", Encoding.INT4_FIXED, Encoding.INT4_TOKEN),
        ("int2", Encoding.INT2_FIXED, Encoding.INT2_TOKEN),
    ],
)
def test_config_chooses_fixed_grids_forward_and_token_grids_backward(
    name: str, forward: Encoding, backward: Encoding
) -> None:
    codec = CodecConfig.model_validate(
        {"forward": name, "backward": name, "clip": 2.5, "clip_int8": 4.0, "clip_int2": 1.5}
    )
    assert (forward_encoding(codec), backward_encoding(codec)) == (forward, backward)
    assert clip_for(codec, Encoding.INT2_FIXED) == 1.5
    assert clip_for(codec, Encoding.INT4_FIXED) == 2.5
    assert clip_for(codec, Encoding.INT8_FIXED) == 4.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("encoding", list(Encoding))
def test_cuda_writes_the_same_bytes_as_the_cpu(encoding: Encoding) -> None:
    x = tensor((2, 64, 13), 0)
    packed = pack(x.cuda(), encoding, CLIP, torch.Generator().manual_seed(1) if encoding in TOKEN else None)
    assert packed == pack(x, encoding, CLIP, torch.Generator().manual_seed(1) if encoding in TOKEN else None)
    assert torch.equal(unpack(packed, CLIP, "cuda").cpu(), unpack(packed, CLIP))
