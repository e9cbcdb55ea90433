"""What is minimised: the last stage's next-token loss and, if asked for, one of each earlier stage's own.

All that a later stage's loss tells an earlier one comes through the h channels of its latents, and while these say
nothing, the later stage learns to ignore them and nothing comes back. A local loss reaches all D channels from the
first step, and what it says of received latents goes back to the stages before. Every stage knows the token ids, so it
costs no byte; its head is the stage's own table of embeddings, so it has no parameters. After deeply supervised nets
(arXiv 1409.5185).

Shapes: B batch, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stage_server.bottleneck import rms_norm
from stage_server.config import StageConfig


def next_token_loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Mean cross entropy over all targets, float32 scalar, nats per token."""
    return nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())


def local_loss(x_BTD: Tensor, ids_BT: Tensor, head_VD: Tensor) -> Tensor:
    """The next-token loss of a stream before its boundary, float32 scalar, nats per token.

    Args:
        x_BTD: the stream.
        ids_BT: input token ids, T > 1; what follows the last one is not among them, so that one does not count.
        head_VD: a row for each token.
    """
    logits_BTV = nn.functional.linear(rms_norm(x_BTD[:, :-1]), head_VD)
    return next_token_loss(logits_BTV, ids_BT[:, 1:])


def local_loss_weight(config: StageConfig, step: int) -> float:
    """What a microbatch of this step (1-based) counts its local loss: its share of the step, and fading over the run.

    It is meant to bring latents to life early. What an early stage knows of the next token need not be what a later one
    needs of it, so the last stage's loss has the last word.
    """
    bottleneck, plan = config.bottleneck, config.plan
    if not bottleneck.enabled:
        return 0.0
    remaining = max(0.0, 1.0 - step / (bottleneck.local_loss_until * plan.steps))
    return remaining * bottleneck.local_loss / plan.microbatches_per_step


def with_gradient_of(loss: Tensor, sent: Tensor) -> Tensor:
    """What is sent, unchanged; its backward pass brings the gradient of `loss` along."""
    carried: Tensor = _Carrying.apply(sent, loss)  # type: ignore[no-untyped-call]
    return carried


class _Carrying(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent: Tensor, loss: Tensor) -> Tensor:
        return sent.view_as(sent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())
