"""The optimizer step: a pure schedule, clipping per stage, and all or nothing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stage_server.config import OptimizerConfig
from stage_server.errors import CheckpointInvalid, NotFinite
from stage_server.optimizer import StageOptimizer, is_hidden_matrix, schedule

SHAPES = {
    "model.embed_tokens.weight": (9, 4),
    "model.layers.0.mlp.up_proj.weight": (6, 4),
    "boundaries.0.encoder.weight": (2, 4),
    "boundaries.0.gain": (2,),
}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def with_gradients(parameters: dict[str, nn.Parameter], norm: float, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    total = math.sqrt(sum(float(p.grad.square().sum()) for p in parameters.values() if p.grad is not None))
    for parameter in parameters.values():
        assert parameter.grad is not None
        parameter.grad *= norm / total


def optimizer(parameters: dict[str, nn.Parameter], num_stages: int = 4, **fields: object) -> StageOptimizer:
    return StageOptimizer(parameters, OptimizerConfig.model_validate(fields), num_stages, steps=10)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_schedule_rises_to_one_then_falls_to_its_final_share(steps: int, warmup: float, final: float) -> None:
    scales = [schedule(step, steps, warmup, final) for step in range(1, steps + 1)]
    peak = math.ceil(warmup * steps)
    assert all(0 <= scale <= 1 for scale in scales)
    assert scales[:peak] == sorted(scales[:peak])
    assert scales[peak:] == sorted(scales[peak:], reverse=True)
    if peak:
        assert scales[peak - 1] == 1
    if peak < steps:
        assert scales[-1] == pytest.approx(final)


def test_schedule_of_the_defaults() -> None:
    assert [round(schedule(step, 40, 0.05, 0.05), 3) for step in (1, 2, 21, 40, 41)] == [0.5, 1.0, 0.525, 0.05, 0.05]


@pytest.mark.parametrize(
    ("name", "shape", "hidden"),
    [
        ("model.layers.3.self_attn.q_proj.weight", (4, 4), True),
        ("boundaries.0.encoder.weight", (2, 4), True),
        ("boundaries.0.decoder.weight", (4, 2), True),
        ("boundaries.0.decoder.earlier.1", (4, 2), True),
        ("boundaries.0.decoder.earlier.1", (2,), False),
        ("boundaries.0.gain", (2,), False),
        ("model.embed_tokens.weight", (9, 4), False),
        ("anchors.1.weight", (9, 4), False),
        ("contexts.1.taps", (2, 4), False),
        ("contexts.1.pairs.weight", (9, 4), False),
        ("lm_head.weight", (9, 4), False),
        ("model.layers.3.input_layernorm.weight", (4,), False),
    ],
)
def test_muon_gets_hidden_matrices_only(name: str, shape: tuple[int, ...], hidden: bool) -> None:
    assert is_hidden_matrix(name, torch.empty(shape)) is hidden


@pytest.mark.parametrize(("hidden", "kinds"), [("muon", {"muon", "adamw"}), ("adamw", {"adamw"})])
def test_state_names_say_who_trains_what(hidden: str, kinds: set[str]) -> None:
    trained = parameters()
    stage = optimizer(trained, hidden=hidden)
    assert stage.state_tensors() == {}
    with_gradients(trained, 0.1)
    stage.step(1)
    names = stage.state_tensors()
    assert {name.split(".")[1] for name in names} == kinds
    assert (
        f"optimizer.{hidden}.model.layers.0.mlp.up_proj.weight.{'momentum_buffer' if hidden == 'muon' else 'exp_avg'}"
        in names
    )
    assert stage.state_bytes() == sum(tensor.nbytes for tensor in names.values()) > 0


@pytest.mark.parametrize(("norm", "clipped"), [(0.49, False), (0.51, True)])
def test_each_stage_clips_at_its_share_of_the_norm(norm: float, clipped: bool) -> None:
    trained = parameters()
    with_gradients(trained, norm)
    report = optimizer(trained, num_stages=4, clip_norm=1.0).step(1)  # 1 / sqrt(4) = 0.5
    assert report.gradient_norm == pytest.approx(norm, rel=1e-5)
    assert report.clipped is clipped


def test_a_clipped_step_is_the_step_of_the_scaled_gradient() -> None:
    # plain AdamW hides the gradient's scale in its first step; the second shows it
    left, right = parameters(), parameters()
    clipping, plain = optimizer(left, hidden="adamw", clip_norm=1.0), optimizer(right, hidden="adamw", clip_norm=0.0)
    for step, (norm, clipped_norm) in enumerate([(0.25, 0.25), (8.0, 0.5)], start=1):
        with_gradients(left, norm, seed=step)
        with_gradients(right, clipped_norm, seed=step)
        clipping.step(step)
        plain.step(step)
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("hidden", ["muon", "adamw"])
def test_encoders_and_decoders_have_a_rate_of_their_own(hidden: str) -> None:
    trained, usual = parameters(), parameters()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for owner, share in ((trained, 0.25), (usual, 1.0)):
        with_gradients(owner, 0.1)
        optimizer(owner, hidden=hidden, boundary_rate=share).step(1)
    for name, start in before.items():
        share = 0.25 if name == "boundaries.0.encoder.weight" else 1.0
        torch.testing.assert_close(trained[name] - start, share * (usual[name] - start), rtol=1e-3, atol=1e-6)


def test_norms_and_gains_do_not_decay() -> None:
    trained = parameters()
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(trained).step(1)
    moved = {name for name in trained if not torch.equal(trained[name], before[name])}
    assert moved == {name for name in trained if trained[name].ndim == 2}


def test_the_rate_follows_the_step_that_is_named_not_the_calls_made() -> None:
    early, late = parameters(), parameters()
    for trained, step in ((early, 1), (late, 10)):
        with_gradients(trained, 0.1)
        optimizer(trained, weight_decay=0.0).step(step)
    start = parameters()
    moved = [sum(float((t[name] - start[name]).detach().abs().sum()) for name in t) for t in (early, late)]
    assert moved[1] == pytest.approx(0.05 * moved[0], rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(bad: float) -> None:
    trained = parameters()
    stage = optimizer(trained)
    with_gradients(trained, 0.1)
    stage.step(1)
    weights = {name: parameter.detach().clone() for name, parameter in trained.items()}
    state = {name: tensor.clone() for name, tensor in stage.state_tensors().items()}
    with_gradients(trained, 9.0)
    gradient = trained["boundaries.0.gain"].grad
    assert gradient is not None
    gradient[0] = bad
    with pytest.raises(NotFinite):
        stage.step(2)
    assert all(torch.equal(trained[name], weights[name]) for name in trained)
    assert all(torch.equal(tensor, state[name]) for name, tensor in stage.state_tensors().items())


def test_gradients_are_gone_after_a_step() -> None:
    trained = parameters()
    with_gradients(trained, 0.1)
    optimizer(trained).step(1)
    assert all(parameter.grad is None for parameter in trained.values())


def test_state_moves_to_another_optimizer_by_copy() -> None:
    left, right = parameters(), parameters()
    first, second = optimizer(left), optimizer(right)
    with_gradients(left, 0.1)
    first.step(1)
    second.load_state_tensors(first.state_tensors())
    for name, parameter in right.items():
        parameter.data.copy_(left[name])
    for stage, trained in ((first, left), (second, right)):
        with_gradients(trained, 0.1, seed=2)
        stage.step(2)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("optimizer.muon.model.layers.9.mlp.up_proj.weight.momentum_buffer", (6, 4)),
        ("optimizer.sgd.boundaries.0.gain.exp_avg", (2,)),
        ("optimizer.adamw.boundaries.0.gain.exp_avg", (3,)),
    ],
)
def test_state_of_something_else_is_refused_and_changes_nothing(name: str, shape: tuple[int, ...]) -> None:
    trained = parameters()
    stage = optimizer(trained)
    with_gradients(trained, 0.1)
    stage.step(1)
    names = set(stage.state_tensors())
    with pytest.raises(CheckpointInvalid):
        stage.load_state_tensors({name: torch.zeros(shape)})
    assert set(stage.state_tensors()) == names
