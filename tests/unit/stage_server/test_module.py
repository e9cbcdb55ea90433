"""A stage is a true slice of the whole transformer, initialised alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from stage_server.config import StageConfig
from stage_server.errors import ConfigImpossible
from stage_server.losses import next_token_loss
from stage_server.module import StageModule, layer_range, transformers_config

B, T, V = 2, 12, 61


def run(model_type: str = "llama", stages: int = 3, seed: int = 0, **parts: Any) -> StageConfig:
    model = {
        "model_type": model_type,
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | parts.pop("model", {})
    plan = {"tokens": T, "batch": B}
    return StageConfig.model_validate({"stages": stages, "seed": seed, "model": model, "plan": plan} | parts)


PLAIN = {"bottleneck": {"enabled": False}, "codec": {"forward": "none", "backward": "none"}}


def token_ids(seed: int = 0, length: int = T) -> Tensor:
    return torch.randint(0, V, (B, length), generator=torch.Generator().manual_seed(seed))


def chained(stages: list[StageModule], ids_BT: Tensor) -> Tensor:
    x: Tensor | None = None
    for stage in stages:
        x = stage(ids_BT, x)
    assert x is not None
    return x


@given(st.integers(1, 40), st.data())
def test_layers_are_spread_contiguously_and_evenly(num_layers: int, data: st.DataObject) -> None:
    num_stages = data.draw(st.integers(1, num_layers))
    ranges = [layer_range(num_layers, num_stages, stage) for stage in range(num_stages)]
    assert [layer for layers in ranges for layer in layers] == list(range(num_layers))
    sizes = [len(layers) for layers in ranges]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)  # the last stage, which has the head, never has more


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_uncompressed_stages_in_a_row_are_the_plain_transformer(model_type: str, num_stages: int) -> None:
    config = run(model_type, num_stages, **PLAIN)
    stages = [StageModule(config, stage) for stage in range(num_stages)]
    plain = AutoModelForCausalLM.from_config(
        transformers_config(config.model), attn_implementation="sdpa", dtype=torch.float32
    )
    ours = {name: parameter for stage in stages for name, parameter in stage.named_global_parameters()}
    plain.load_state_dict({name: parameter.detach().clone() for name, parameter in ours.items()}, strict=True)
    ids, targets = token_ids(0), token_ids(1)

    expected = plain(input_ids=ids, use_cache=False).logits
    logits = chained(stages, ids)
    assert torch.equal(logits, expected)

    loss, expected_loss = next_token_loss(logits, targets), next_token_loss(expected, targets)
    assert torch.equal(loss, expected_loss)
    loss.backward()
    expected_loss.backward()
    for name, parameter in plain.named_parameters():
        gradient = ours[name].grad
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("num_stages", [1, 3])
def test_an_uncompressed_stream_is_multiplied_once_where_it_begins(num_stages: int) -> None:
    config = run(stages=num_stages, model={"embedding_multiplier": 30.0}, **PLAIN)
    stages = [StageModule(config, stage) for stage in range(num_stages)]
    logits = chained(stages, token_ids())
    with torch.no_grad():
        stages[0].model.embed_tokens.weight.mul_(30.0)
    plain = run(stages=num_stages, **PLAIN)
    unmultiplied = [StageModule(plain, stage) for stage in range(num_stages)]
    for there, here in zip(unmultiplied, stages, strict=True):
        there.load_state_dict(here.state_dict())
    assert torch.equal(logits, chained(unmultiplied, token_ids()))


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("taps", [0, 2])
def test_all_that_a_stage_starts_from_is_multiplied(stage: int, taps: int) -> None:
    bottleneck = {"width": 8, "taps": taps}
    one = StageModule(run(bottleneck=bottleneck), stage)
    many = StageModule(run(bottleneck=bottleneck, model={"embedding_multiplier": 50.0}), stage)
    latents = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(1)) if stage else None
    for before, after in zip(one._enter(token_ids(), latents), many._enter(token_ids(), latents), strict=True):
        assert before is not None and after is not None
        torch.testing.assert_close(after, 50.0 * before)


def test_latents_without_a_norm_keep_the_scale_of_the_stream_they_come_from() -> None:
    raw: dict[str, Any] = {"bottleneck": {"width": 8, "norm": False, "bias": False, "anchor": "none"}}
    raw |= {"codec": {"forward": "none", "backward": "none"}}
    latents = torch.randn(B, T, 8, generator=torch.Generator().manual_seed(1))
    one, many = (StageModule(run(model={"embedding_multiplier": m}, **raw), 1) for m in (1.0, 50.0))
    assert torch.equal(one._enter(token_ids(), latents)[0], many._enter(token_ids(), latents)[0])


def test_what_layers_add_to_the_stream_can_start_smaller() -> None:
    usual, small = (
        dict(StageModule(run(model={"residual_init": share}), 0).named_global_parameters()) for share in (1.0, 0.1)
    )
    for name, parameter in usual.items():
        share = 0.1 if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
        torch.testing.assert_close(small[name], share * parameter, msg=name)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "changes", [{}, PLAIN, {"bottleneck": {"taps": 3, "latent_taps": 2, "pair_rows": 50}}], ids=str
)
def test_future_tokens_do_not_change_past_logits(model_type: str, changes: dict[str, Any]) -> None:
    config = run(model_type, **changes)
    stages = [StageModule(config, stage) for stage in range(config.stages)]
    ids = token_ids()
    changed = ids.clone()
    changed[:, T // 2 :] = (changed[:, T // 2 :] + 1) % V
    before, after = chained(stages, ids), chained(stages, changed)
    assert torch.equal(before[:, : T // 2], after[:, : T // 2])
    assert not torch.equal(before[:, T // 2 :], after[:, T // 2 :])


def test_positions_matter() -> None:
    stages = [StageModule(run(stages=1), 0)]
    ids = torch.full((1, 6), 3)
    ids[0, 0] = 5
    swapped = ids.clone()
    swapped[0, :2] = ids[0, [1, 0]]
    assert not torch.allclose(chained(stages, ids)[0, -1], chained(stages, swapped)[0, -1], atol=1e-6)


@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_rotary_frequencies_are_those_of_transformers(model_type: str) -> None:
    config = run(model_type)
    plain = AutoModelForCausalLM.from_config(transformers_config(config.model))
    for stage in range(config.stages):
        module = StageModule(config, stage)
        assert torch.equal(module.rotary.inv_freq, plain.model.rotary_emb.inv_freq)
        assert not any(tensor.is_meta for tensor in [*module.parameters(), *module.buffers()])


@pytest.mark.parametrize("num_stages", [2, 4])
def test_weights_do_not_depend_on_how_the_model_is_cut(num_stages: int) -> None:
    whole = dict(StageModule(run(stages=1), 0).named_global_parameters())
    seen: set[str] = set()
    for stage in range(num_stages):
        for name, parameter in StageModule(run(stages=num_stages), stage).named_global_parameters():
            assert name not in seen, "two stages claim one parameter"
            seen.add(name)
            if name in whole:
                assert torch.equal(parameter, whole[name]), name
    assert whole.keys() <= seen


def test_a_stage_is_initialised_alike_every_time_and_differently_with_another_seed() -> None:
    first, again, other = (dict(StageModule(run(seed=seed), 1).named_global_parameters()) for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    zero = ("contexts.", "boundaries.0.decoder.earlier.")
    drawn = [name for name in first if first[name].ndim > 1 and not name.startswith(zero)]
    assert drawn and not any(torch.equal(first[name], other[name]) for name in drawn)


def test_no_two_drawn_parameters_are_alike() -> None:
    matrices = [p for _, p in StageModule(run(stages=1), 0).named_global_parameters() if p.ndim == 2]
    for index, left in enumerate(matrices):
        assert all(left.shape != right.shape or not torch.equal(left, right) for right in matrices[index + 1 :])


def test_anchors_start_as_copies_of_the_embedding_and_independent_ones_do_not() -> None:
    embedding = dict(StageModule(run(), 0).named_global_parameters())["model.embed_tokens.weight"]
    for stage in (1, 2):
        anchor = dict(StageModule(run(), stage).named_global_parameters())[f"anchors.{stage}.weight"]
        assert torch.equal(anchor, embedding)
        own = run(bottleneck={"anchor": "independent"})
        independent = dict(StageModule(own, stage).named_global_parameters())[f"anchors.{stage}.weight"]
        assert not torch.equal(independent, embedding)
        none = dict(StageModule(run(bottleneck={"anchor": "none"}), stage).named_global_parameters())
        assert not any(name.startswith("anchors.") for name in none)


def test_the_decoded_stream_starts_a_little_above_the_anchor_and_raw_streams_keep_their_scale() -> None:
    for width in (2, 8, 32):
        config = run(bottleneck={"width": width, "projection": "none", "anchor": "none", "bias": False})
        stage = StageModule(config, 1)
        stream, _ = stage._enter(token_ids(), torch.ones(B, T, width))
        assert float(stream.detach().square().mean().sqrt()) == pytest.approx(2.5 * 0.02, rel=1e-5)
    raw = run(bottleneck={"norm": False}, codec={"forward": "none", "backward": "none"})
    assert torch.equal(StageModule(raw, 1).boundaries["0"].gain, torch.ones(raw.latent_width))


def test_names_say_where_a_parameter_belongs() -> None:
    names = [[name for name, _ in StageModule(run(), stage).named_global_parameters()] for stage in range(3)]
    outside = [[name for name in stage if not name.startswith("model.layers.")] for stage in names]
    assert outside == [
        ["biases.0", "boundaries.0.encoder.weight", "contexts.0.taps", "model.embed_tokens.weight"],
        [
            "anchors.1.weight",
            "biases.1",
            "boundaries.0.decoder.earlier.1",
            "boundaries.0.decoder.earlier.2",
            "boundaries.0.decoder.weight",
            "boundaries.0.gain",
            "boundaries.1.encoder.weight",
            "contexts.1.taps",
        ],
        [
            "anchors.2.weight",
            "biases.2",
            "boundaries.1.decoder.earlier.1",
            "boundaries.1.decoder.earlier.2",
            "boundaries.1.decoder.weight",
            "boundaries.1.gain",
            "contexts.2.taps",
            "lm_head.weight",
            "model.norm.weight",
        ],
    ]
    layers = [
        sorted({int(name.split(".")[2]) for name in stage if name.startswith("model.layers.")}) for stage in names
    ]
    assert layers == [[0, 1], [2], [3]]


@pytest.mark.parametrize(
    "bottleneck",
    [
        {"enabled": False},
        {"identity": False},
        {"projection": "none"},
        {"norm": False},
        {"gain": False},
        {"anchor": "none"},
        {"anchor": "independent"},
        {"taps": 2, "pair_rows": 64},
        {"latent_taps": 2},
        {"width": 32, "projection": "none", "latent_taps": 2},
        {"bias": False, "taps": 0},
        {"centre": False},
        {"width": 32, "projection": "none"},  # uncompressed, with norm and anchors: the fair control
        {"identity": False, "norm": False, "gain": False, "anchor": "none"},
    ],
    ids=str,
)
def test_every_variant_trains_every_parameter(bottleneck: dict[str, Any]) -> None:
    config = run(bottleneck=bottleneck, codec={"forward": "none", "backward": "none"})
    stages = [StageModule(config, stage) for stage in range(config.stages)]
    next_token_loss(chained(stages, token_ids(0)), token_ids(1)).backward()
    for stage in stages:
        for name, parameter in stage.named_global_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.abs().sum() > 0), name


def test_a_custom_head_dimension_is_passed_on() -> None:
    config = run("qwen3", model={"extra": {"head_dim": 16}})
    parameters = dict(StageModule(config, 0).named_global_parameters())
    assert parameters["model.layers.0.self_attn.q_proj.weight"].shape == (64, 32)


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("llama", {"attention_dropout": 0.1}),
        ("llama", {"hidden_size": 64}),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 4}),
    ],
)
def test_what_cannot_be_cut_exactly_is_refused(model_type: str, extra: dict[str, Any]) -> None:
    with pytest.raises(ConfigImpossible):
        StageModule(run(model_type, model={"extra": extra}), 0)


@pytest.mark.parametrize("stage", [-1, 3])
def test_a_stage_that_does_not_exist_is_refused(stage: int) -> None:
    with pytest.raises(ConfigImpossible):
        StageModule(run(), stage)
