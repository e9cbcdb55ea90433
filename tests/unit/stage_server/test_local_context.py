"""Local context reads earlier tokens only, and starts as if it were not there."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stage_server.local_context import LocalContext, pair_rows_BT

B, T, D, V = 2, 7, 4, 50


def context(taps: int, pair_rows: int, *, fill: float | None = None) -> LocalContext:
    module = LocalContext(taps, pair_rows, D)
    for parameter in module.parameters():
        if fill is None:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
        else:
            nn.init.constant_(parameter, fill)
    return module


def ids_BT(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(seed))


def anchors_BTD(ids: torch.Tensor) -> torch.Tensor:
    return torch.randn(V, D, generator=torch.Generator().manual_seed(2))[ids]


def test_zeros_add_nothing() -> None:
    anchor_BTD = anchors_BTD(ids_BT())
    assert torch.equal(context(3, 16, fill=0.0)(ids_BT(), anchor_BTD), anchor_BTD)


def test_taps_are_a_causal_convolution() -> None:
    module, anchor_BTD = context(2, 0), anchors_BTD(ids_BT())
    expected_D = anchor_BTD[1, 4] + module.taps[0] * anchor_BTD[1, 3] + module.taps[1] * anchor_BTD[1, 2]
    torch.testing.assert_close(module(ids_BT(), anchor_BTD)[1, 4], expected_D)
    assert torch.equal(module(ids_BT(), anchor_BTD)[0, 0], anchor_BTD[0, 0]), "nothing stands before the first token"


@given(changed=st.integers(0, T - 1))
def test_no_token_sees_a_later_one(changed: int) -> None:
    before, after = ids_BT(), ids_BT()
    after[:, changed] = (after[:, changed] + 1) % V
    module = context(3, 16)
    same = module(before, anchors_BTD(before)) == module(after, anchors_BTD(after))
    assert bool(same[:, :changed].all())
    assert not bool(same[:, changed].all())


def test_more_taps_than_tokens_read_nothing() -> None:
    module, anchor_BTD = context(T + 2, 0), anchors_BTD(ids_BT())
    assert module(ids_BT(), anchor_BTD).shape == anchor_BTD.shape


def test_pairs_spread_evenly_over_all_rows() -> None:
    """Rows of the table are worth their memory only when no row holds far more than its share."""
    first, second = torch.meshgrid(torch.arange(1, 301), torch.arange(300), indexing="ij")
    ids = torch.stack([first.flatten(), second.flatten()], dim=1)
    for num_rows in (1000, 1024):
        counts = torch.bincount(pair_rows_BT(ids, num_rows)[:, 1], minlength=num_rows)
        assert int(counts.min()) > 0
        assert int(counts.max()) < 3 * len(ids) / num_rows


def test_a_pair_has_the_same_row_wherever_it_stands_and_order_counts() -> None:
    rows = pair_rows_BT(torch.tensor([[3, 4, 3, 4, 4, 3]]), 4096)[0]
    assert rows[1] == rows[3] and rows[2] == rows[5]
    assert rows[1] != rows[2]
    assert rows[0] != rows[2], "the first token of a sequence is no pair"
