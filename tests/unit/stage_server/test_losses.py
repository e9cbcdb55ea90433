"""A stage's own loss: of which tokens, that it sends nothing, and that its gradient comes along."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stage_server.bottleneck import rms_norm
from stage_server.config import CodecConfig, StageConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.losses import local_loss, local_loss_weight, next_token_loss, with_gradient_of
from stage_server.module import StageModule
from stage_server.trainer import StageTrainer

X = TypeVar("X")
B, T, D, V = 2, 7, 8, 50


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ids_BT(seed: int = 0) -> Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def present(value: X | None) -> X:
    assert value is not None
    return value


def test_it_is_the_mean_over_all_tokens_with_a_successor() -> None:
    x_BTD, ids, head_VD = drawn(B, T, D), ids_BT(), drawn(V, D, seed=1)
    log_p = torch.log_softmax(rms_norm(x_BTD) @ head_VD.T, dim=-1)
    losses = [-log_p[b, t, ids[b, t + 1]] for b in range(B) for t in range(T - 1)]
    torch.testing.assert_close(local_loss(x_BTD, ids, head_VD), torch.stack(losses).mean())


def test_what_is_sent_stays_and_the_gradient_of_the_loss_comes_along() -> None:
    x_BTD = drawn(B, T, D).requires_grad_()
    sent, loss = 2 * x_BTD, x_BTD.square().sum()
    carried = with_gradient_of(0.5 * loss, sent)
    assert torch.equal(carried, sent)
    gradient_BTD = drawn(B, T, D, seed=1)
    carried.backward(gradient_BTD)
    torch.testing.assert_close(x_BTD.grad, 2 * gradient_BTD + x_BTD.detach())


def config(tokens: int = T, **bottleneck: object) -> StageConfig:
    model = {"vocab_size": V, "hidden_size": D, "intermediate_size": 16, "num_attention_heads": 2}
    values = {
        "stages": 3,
        "model": model | {"num_key_value_heads": 2, "num_hidden_layers": 3},
        "bottleneck": {"width": 4, **bottleneck},
        "plan": {"steps": 100, "microbatches_per_step": 4, "batch": B, "tokens": tokens},
    }
    return StageConfig.model_validate(values)


@pytest.mark.parametrize("stage", [0, 1])
def test_a_stage_whose_latents_nobody_uses_learns_all_the_same(stage: int) -> None:
    latents = None if stage == 0 else drawn(B, T, 4)
    norms = {}
    for weight in (0.0, 0.5, 1.0):
        module = StageModule(config(), stage)
        sent_BTh = module(ids_BT(), latents, weight)
        sent_BTh.backward(torch.zeros_like(sent_BTh))
        layers = [p.grad for p in module.model.layers.parameters()]
        norms[weight] = sum(float(grad.norm()) for grad in layers if grad is not None)
    assert norms[0.0] == 0
    assert norms[0.5] == pytest.approx(norms[1.0] / 2)


def test_nothing_is_sent_differently_and_the_last_stage_has_its_own_loss_anyway() -> None:
    for stage, latents in ((0, None), (1, drawn(B, T, 4)), (2, drawn(B, T, 4))):
        module = StageModule(config(), stage)
        assert torch.equal(module(ids_BT(), latents, 0.3), module(ids_BT(), latents))


def test_it_fades_over_its_part_of_the_run() -> None:
    fading = config(local_loss=0.8, local_loss_until=0.5)
    weights = [local_loss_weight(fading, step) for step in (0, 1, 25, 49, 50, 51, 100, 1000)]
    assert weights == pytest.approx([0.2, 0.196, 0.1, 0.004, 0.0, 0.0, 0.0, 0.0])
    assert local_loss_weight(config(local_loss=0.8), 50) == pytest.approx(0.1)
    assert local_loss_weight(config(), 1) == 0.0


def test_stages_follow_the_gradient_of_all_losses_together() -> None:
    """Against autograd of one sum, the last stage's loss and each earlier one's, through an uncut chain of modules."""
    chosen = config(local_loss=0.8).model_copy(update={"codec": CodecConfig(forward="none", backward="none")})
    name = MicrobatchId(StepIndex(10), MicrobatchKind.TRAIN, 0)
    token_ids = np.random.default_rng(0).integers(0, V, (B, T + 1), dtype=np.int32)
    first, middle, last = (StageTrainer(chosen, "run", stage, activation_budget_bytes=1 << 30) for stage in range(3))
    received = middle.forward(name, token_ids, first.forward(name, token_ids, None))
    _, gradients = last.forward_backward(name, token_ids, received)
    assert gradients is not None
    first.backward(name, present(middle.backward(name, gradients)))

    modules = [StageModule(chosen, stage) for stage in range(3)]
    ids = torch.from_numpy(token_ids).long()
    total, x = torch.zeros(()), None
    for module in modules:
        streams: list[Tensor] = []
        list(module.model.layers.values())[-1].register_forward_hook(lambda *call, kept=streams: kept.append(call[-1]))
        x = module(ids[:, :-1], x)
        if not module.is_last:
            table = module.model.embed_tokens if module.is_first else module.anchors[str(module.stage)]
            total = total + 0.8 * 0.9 / 4 * local_loss(streams[0], ids[:, :-1], table.weight)
    (total + next_token_loss(present(x), ids[:, 1:]) / 4).backward()
    for trainer, module in zip((first, middle, last), modules, strict=True):
        expected = dict(module.named_parameters())
        for parameter, tensor in trainer.module.named_parameters():
            torch.testing.assert_close(tensor.grad, expected[parameter].grad, rtol=1e-4, atol=1e-7, msg=parameter)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValidationError, match="learned anchor"):
        config(local_loss=0.3, anchor="none")
    with pytest.raises(ValidationError, match=r"plan\.tokens of at least 2"):
        config(tokens=1, local_loss=0.3)
    with pytest.raises(ValidationError, match="greater than 0"):
        config(local_loss=0.3, local_loss_until=0.0)
    with pytest.raises(ValidationError, match="greater than or equal to 0"):
        config(local_loss=-1.0)
