"""The outer Nesterov step against numpy, bit for bit, and against torch's own."""

from __future__ import annotations

import pytest
import torch
from support.nesterov import Nesterov
from torch import nn

from stage_server.errors import CheckpointInvalid
from stage_server.outer import OuterOptimizer

SHAPES = {"a.weight": (67, 33), "b": (5,)}  # no multiple of any vector width
RATE, MOMENTUM = 0.7, 0.9


def drawn(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def test_five_steps_are_numpys_bit_for_bit_and_torchs_but_for_rounding() -> None:
    start = drawn(0)
    outer, expected = OuterOptimizer(start, RATE, MOMENTUM), Nesterov(start, RATE, MOMENTUM)
    parameters = {name: nn.Parameter(weight.clone()) for name, weight in start.items()}
    sgd = torch.optim.SGD(parameters.values(), lr=RATE, momentum=MOMENTUM, nesterov=True)
    for step in range(1, 6):
        gradients = drawn(step)
        outer.step(gradients)
        expected.step({name: gradient.numpy() for name, gradient in gradients.items()})
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        sgd.step()
    for name, weight in outer.weights.items():
        assert weight.numpy().tobytes() == expected.weights[name].tobytes()
        assert torch.allclose(weight, parameters[name].detach(), rtol=1e-5, atol=1e-5)


def test_what_is_given_is_copied() -> None:
    start, gradients = drawn(0), drawn(1)
    outer = OuterOptimizer(start, RATE, MOMENTUM)
    outer.step(gradients)
    assert all(torch.equal(weight, drawn(0)[name]) for name, weight in start.items())
    assert all(torch.equal(gradient, drawn(1)[name]) for name, gradient in gradients.items())


def test_another_goes_on_from_its_state() -> None:
    one, other = OuterOptimizer(drawn(0), RATE, MOMENTUM), OuterOptimizer(drawn(9), RATE, MOMENTUM)
    one.step(drawn(1))
    other.load_state_tensors({name: tensor.clone() for name, tensor in one.state_tensors().items()})
    for outer in (one, other):
        outer.step(drawn(2))
    assert all(torch.equal(tensor, other.state_tensors()[name]) for name, tensor in one.state_tensors().items())


@pytest.mark.parametrize("change", [{"weight.b": torch.zeros(6)}, {"weight.c": torch.zeros(1)}])
def test_a_state_of_something_else_is_refused(change: dict[str, torch.Tensor]) -> None:
    outer = OuterOptimizer(drawn(0), RATE, MOMENTUM)
    before = {name: tensor.clone() for name, tensor in outer.state_tensors().items()}
    with pytest.raises(CheckpointInvalid):
        outer.load_state_tensors(before | change)
    assert all(torch.equal(tensor, before[name]) for name, tensor in outer.state_tensors().items())
