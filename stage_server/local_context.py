"""What a stage adds to its anchor from the tokens before, which it knows: local context that no wire need carry.

    anchor'(t) = anchor(t) + sum over k of w_k * anchor(t - k) + P[hash(id(t-1), id(t))]

The taps w_k, one weight per channel, are a short causal convolution; the table P of token pairs is hashed, after n-gram
embeddings. Both start at zero, so a run starts as it would without them.

Shapes: B batch, T tokens, D model width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stage_server.bottleneck import delayed

_HASH_BEFORE, _HASH_HERE = 0x9E3779B1, 0x85EBCA6B  # odd, so that all rows are reached; products stay below 2**63
_HASH_LOW = 1 << 16  # the low bits of a product know the low bits of an id alone
_NO_TOKEN = -1
"""What stands before the first token of a sequence."""


class LocalContext(nn.Module):
    """Taps on earlier tokens and a table of pairs, of one stage.

    Args:
        taps: earlier tokens mixed in; 0: none.
        pair_rows: rows of the table of pairs; 0: none.
        hidden: D.
    """

    def __init__(self, taps: int, pair_rows: int, hidden: int) -> None:
        super().__init__()
        if taps:
            self.taps = nn.Parameter(torch.empty(taps, hidden))
        else:
            self.register_parameter("taps", None)
        self.pairs = nn.Embedding(pair_rows, hidden) if pair_rows else None

    def forward(self, ids_BT: Tensor, anchor_BTD: Tensor) -> Tensor:
        """The anchors [B, T, D] of the token ids [B, T], with their context added."""
        in_context_BTD = anchor_BTD
        if self.taps is not None:
            for distance, weight_D in enumerate(self.taps, start=1):
                in_context_BTD = in_context_BTD + weight_D * delayed(anchor_BTD, distance)
        if self.pairs is not None:
            in_context_BTD = in_context_BTD + self.pairs(pair_rows_BT(ids_BT, self.pairs.num_embeddings))
        return in_context_BTD


def pair_rows_BT(ids_BT: Tensor, num_rows: int) -> Tensor:
    """The row of each token and the one before it: equal on every machine, int64 [B, T]."""
    before_BT = nn.functional.pad(ids_BT[:, :-1], (1, 0), value=_NO_TOKEN)
    return ((before_BT + 1) * _HASH_BEFORE ^ ids_BT * _HASH_HERE) // _HASH_LOW % num_rows
