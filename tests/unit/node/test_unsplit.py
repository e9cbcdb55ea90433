"""The golden test: stages in a row train the very bits of the unsplit model."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pytest
import torch

from node.unsplit import TokenIds, UnsplitModel, weights_digest
from stage_server.codec import Packed
from stage_server.config import StageConfig
from stage_server.errors import CheckpointInvalid
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.trainer import StageTrainer

VOCABULARY, BATCH, TOKENS, MICROBATCHES, STEPS = 61, 2, 16, 3, 3


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def run(model_type: str = "llama", stages: int = 3, codec: str | dict[str, str] = "int4", **parts: Any) -> StageConfig:
    model = {
        "model_type": model_type,
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | parts.pop("model", {})
    plan = {
        "steps": STEPS,
        "microbatches_per_step": MICROBATCHES,
        "batch": BATCH,
        "tokens": TOKENS,
        "evaluation_microbatches": 2,
    }
    values: dict[str, Any] = {
        "stages": stages,
        "model": model,
        "bottleneck": {"width": 6},
        "codec": {"forward": codec, "backward": codec} if isinstance(codec, str) else codec,
        "plan": plan,
    }
    return StageConfig.model_validate(values | parts)


def microbatch(name: MicrobatchId) -> TokenIds:
    step = 0 if name.kind is MicrobatchKind.EVALUATE else name.step
    rng = np.random.default_rng([step, name.kind, name.index])
    return rng.integers(0, VOCABULARY, (BATCH, TOKENS + 1), dtype=np.int32)


def chain_step(stages: list[StageTrainer], step: int) -> float:
    """One step by hand, microbatch by microbatch, bytes between the stages."""
    total = 0.0
    for index in range(MICROBATCHES):
        name = MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)
        latents: Packed | None = None
        for stage in stages[:-1]:
            latents = stage.forward(name, microbatch(name), latents)
        loss, gradients = stages[-1].forward_backward(name, microbatch(name), latents)
        total += loss
        for stage in reversed(stages[:-1]):
            assert gradients is not None
            gradients = stage.backward(name, gradients)
    for stage in stages:
        stage.commit(step)
    return total / MICROBATCHES


def train_chain(config: StageConfig, run_id: str = "run") -> tuple[list[float], str, list[StageTrainer]]:
    stages = [StageTrainer(config, run_id, s, activation_budget_bytes=2**30) for s in range(config.stages)]
    losses = [chain_step(stages, step) for step in range(1, STEPS + 1)]
    return losses, weights_digest(pair for stage in stages for pair in stage.parameters_fp32()), stages


def train_unsplit(config: StageConfig, run_id: str = "run") -> tuple[list[float], str, UnsplitModel]:
    model = UnsplitModel(config, run_id)
    losses = [model.train_step(step, microbatch) for step in range(1, STEPS + 1)]
    return losses, weights_digest(model.parameters_fp32()), model


def require_equal(config: StageConfig) -> None:
    chain_losses, chain_digest, _ = train_chain(config)
    losses, digest, _ = train_unsplit(config)
    assert chain_losses == losses
    assert chain_digest == digest


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_stages_in_a_row_train_the_bits_of_the_unsplit_model(model_type: str, stages: int, codec: str) -> None:
    require_equal(run(model_type, stages, codec))


@pytest.mark.parametrize("codec", ["bf16", "int8", "int2"])
def test_so_they_do_with_the_other_codecs(codec: str) -> None:
    require_equal(run(codec=codec))


@pytest.mark.parametrize(
    "parts",
    [
        {"codec": {"rounding": "stochastic"}},
        {"compute": {"precision": "bf16"}},
        {"optimizer": {"hidden": "adamw"}},
        {"bottleneck": {"enabled": False}, "codec": {"forward": "none", "backward": "int4"}},
        {"bottleneck": {"width": 6, "anchor": "independent", "projection": "none"}},
        {"bottleneck": {"width": 6, "anchor": "none", "identity": False, "gain": False}},
        {"bottleneck": {"width": 6, "taps": 2, "latent_taps": 2, "pair_rows": 40}},
        {"bottleneck": {"width": 6, "centre": False, "bias": False}},
        {"bottleneck": {"width": 6, "local_loss": 0.3}},
        {"model": {"embedding_multiplier": 50.0, "residual_init": 0.1}, "bottleneck": {"width": 6, "local_loss": 0.3}},
        {"bottleneck": {"width": 5, "norm": False}, "codec": {"forward": "bf16", "backward": "int8"}},
    ],
    ids=str,
)
def test_so_they_do_in_every_variant(parts: dict[str, Any]) -> None:
    require_equal(run(**parts))


def test_the_same_run_twice_gives_the_same_bits_and_another_seed_or_codec_does_not() -> None:
    first = train_unsplit(run())[:2]
    assert train_unsplit(run())[:2] == first
    assert train_unsplit(run(seed=1))[1] != first[1]
    assert train_unsplit(run(codec="none"))[1] != first[1]


def test_stochastic_rounding_follows_the_run_id() -> None:
    rounded = run(codec={"rounding": "stochastic"})
    assert train_unsplit(rounded, "a")[1] == train_chain(rounded, "a")[1]
    assert train_unsplit(rounded, "a")[1] != train_unsplit(rounded, "b")[1]


def test_uncompressed_stages_do_not_change_what_is_learnt() -> None:
    parts: dict[str, Any] = {"bottleneck": {"enabled": False}, "optimizer": {"clip_norm": 0.0}}
    one, four = (train_unsplit(run(stages=stages, codec="none", **parts)) for stages in (1, 4))
    assert one[0] == four[0]
    assert one[1] == four[1]


def test_evaluation_is_the_mean_over_its_microbatches_and_changes_nothing() -> None:
    config = run()
    _, digest, stages = train_chain(config)
    _, _, model = train_unsplit(config)
    losses = []
    for index in range(2):
        name = MicrobatchId(StepIndex(STEPS + 1), MicrobatchKind.EVALUATE, index)
        sent: Packed | float | None = None
        for stage in stages:
            assert not isinstance(sent, float)
            sent = stage.evaluate(name, microbatch(name), sent)
        assert isinstance(sent, float)
        losses.append(sent)
    assert model.evaluate(STEPS + 1, microbatch) == sum(losses) / 2
    assert weights_digest(model.parameters_fp32()) == digest
    none = run(plan={**config.plan.model_dump(), "evaluation_microbatches": 0})
    assert math.isnan(UnsplitModel(none, "run").evaluate(1, microbatch))


def test_the_stages_weights_can_be_taken_over() -> None:
    config = run()
    _, digest, stages = train_chain(config)
    state = {name: tensor for stage in stages for name, tensor in stage.state_tensors().items()}
    model = UnsplitModel(config, "run")
    model.load(state)
    assert weights_digest(model.parameters_fp32()) == digest
    by_name = UnsplitModel(config, "run")
    by_name.load({name: tensor for stage in stages for name, tensor in stage.parameters_fp32()})
    assert weights_digest(by_name.parameters_fp32()) == digest


def test_incomplete_weights_are_refused_and_change_nothing() -> None:
    config = run()
    model = UnsplitModel(config, "run")
    digest = weights_digest(model.parameters_fp32())
    partial = {name: tensor + 1 for name, tensor in model.parameters_fp32()}
    del partial["lm_head.weight"]
    with pytest.raises(CheckpointInvalid):
        model.load(partial)
    assert weights_digest(model.parameters_fp32()) == digest


def test_the_digest_is_of_the_bytes_in_name_order() -> None:
    a, b = torch.arange(6.0).view(2, 3), torch.tensor([1.5])
    expected = hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).hexdigest()
    assert weights_digest([("b", b), ("a", a)]) == expected
    assert weights_digest([("b", b), ("a", a.t().contiguous().t())]) == expected  # layout in memory does not count
    assert weights_digest([("a", b), ("b", a)]) != expected


def test_greedy_text_is_the_likeliest_next_token_each_time() -> None:
    model = train_unsplit(run())[2]
    name = MicrobatchId(StepIndex(0), MicrobatchKind.EVALUATE, 0)
    ids = [1, 2, 3]
    expected = []
    for _ in range(4):
        logits = model.logits(torch.tensor([[*ids, *expected]]), name)
        expected.append(int(logits[0, -1].argmax()))
    assert model.generate(ids, 4) == expected


def test_sampling_is_seeded_and_sees_no_more_than_the_runs_context() -> None:
    model = train_unsplit(run())[2]
    prompt = [(7 * i) % VOCABULARY for i in range(TOKENS + 5)]
    text = model.generate(prompt, 6, temperature=1.0, seed=3)
    assert len(text) == 6
    assert all(0 <= token < VOCABULARY for token in text)
    assert text == model.generate(prompt, 6, temperature=1.0, seed=3)
    assert text == model.generate(prompt[-TOKENS:], 6, temperature=1.0, seed=3)
    assert any(model.generate(prompt, 6, temperature=1.0, seed=seed) != text for seed in (4, 5))
