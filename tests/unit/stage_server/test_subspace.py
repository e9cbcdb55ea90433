"""The Subspace Models baseline: blocks are confined, boundaries lose nothing, constants come from the seed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from stage_server import subspace
from stage_server.config import StageConfig
from stage_server.module import StageModule

B, T, V, D, WIDTH = 2, 9, 61, 32, 6
SUBSPACE = {
    "projection": "subspace",
    "anchor": "fixed",
    "latent_taps": 0,
    **dict.fromkeys(("identity", "centre", "norm", "gain", "bias"), False),
}


def run(stages: int = 3, seed: int = 0, **bottleneck: Any) -> StageConfig:
    model = {
        "vocab_size": V,
        "hidden_size": D,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "initializer_range": 0.3,  # large enough for every block to matter
    }
    return StageConfig.model_validate(
        {
            "stages": stages,
            "seed": seed,
            "model": model,
            "bottleneck": SUBSPACE | {"width": WIDTH} | bottleneck,
            "codec": {"forward": "none", "backward": "none"},
            "plan": {"tokens": T, "batch": B},
        }
    )


def test_a_boundary_loses_nothing() -> None:
    """What the next stage rebuilds from WIDTH numbers a token is the very stream, which is D wide."""
    config = run()
    first, second = StageModule(config, 0), StageModule(config, 1)
    ids_BT = torch.randint(0, V, (B, T), generator=torch.Generator().manual_seed(1))
    seen: list[Tensor] = []
    first.model.layers["0"].register_forward_hook(lambda _layer, _inputs, output: seen.append(output))
    second.model.layers["1"].register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        latents_BTk = first(ids_BT, None)
        second(ids_BT, latents_BTk)
    left_BTD, entered_BTD = seen
    assert latents_BTk.shape == (B, T, WIDTH)
    torch.testing.assert_close(entered_BTD, left_BTD, rtol=1e-5, atol=1e-5)
    moved_BTD = left_BTD - subspace.fixed_embedding_VD(config)[ids_BT]
    assert moved_BTD.norm() > 0.5 * left_BTD.norm(), "the blocks have moved the stream: there was something to lose"


def test_the_last_stage_is_free() -> None:
    config = run()
    last = StageModule(config, 2)
    ids_BT = torch.zeros(B, T, dtype=torch.int64)
    outputs: list[Tensor] = []
    last.model.layers["2"].mlp.down_proj.register_forward_hook(lambda _m, _i, output: outputs.append(output))
    last(ids_BT, torch.ones(B, T, WIDTH))
    inside = subspace.project(outputs[0], subspace.basis_Dk(config))
    assert not torch.allclose(inside, outputs[0], atol=1e-3)


def test_constants_are_the_runs_own() -> None:
    one, same, other = run(), run(), run(seed=1)
    basis_Dk = subspace.basis_Dk(one)
    torch.testing.assert_close(basis_Dk.mT @ basis_Dk, torch.eye(WIDTH), rtol=0, atol=1e-5)
    assert torch.equal(basis_Dk, subspace.basis_Dk(same))
    assert not torch.equal(basis_Dk, subspace.basis_Dk(other))
    names = {name for name, _ in StageModule(one, 1).named_global_parameters()}
    assert not any("boundaries" in name or "anchors" in name for name in names), "nothing of a boundary is trained"


@pytest.mark.parametrize("change", [{"norm": True}, {"identity": True}, {"gain": True}, {"anchor": "embedding"}])
def test_parts_that_would_break_it_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="projection = subspace needs"):
        run(**change)


def test_a_fixed_anchor_alone_is_refused() -> None:
    with pytest.raises(ValidationError, match="anchor = fixed is for"):
        run(projection="linear", identity=True)
