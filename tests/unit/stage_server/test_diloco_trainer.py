"""Steps that replicas take by themselves, and outer steps that they take together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from support.local_swarm import RUN_ID, token_source
from support.nesterov import Nesterov
from torch import Tensor

from node.unsplit import weights_digest
from stage_server.config import BottleneckConfig, CodecConfig, DilocoConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.diloco_trainer import DilocoTrainer
from stage_server.errors import CheckpointInvalid
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.replica_trainer import Agreed
from stage_server.trainer import StageTrainer

M = 4
DILOCO = DilocoConfig(inner_steps=3)


def config_of(stages: int) -> StageConfig:
    return StageConfig(
        stages=stages,
        model=ModelConfig(
            vocab_size=300,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=16,
        ),
        bottleneck=BottleneckConfig(width=4),
        codec=CodecConfig(forward="none", backward="none"),
        plan=PlanConfig(steps=7, microbatches_per_step=M, batch=1, tokens=8),
    )


WHOLE = config_of(1)
SOURCE = token_source(WHOLE)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def name(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def replica() -> DilocoTrainer:
    return DilocoTrainer(WHOLE, RUN_ID, 0, activation_budget_bytes=1 << 30, diloco=DILOCO)


def train(trainer: StageTrainer, step: int, *indices: int) -> None:
    for index in indices:
        trainer.forward_backward(name(step, index), SOURCE(name(step, index)), None)


def weights(trainer: StageTrainer) -> dict[str, Tensor]:
    return {key: weight.clone() for key, weight in trainer.parameters_fp32()}


def all_of(trainer: DilocoTrainer) -> dict[str, Tensor]:
    """State and gradients, copied."""
    gradient_N = torch.empty(trainer.num_values)
    trainer.write_gradients(gradient_N)
    return {key: tensor.clone() for key, tensor in trainer.state_tensors().items()} | {"gradient": gradient_N}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[key]) for key, tensor in one.items())


def outer_steps_of(*replicas: DilocoTrainer, step: int, shares: list[int]) -> None:
    """Adds up what each puts in, and takes the step everywhere."""
    parts, weight = [], 0
    for trainer, num in zip(replicas, shares, strict=True):
        part_N = torch.empty(trainer.num_values)
        weight += trainer.write_contribution(step, num, part_N)
        parts.append(part_N)
    assert replicas[0].can_be_whole(weight)
    for trainer, num in zip(replicas, shares, strict=True):
        trainer.commit_agreed(step, Agreed(num, torch.stack(parts).sum(0), weight))


def test_outer_steps_come_every_few_steps_and_after_the_last() -> None:
    trainer = replica()
    assert [step for step in range(1, 8) if trainer.exchanges(step)] == [3, 6, 7]


def test_a_total_without_some_of_the_steps_own_microbatches_is_not_whole() -> None:
    assert [replica().can_be_whole(weight) for weight in (0, M - 1, M, 3 * M)] == [False, False, True, True]


def test_between_outer_steps_one_replica_trains_as_a_stage_without_any() -> None:
    trainer, plain = replica(), StageTrainer(WHOLE, RUN_ID, 0, activation_budget_bytes=1 << 30)
    for step in (1, 2):
        train(trainer, step, *range(M))
        train(plain, step, *range(M))
        trainer.commit_agreed(step, Agreed(M))
        plain.commit(step)
    assert weights_digest(trainer.parameters_fp32()) == weights_digest(plain.parameters_fp32())


def test_what_a_replica_puts_in_is_what_the_step_will_make_of_it_and_changes_nothing() -> None:
    """A round may come to nothing: weights, optimizer, gradient and what is in flight are as if it had not been."""
    trainer = replica()
    for step in (1, 2):
        train(trainer, step, 0, 1)
        trainer.commit_agreed(step, Agreed(2))
    train(trainer, 3, 0, 1, 2)
    before, part_N = all_of(trainer), torch.empty(trainer.num_values)
    assert trainer.write_contribution(3, 3, part_N) == 2 + 2 + 3
    assert same(all_of(trainer), before)
    plain = StageTrainer(WHOLE, RUN_ID, 0, activation_budget_bytes=1 << 30)
    start = weights(plain)
    for step, indices in ((1, (0, 1)), (2, (0, 1)), (3, (0, 1, 2))):
        train(plain, step, *indices)
        plain._optimizer.scale_gradients(M / len(indices))
        plain.commit(step)
    moved = torch.cat([((start[key] - weight) * 7).flatten() for key, weight in plain.parameters_fp32()])
    assert torch.equal(part_N, moved)


def test_a_microbatch_in_flight_outlives_an_outer_step_that_comes_to_nothing() -> None:
    config = config_of(2)
    first = DilocoTrainer(config, RUN_ID, 0, activation_budget_bytes=1 << 30, diloco=DILOCO)
    last = DilocoTrainer(config, RUN_ID, 1, activation_budget_bytes=1 << 30, diloco=DILOCO)
    gradients = {}
    for index in range(2):
        latents = first.forward(name(1, index), SOURCE(name(1, index)), None)
        _, gradients[index] = last.forward_backward(name(1, index), SOURCE(name(1, index)), latents)
    assert gradients[0] is not None
    assert gradients[1] is not None
    first.backward(name(1, 0), gradients[0])
    first.write_contribution(3, 1, torch.empty(first.num_values))
    first.backward(name(1, 1), gradients[1])  # autograd would refuse if a weight had been written to


def test_two_replicas_take_numpys_outer_step_and_hold_the_same_bits() -> None:
    a, b = replica(), replica()
    plain = [StageTrainer(WHOLE, RUN_ID, 0, activation_budget_bytes=1 << 30) for _ in range(2)]
    outer = Nesterov(weights(a), DILOCO.outer_lr, DILOCO.outer_momentum)
    shares = {1: ((0, 1, 2), (3,)), 2: ((0,), (1, 2, 3)), 3: ((2, 3), (0, 1))}
    trained = [0, 0]
    for step in range(1, 7):
        for number, (mine, reference) in enumerate(zip((a, b), plain, strict=True)):
            share = shares[(step - 1) % 3 + 1][number]
            trained[number] += len(share)
            train(mine, step, *share)
            train(reference, step, *share)
            reference._optimizer.scale_gradients(M / len(share))
            reference.commit(step)
            if step % 3:
                mine.commit_agreed(step, Agreed(len(share)))
        if step % 3 == 0:
            outer_steps_of(a, b, step=step, shares=[2, 2])
            outer.step(outer.mean([weights(trainer) for trainer in plain], trained))
            trained = [0, 0]
            for reference in plain:
                for key, weight in reference.parameters_fp32():
                    weight.copy_(torch.from_numpy(outer.weights[key]))
            assert weights_digest(a.parameters_fp32()) == weights_digest(b.parameters_fp32())
            for key, weight in a.parameters_fp32():
                assert weight.numpy().tobytes() == outer.weights[key].tobytes()
        else:
            assert weights_digest(a.parameters_fp32()) != weights_digest(b.parameters_fp32())


def test_an_empty_share_moves_nothing_and_counts_for_nothing() -> None:
    trainer, other = replica(), replica()
    before = weights(trainer)
    for step in (1, 2):
        train(other, step, *range(M))
        trainer.commit_agreed(step, Agreed(0))
        other.commit_agreed(step, Agreed(M))
    assert same(weights(trainer), before)
    part_N = torch.empty(trainer.num_values)
    assert trainer.write_contribution(3, 0, part_N) == 0
    assert not part_N.any()
    train(other, 3, *range(M))
    outer_steps_of(trainer, other, step=3, shares=[0, M])
    assert weights_digest(trainer.parameters_fp32()) == weights_digest(other.parameters_fp32())
    assert not same(weights(trainer), before)


def test_a_replica_that_restarts_goes_on_where_it_was() -> None:
    trainer, again = replica(), replica()
    train(trainer, 1, 0, 1, 2)
    trainer.commit_agreed(1, Agreed(3))
    again.load_state_tensors(trainer.state_tensors())
    for one in (trainer, again):
        train(one, 2, *range(M))
        one.commit_agreed(2, Agreed(M))
        train(one, 3, *range(M))
        one.commit_agreed(3, Agreed(M))
    assert same(all_of(trainer), all_of(again))


def test_who_takes_over_starts_from_the_outer_step_and_has_trained_on_nothing_since() -> None:
    donor, joiner = replica(), replica()
    for step in (1, 2, 3, 4):
        train(donor, step, *range(M))
        donor.commit_agreed(step, Agreed(M))
        if step == 3:
            outer = weights(donor)
    joiner.take_over(donor.state_tensors())
    assert same(weights(joiner), outer)
    part_N = torch.empty(joiner.num_values)
    assert joiner.write_contribution(5, 0, part_N) == 0
    assert not part_N.any()
    train(donor, 5, *range(M))
    train(donor, 6, *range(M))
    donor.commit_agreed(5, Agreed(M))
    joiner.commit_agreed(5, Agreed(0))
    outer_steps_of(donor, joiner, step=6, shares=[M, 0])
    assert weights_digest(donor.parameters_fp32()) == weights_digest(joiner.parameters_fp32())


@pytest.mark.parametrize("lost", ["outer.trained", "outer.weight.", "outer.momentum."])
def test_a_state_without_its_outer_half_is_refused(lost: str) -> None:
    trainer = replica()
    before = all_of(trainer)
    with pytest.raises(CheckpointInvalid):
        trainer.load_state_tensors({k: v for k, v in before.items() if not k.startswith(lost) and k != "gradient"})
    assert same(all_of(trainer), before)
