"""Sums that can be taken out, made again and put back, and microbatches that come late."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.local_swarm import RUN_ID, token_source

from node.unsplit import weights_digest
from stage_server.codec import Packed
from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.errors import CheckpointInvalid, ProtocolViolation
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.replica_trainer import ReplicaTrainer

CONFIG = StageConfig(
    stages=3,
    model=ModelConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
    ),
    bottleneck=BottleneckConfig(width=4, local_loss=0.3),
    codec=CodecConfig(forward="none", backward="none"),
    plan=PlanConfig(steps=4, microbatches_per_step=4, batch=1, tokens=8),
)
SOURCE = token_source(CONFIG)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def name(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


class Chain:
    """Three stages in a row, and what crossed between them."""

    def __init__(self) -> None:
        self.stages = [
            ReplicaTrainer(CONFIG, RUN_ID, stage, activation_budget_bytes=1 << 30) for stage in range(CONFIG.stages)
        ]
        self.latents: dict[tuple[int, MicrobatchId], Packed] = {}  # what a stage received
        self.gradients: dict[tuple[int, MicrobatchId], Packed] = {}

    def train(self, *names: MicrobatchId) -> None:
        first, middle, last = self.stages
        for n in names:
            ids = SOURCE(n)
            self.latents[1, n] = first.forward(n, ids, None)
            self.latents[2, n] = middle.forward(n, ids, self.latents[1, n])
            _, gradient = last.forward_backward(n, ids, self.latents[2, n])
            assert gradient is not None
            self.gradients[1, n] = gradient
            returned = middle.backward(n, gradient)
            assert returned is not None
            self.gradients[0, n] = returned
            first.backward(n, returned)

    def commit(self, step: int) -> None:
        for stage in self.stages:
            stage.commit(step)

    def again(self, stage: int, n: MicrobatchId) -> tuple:
        return n, SOURCE(n), self.latents.get((stage, n)), self.gradients.get((stage, n))


def gradient_of(trainer: ReplicaTrainer) -> torch.Tensor:
    out = torch.full((trainer.num_values,), 7.0)
    trainer.write_gradients(out)
    return out


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_sum_can_be_made_again_for_any_share(stage: int) -> None:
    chain, part = Chain(), Chain()
    chain.train(name(1, 0), name(1, 1), name(1, 2))
    part.train(name(1, 0), name(1, 2))
    trainer = chain.stages[stage]
    trainer.drop_sum()
    assert not gradient_of(trainer).any()
    trainer.add_again([chain.again(stage, name(1, 0)), chain.again(stage, name(1, 2))])
    assert torch.equal(gradient_of(trainer), gradient_of(part.stages[stage]))


def test_replicas_that_add_up_their_parts_take_the_step_of_one() -> None:
    whole, a, b = Chain(), Chain(), Chain()
    names = [name(1, index) for index in range(4)]
    whole.train(*names)
    a.train(*names[:2])
    b.train(*names[2:])
    for mine, other, alone in zip(a.stages, b.stages, whole.stages, strict=True):
        total = gradient_of(mine) + gradient_of(other)
        assert torch.allclose(total, gradient_of(alone), rtol=1e-4, atol=1e-7)
        for trainer in (mine, other):
            trainer.read_gradients(total)
    for chain in (whole, a, b):
        chain.commit(1)
    for mine, other in zip(a.stages, b.stages, strict=True):
        assert weights_digest(mine.parameters_fp32()) == weights_digest(other.parameters_fp32())


def test_a_late_microbatch_gives_the_gradient_of_then_and_adds_to_nothing() -> None:
    chain, late = Chain(), Chain()
    chain.train(name(1, 0), name(1, 1))
    late.train(name(1, 0))
    for step in (chain, late):
        step.commit(1)
    # the same sums, so that both hold the same weights
    for mine, theirs in zip(late.stages, chain.stages, strict=True):
        mine.load_state_tensors(theirs.state_tensors())
    n = name(1, 1)
    _, middle, last = late.stages
    latents = middle.forward_late(n, SOURCE(n), chain.latents[1, n])
    assert latents.values == chain.latents[2, n].values
    _, gradient = last.forward_backward_late(n, SOURCE(n), latents)
    assert gradient is not None
    assert gradient.values == chain.gradients[1, n].values
    returned = middle.backward_late(n, gradient)
    assert returned is not None
    assert returned.values == chain.gradients[0, n].values
    assert not gradient_of(middle).any()
    assert not gradient_of(last).any()


def test_nothing_is_late_before_the_first_commit_or_twice() -> None:
    chain = Chain()
    n = name(1, 0)
    chain.train(n)
    middle = chain.stages[1]
    assert not middle.has_earlier_weights
    with pytest.raises(ProtocolViolation):
        middle.forward_late(n, SOURCE(n), chain.latents[1, n])
    chain.commit(1)
    middle.forward_late(n, SOURCE(n), chain.latents[1, n])
    middle.backward_late(n, chain.gradients[1, n])
    with pytest.raises(ProtocolViolation):
        middle.backward_late(n, chain.gradients[1, n])


def test_earlier_weights_are_part_of_the_state_and_checked() -> None:
    chain, other = Chain(), Chain()
    chain.train(name(1, 0))
    chain.commit(1)
    state = chain.stages[1].state_tensors()
    other.stages[1].load_state_tensors(state)
    assert other.stages[1].has_earlier_weights
    assert other.stages[1].state_tensors().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in other.stages[1].state_tensors().items())
    with pytest.raises(CheckpointInvalid):
        other.stages[1].load_state_tensors(state | {"earlier.nonsense": torch.zeros(1)})
