"""What a trainer says it holds is what it holds: counted here a second time, by other means."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from stage_server.activations import ActivationMeter
from stage_server.codec import Packed, backward_encoding, pack
from stage_server.config import StageConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.trainer import StageTrainer, TokenIds

BATCH, TOKENS, WIDTH = 2, 24, 6


def run(stages: int = 3) -> StageConfig:
    model = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    plan = {"microbatches_per_step": 4, "batch": BATCH, "tokens": TOKENS}
    return StageConfig.model_validate({"stages": stages, "model": model, "bottleneck": {"width": WIDTH}, "plan": plan})


def name(index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, index)


def token_ids() -> TokenIds:
    return np.zeros((BATCH, TOKENS + 1), dtype=np.int32)


def middle(budget: int) -> StageTrainer:
    return StageTrainer(run(), "run", 1, activation_budget_bytes=budget)


def latents(trainer: StageTrainer) -> Packed:
    sender = StageTrainer(trainer.config, "run", 0, activation_budget_bytes=0)
    return sender.forward(name(0), token_ids(), None)


def gradients(trainer: StageTrainer) -> Packed:
    return pack(torch.ones(BATCH, TOKENS, WIDTH), backward_encoding(trainer.config.codec), 1.0)


def storages(tensors: Iterator[Tensor]) -> dict[int, int]:
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if not t.is_meta}


def saved_by(output: Tensor) -> Iterator[Tensor]:
    """Every tensor that an autograd graph holds, found by walking it."""
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for attribute in dir(node):
            if attribute.startswith("_saved_"):
                value = getattr(node, attribute)
                yield from (
                    t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor)
                )
        todo.extend(parent for parent, _ in node.next_functions)


def test_a_microbatchs_activations_are_what_autograd_keeps_alive() -> None:
    trainer = middle(2**40)
    trainer.forward(name(0), token_ids(), latents(trainer))
    (graph,) = trainer._graphs.values()
    assert graph.received_BTh is not None
    held = storages(saved_by(graph.output)) | storages(iter([graph.output.detach(), graph.received_BTh.detach()]))
    weights = storages(iter(trainer.module.parameters()))
    expected = sum(size for storage, size in held.items() if storage not in weights)
    assert trainer.memory().microbatch_activations_bytes == expected
    dense_bytes = BATCH * TOKENS * 32 * 4
    assert expected > 5 * dense_bytes  # a layer keeps several times its stream: counting nothing would be noticed


def test_parameters_gradients_and_optimizer_state_are_counted() -> None:
    trainer = StageTrainer(run(1), "run", 0, activation_budget_bytes=0)
    weights_bytes = sum(p.numel() * 4 for p in trainer.module.parameters())
    before = trainer.memory()
    assert (before.parameters_bytes, before.gradients_bytes, before.optimizer_bytes) == (weights_bytes, 0, 0)
    trainer.forward_backward(name(0), token_ids(), None)
    assert trainer.memory().gradients_bytes == weights_bytes
    trainer.commit(1)
    after = trainer.memory()
    assert after.gradients_bytes == 0
    state = [t for key, t in trainer.state_tensors().items() if key.startswith("optimizer.")]
    assert after.optimizer_bytes == sum(t.numel() * t.element_size() for t in state)
    assert weights_bytes <= after.optimizer_bytes <= 2.1 * weights_bytes  # one moment for Muon, two for AdamW


@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_no_more_activations_are_kept_than_the_budget_allows(room: int) -> None:
    probe = middle(2**40)
    probe.forward(name(0), token_ids(), latents(probe))
    one = probe.memory().microbatch_activations_bytes

    trainer = middle(room * one + one // 2)
    sent, back = latents(trainer), gradients(trainer)
    for index in range(4):
        trainer.forward(name(index), token_ids(), sent)
        assert trainer.memory().activations_bytes == min(index + 1, room) * one
    assert trainer.num_in_flight == 4
    for index in range(4):
        trainer.backward(name(index), back)
    report = trainer.memory()
    assert report.activations_bytes == 0
    assert report.peak_activations_bytes == max(1, room) * one


def test_recomputation_is_counted_in_the_peak() -> None:
    trainer = middle(0)
    sent, back = latents(trainer), gradients(trainer)
    trainer.forward(name(0), token_ids(), sent)
    assert trainer.memory().peak_activations_bytes == 0
    trainer.backward(name(0), back)
    report = trainer.memory()
    assert report.peak_activations_bytes == report.microbatch_activations_bytes > 0


def living_tensors() -> list[Tensor]:
    gc.collect()
    # by type: isinstance would touch, and so wake, deprecated objects of torch
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


def test_over_budget_only_the_inputs_stay_alive() -> None:
    trainer = middle(0)
    sent = latents(trainer)
    before = {id(tensor) for tensor in living_tensors()}
    trainer.forward(name(0), token_ids(), sent)
    left = [tensor for tensor in living_tensors() if id(tensor) not in before]
    assert sum(tensor.numel() for tensor in left) < BATCH * TOKENS * WIDTH


def test_views_of_one_storage_count_once_and_parameters_never() -> None:
    weight = torch.nn.Parameter(torch.ones(8, 8))
    meter = ActivationMeter([weight], budget_bytes=1)
    x = torch.ones(4, 8)
    with meter.measuring():
        y = x.view(4, 8) @ weight  # keeps x and the weight
        z = y * y.view(4, 8)  # keeps y twice
    assert z.requires_grad
    assert meter.microbatch_bytes == x.nbytes + y.nbytes
