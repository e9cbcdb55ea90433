"""What a machine says of itself before it is given a stage."""

from __future__ import annotations

from datetime import timedelta

import psutil
import pytest
import torch

from node import speed
from node.speed import CONSTANT_BYTES, Speed, measure
from stage_server.config import BottleneckConfig, CodecConfig, ComputeConfig, ModelConfig, PlanConfig, StageConfig


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(stages: int = 2, codec: str = "int4", width: int = 8, precision: str = "fp32") -> StageConfig:
    return StageConfig(
        stages=stages,
        model=ModelConfig(
            vocab_size=64, hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1,
        ),
        bottleneck=BottleneckConfig(width=2),
        codec=CodecConfig(forward=codec, backward=codec),
        compute=ComputeConfig(precision=precision),
        plan=PlanConfig(batch=2, tokens=8),
    )  # fmt: skip


@pytest.mark.parametrize("codec", ["none", "bf16", "int8", "int4"])
def test_every_codec_is_measured(codec: str) -> None:
    assert measure(run(codec=codec), "cpu").microbatch > timedelta(0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stages", [1, 4])
def test_every_cut_is_measured(stages: int, precision: str) -> None:
    measured = measure(run(stages=stages, precision=precision), "cpu")
    assert measured.throughput == pytest.approx(1 / measured.microbatch.total_seconds())
    assert len(measured.fits) == stages
    assert all(measured.fits)


def test_the_fastest_pass_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one warms up allocators and caches; a slow one says something of the moment, not of the machine."""
    seconds = [5.0, 0.25]
    monkeypatch.setattr(speed, "_pass", lambda *_: timedelta(seconds=seconds.pop(0)))
    assert measure(run(), "cpu").throughput == 4.0
    assert seconds == []


def test_memory_grows_with_the_model_and_counts_gradient_and_optimizer() -> None:
    small, large = (measure(run(width=width), "cpu").stage_bytes[0] - CONSTANT_BYTES for width in (16, 64))
    assert large > 4 * small > 0
    parameters = 16 * (64 * 64 + 64)  # embedding's and head's share alone, at 16 bytes a parameter
    assert large > parameters


def test_a_stage_that_does_not_fit_is_said_so() -> None:
    tight = Speed(timedelta(seconds=1), stage_bytes=(10, 20, 21), available_bytes=20)
    assert tight.fits == (True, True, False)


def test_memory_that_is_free_is_asked_of_the_machine() -> None:
    measured = measure(run(), "cpu")
    assert measured.available_bytes == pytest.approx(psutil.virtual_memory().available, rel=0.5)


def test_no_time_at_all_is_no_division_by_zero() -> None:
    assert Speed(timedelta(0), (1,), 1).throughput == pytest.approx(1e9)


def test_measuring_leaves_the_runs_randomness_alone() -> None:
    torch.manual_seed(7)
    before = torch.get_rng_state()
    measure(run(), "cpu")
    assert torch.equal(torch.get_rng_state(), before)
