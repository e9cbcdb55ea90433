"""A next-token loss of a stage's own, where its stream ends: what trains an early stage beside what comes back.

All that a later stage's loss tells an earlier one comes through the h channels of its latents, and while these say
nothing, the later stage learns to ignore them and nothing comes back. A loss of its own reaches all D channels from the
first step. Every stage knows the token ids, so it costs no byte; its head is the stage's own table of embeddings, so it
has no parameters.

Deeply supervised nets (arXiv 1409.5185) and local losses in pipelines (arXiv 1901.08164) are the sources.

Shapes: B batch, T tokens, D model width, h latent width, V vocabulary, N tokens chosen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stage_server.bottleneck import rms_norm


def local_loss(x_BTD: Tensor, ids_BT: Tensor, head_VD: Tensor, stride: int) -> Tensor:
    """Mean cross entropy of every `stride`-th token's successor within the microbatch, nats, float32 scalar.

    Which tokens it starts from follows from the ids, so that each has its turn and everybody chooses the same.

    Args:
        x_BTD: the stream before the boundary.
        ids_BT: input token ids; the last one's successor is not among them.
        head_VD: a row for each token.
        stride: 1 takes all; more costs less.
    """
    first = int(ids_BT.sum()) % stride if stride > 1 else 0  # an accelerator need not be waited for
    chosen_BND, successors_BN = x_BTD[:, first:-1:stride], ids_BT[:, first + 1 :: stride]
    logits_BNV = nn.functional.linear(rms_norm(chosen_BND), head_VD)
    return nn.functional.cross_entropy(logits_BNV.float().flatten(0, 1), successors_BN.flatten())


def carrying(sent: Tensor, loss: Tensor) -> Tensor:
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
