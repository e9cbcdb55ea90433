"""One stage's arithmetic: kept or computed again, resumed or straight through, the bits are the same."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stage_server.checkpoint import CheckpointStore
from stage_server.codec import Encoding, Packed, pack
from stage_server.config import StageConfig
from stage_server.errors import CheckpointInvalid, FrameError, NotFinite, ProtocolViolation, UnknownCodec, WrongShape
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.trainer import StageTrainer, TokenIds

MICROBATCHES = 3
PLENTY = 2**40


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(stages: int = 3, codec: str = "int4", precision: str = "fp32", **parts: Any) -> StageConfig:
    model = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    values: dict[str, Any] = {
        "stages": stages,
        "model": model,
        "bottleneck": {"width": 6, "local_loss": 0.3},
        "codec": {"forward": codec, "backward": codec},
        "compute": {"precision": precision},
        "plan": {"steps": 6, "microbatches_per_step": MICROBATCHES, "batch": 2, "tokens": 16},
    }
    return StageConfig.model_validate(values | parts)


def train(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def tokens(name: MicrobatchId) -> TokenIds:
    rng = np.random.default_rng([name.step, name.kind, name.index])
    return rng.integers(0, 61, (2, 17), dtype=np.int32)


def trainers(config: StageConfig, budget: int = PLENTY) -> list[StageTrainer]:
    return [StageTrainer(config, "run", s, activation_budget_bytes=budget) for s in range(config.stages)]


def forward(stages: list[StageTrainer], name: MicrobatchId) -> Packed | None:
    """Through all stages but the last."""
    latents: Packed | None = None
    for stage in stages[:-1]:
        latents = stage.forward(name, tokens(name), latents)
    return latents


def backward(stages: list[StageTrainer], name: MicrobatchId, latents: Packed | None) -> float:
    """Through the last stage and back to the first."""
    loss, gradients = stages[-1].forward_backward(name, tokens(name), latents)
    for stage in reversed(stages[:-1]):
        assert gradients is not None
        gradients = stage.backward(name, gradients)
    assert gradients is None
    return loss


def run_step(stages: list[StageTrainer], step: int) -> float:
    """All forwards first, so that every microbatch is in flight at once."""
    names = [train(step, index) for index in range(MICROBATCHES)]
    latents = [forward(stages, name) for name in names]
    loss = sum(backward(stages, name, sent) for name, sent in zip(names, latents, strict=True)) / MICROBATCHES
    for stage in stages:
        stage.commit(step)
    return loss


def same_weights(left: list[StageTrainer], right: list[StageTrainer]) -> bool:
    return all(
        torch.equal(a, b)
        for one, other in zip(left, right, strict=True)
        for (_, a), (_, b) in zip(one.parameters_fp32(), other.parameters_fp32(), strict=True)
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_activations_give_the_same_bits_as_kept_ones(precision: str) -> None:
    config = run(precision=precision)
    kept, computed_again = trainers(config), trainers(config, budget=0)
    probe = trainers(config)[0]
    probe.forward(train(1, 0), tokens(train(1, 0)), None)
    some = trainers(config, budget=probe.memory().microbatch_activations_bytes)  # room for one of the three in flight
    losses = [[run_step(stages, step) for step in (1, 2)] for stages in (kept, computed_again, some)]
    assert losses[0] == losses[1] == losses[2]
    assert same_weights(kept, computed_again)
    assert same_weights(kept, some)


def test_loss_falls() -> None:
    stages = trainers(run(optimizer={"warmup_fraction": 0.0}))
    name = train(1, 0)
    losses = []
    for step in range(1, 7):
        losses.append(backward(stages, name, forward(stages, name)))
        for stage in stages:
            stage.commit(step)
    assert losses[-1] < losses[0] - 0.1


def test_evaluation_changes_nothing_and_equals_the_training_loss() -> None:
    stages = trainers(run())
    name = train(1, 0)
    latents = forward(stages, name)
    loss, _ = stages[-1].forward_backward(name, tokens(name), latents)
    for stage in stages:
        stage.discard()
    sent: Packed | float | None = None
    for stage in stages:
        assert not isinstance(sent, float)
        sent = stage.evaluate(name, tokens(name), sent)
    assert sent == loss
    assert all(stage.num_in_flight == 0 for stage in stages)
    assert all(stage.memory().gradients_bytes == 0 for stage in stages)
    fresh = trainers(run())
    assert [run_step(stages, 1)] == [run_step(fresh, 1)]
    assert same_weights(stages, fresh)


def test_discard_forgets_everything_since_the_last_commit() -> None:
    disturbed, straight = trainers(run()), trainers(run())
    backward(disturbed, train(1, 0), forward(disturbed, train(1, 0)))
    forward(disturbed, train(1, 1))
    for stage in disturbed:
        stage.discard()
    assert run_step(disturbed, 1) == run_step(straight, 1)
    assert same_weights(disturbed, straight)


def test_a_second_forward_under_one_name_replaces_the_first() -> None:
    replayed, straight = trainers(run()), trainers(run())
    for _ in range(3):
        forward(replayed, train(1, 0))
    assert replayed[0].num_in_flight == 1
    assert run_step(replayed, 1) == run_step(straight, 1)
    assert same_weights(replayed, straight)


@pytest.mark.parametrize("budget", [PLENTY, 0])
def test_gradients_for_a_microbatch_that_is_not_in_flight_are_refused(budget: int) -> None:
    stages = trainers(run(), budget)
    name = train(1, 0)
    latents = forward(stages, name)
    _, gradients = stages[-1].forward_backward(name, tokens(name), latents)
    assert gradients is not None
    stages[1].backward(name, gradients)
    with pytest.raises(ProtocolViolation):
        stages[1].backward(name, gradients)
    with pytest.raises(ProtocolViolation):
        stages[1].backward(train(1, 1), gradients)


def test_a_step_with_microbatches_in_flight_is_not_committed() -> None:
    stages = trainers(run())
    forward(stages, train(1, 0))
    with pytest.raises(ProtocolViolation):
        stages[0].commit(1)


def snapshot(stage: StageTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in stage.state_tensors().items()}


def test_refused_frames_change_nothing() -> None:
    disturbed, straight = trainers(run()), trainers(run())
    name = train(1, 0)
    latents = forward(disturbed, name)
    assert latents is not None
    wrong: list[tuple[Packed, type[FrameError]]] = [
        (dataclasses.replace(latents, encoding=Encoding.INT8_FIXED), UnknownCodec),
        (dataclasses.replace(latents, tokens=8, batch=4), WrongShape),
        (pack(torch.ones(2, 16, 5), Encoding.INT4_FIXED, 2.7), WrongShape),
    ]
    for packed, error in wrong:
        with pytest.raises(error):
            disturbed[-1].forward_backward(name, tokens(name), packed)
        with pytest.raises(FrameError):
            disturbed[0].backward(name, packed)
    assert disturbed[0].num_in_flight == 1
    disturbed[1].discard()
    assert run_step(disturbed, 1) == run_step(straight, 1)
    assert same_weights(disturbed, straight)


def test_gradients_that_are_not_finite_are_refused_before_they_are_added() -> None:
    stages = trainers(run(codec="none"))
    name = train(1, 0)
    forward(stages, name)
    poison = np.full((2, 16, 6), np.nan, dtype=np.float32).tobytes()
    with pytest.raises(NotFinite):
        stages[1].backward(name, Packed(Encoding.FP32, 2, 16, 6, poison, b""))
    assert stages[1].memory().gradients_bytes == 0
    assert stages[1].num_in_flight == 1


def test_a_poisoned_gradient_is_never_committed() -> None:
    stages = trainers(run())
    run_step(stages, 1)
    before = snapshot(stages[-1])
    backward(stages, train(2, 0), forward(stages, train(2, 0)))
    parameter = stages[-1].module.lm_head.weight
    parameter.grad[0, 0] = math.nan
    with pytest.raises(NotFinite):
        stages[-1].commit(2)
    after = stages[-1].state_tensors()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("hidden", ["muon", "adamw"])
def test_resuming_from_a_checkpoint_gives_the_bits_of_a_straight_run(tmp_path: Path, hidden: str) -> None:
    config = run(optimizer={"hidden": hidden})
    straight = trainers(config)
    losses = [run_step(straight, step) for step in range(1, 6)]

    first = trainers(config)
    stores = [CheckpointStore(tmp_path / str(stage), "run", stage) for stage in range(config.stages)]
    assert [run_step(first, step) for step in (1, 2, 3)] == losses[:3]
    for stage, store in zip(first, stores, strict=True):
        store.save(3, stage.state_tensors())
    resumed = trainers(config)
    run_step(resumed, 1)
    backward(resumed, train(2, 0), forward(resumed, train(2, 0)))  # a gradient that loading must forget
    for stage, store in zip(resumed, stores, strict=True):
        stage.load_state_tensors(store.load(3))
    assert [run_step(resumed, step) for step in (4, 5)] == losses[3:]
    assert same_weights(resumed, straight)


def test_loading_copies_and_the_initial_state_can_be_loaded() -> None:
    config = run(stages=1)
    (one,), (other,) = trainers(config), trainers(config)
    run_step([one], 1)
    initial = snapshot(other)
    other.load_state_tensors(one.state_tensors())
    kept = snapshot(one)
    run_step([other], 2)
    assert all(torch.equal(kept[name], tensor) for name, tensor in one.state_tensors().items())
    other.load_state_tensors(initial)
    assert set(other.state_tensors()) == set(initial)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "foreign"])
def test_state_of_another_stage_is_refused_and_changes_nothing(damage: str) -> None:
    stage = trainers(run())[1]
    state = snapshot(stage)
    name = next(iter(state))
    if damage == "missing":
        del state[name]
    elif damage == "extra":
        state["parameter.model.layers.9.weight"] = torch.ones(1)
    elif damage == "shape":
        state[name] = torch.ones(1)
    else:
        state["note"] = torch.ones(1)
    before = snapshot(stage)
    with pytest.raises(CheckpointInvalid):
        stage.load_state_tensors(state)
    assert all(torch.equal(before[key], tensor) for key, tensor in stage.state_tensors().items())


def test_state_names_are_stable() -> None:
    stages = trainers(run())
    assert all(name.startswith("parameter.") for name in stages[1].state_tensors())
    run_step(stages, 1)
    names = stages[1].state_tensors().keys()
    assert "parameter.boundaries.0.gain" in names
    assert "optimizer.muon.boundaries.0.decoder.weight.momentum_buffer" in names
    assert "optimizer.adamw.anchors.1.weight.exp_avg_sq" in names
    assert [name for name, _ in stages[1].parameters_fp32()] == sorted(name for name, _ in stages[1].parameters_fp32())


def test_the_gradient_is_that_of_the_whole_steps_loss() -> None:
    stages = trainers(run(stages=1, codec="none"))
    for index in range(MICROBATCHES):
        stages[0].forward_backward(train(1, index), tokens(train(1, index)), None)
    summed = {name: parameter.grad for name, parameter in stages[0].module.named_global_parameters()}
    (other,) = trainers(run(stages=1, codec="none"))
    ids = torch.from_numpy(np.concatenate([tokens(train(1, index)) for index in range(MICROBATCHES)])).long()
    logits = other.module(ids[:, :-1], None)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in other.module.named_global_parameters():
        torch.testing.assert_close(summed[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_cuda_stage_trains_like_a_cpu_stage(precision: str) -> None:
    config = run(codec="none", precision=precision)
    cpu = trainers(config)
    cuda = [StageTrainer(config, "run", s, device="cuda", activation_budget_bytes=PLENTY) for s in range(config.stages)]
    assert same_weights(cpu, [_on_cpu(stage) for stage in cuda])
    for step in (1, 2):
        assert run_step(cuda, step) == pytest.approx(run_step(cpu, step), rel=1e-2 if precision == "bf16" else 1e-4)


def _on_cpu(stage: StageTrainer) -> StageTrainer:
    copy = StageTrainer(stage.config, "run", stage.stage, activation_budget_bytes=0)
    copy.load_state_tensors(stage.state_tensors())
    return copy
