"""Encoder and decoder compute the formulas they state, in every variant."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stage_server.bottleneck import CENTRE_PRIOR, centred, receiving_side, rms_norm, sending_side
from stage_server.config import BottleneckConfig

D, H = 10, 4

VARIANTS = [
    {"identity": identity, "projection": projection, "norm": norm, "gain": gain, "centre": False, "latent_taps": 0}
    for identity, projection, norm, gain in itertools.product(
        (True, False), ("linear", "none"), (True, False), (True, False)
    )
    if identity or projection == "linear"
]
TAPPED = [*VARIANTS, *({**variant, "latent_taps": 2} for variant in VARIANTS if variant["identity"])]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + 10)
    return module


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("with_anchor", [True, False])
def test_encoder_is_its_formula(variant: dict[str, Any], with_anchor: bool) -> None:
    sender = sending_side(BottleneckConfig(**variant), D, H)
    filled(sender)
    x, anchor = normal(2, 3, D), normal(2, 3, D, seed=1)
    u = x - anchor if with_anchor else x
    b = torch.zeros(2, 3, H)
    if variant["identity"]:
        b = b + u[..., :H]
    if variant["projection"] == "linear":
        assert sender.encoder is not None
        b = b + u @ sender.encoder.weight.T
    if variant["norm"]:
        b = b / b.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(sender.encode(x, anchor if with_anchor else None), b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", TAPPED, ids=str)
@pytest.mark.parametrize("with_anchor", [True, False])
def test_decoder_is_its_formula(variant: dict[str, Any], with_anchor: bool) -> None:
    receiver = receiving_side(BottleneckConfig(**variant), D, H)
    filled(receiver)
    b, anchor = normal(2, 3, H), normal(2, 3, D, seed=1)
    scaled = b * receiver.gain if variant["gain"] else b
    x = anchor.clone() if with_anchor else torch.zeros(2, 3, D)
    if variant["identity"]:
        x[..., :H] += scaled
    if variant["projection"] == "linear":
        assert receiver.decoder is not None
        x = x + scaled @ receiver.decoder.weight.T
    for distance in range(1, variant["latent_taps"] + 1):
        assert receiver.decoder is not None
        weight, earlier = receiver.decoder.earlier[str(distance)], scaled[:, :-distance]
        if variant["projection"] == "linear":
            x[:, distance:] += earlier @ weight.T
        else:
            x[:, distance:, :H] += weight * earlier
    torch.testing.assert_close(receiver.decode(b, anchor if with_anchor else None), x, rtol=1e-4, atol=1e-5)


def test_centring_takes_the_mean_so_far() -> None:
    z = normal(2, 6, H)
    for last in range(6):
        expected = z[:, last] - z[:, : last + 1].sum(1) / (last + 1 + CENTRE_PRIOR)
        torch.testing.assert_close(centred(z)[:, last], expected)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_centred_latent_tells_small_differences_beside_a_large_constant(precision: torch.dtype) -> None:
    sender = sending_side(BottleneckConfig(centre=True), D, H)
    filled(sender)
    small = 0.01 * normal(1, 400, D)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision is torch.bfloat16):
        alone, beside = sender.encode(small, None).detach(), sender.encode(small + 0.3, None).detach()
    late = slice(300, None)
    likeness = nn.functional.cosine_similarity(alone[:, late], beside[:, late], dim=-1)
    assert float(likeness.mean()) > 0.8


def test_a_disabled_bottleneck_lets_the_stream_through_untouched() -> None:
    config = BottleneckConfig(enabled=False)
    x = normal(2, 3, D)
    assert torch.equal(sending_side(config, D, D).encode(x, x), x)
    assert torch.equal(receiving_side(config, D, D).decode(x, x), x)
    assert not list(sending_side(config, D, D).parameters()) + list(receiving_side(config, D, D).parameters())


def test_the_identity_path_carries_only_the_first_coordinates() -> None:
    config = BottleneckConfig(projection="none", norm=False, gain=False, centre=False, latent_taps=0)
    x = normal(1, 2, D)
    back = receiving_side(config, D, H).decode(sending_side(config, D, H).encode(x, None), None)
    assert torch.equal(back[..., :H], x[..., :H])
    assert torch.equal(back[..., H:], torch.zeros(1, 2, D - H))


def test_latents_have_unit_rms_whatever_the_scale_of_the_stream() -> None:
    for scale in (1e-1, 1.0, 1e4):
        rms = rms_norm(normal(2, 3, H) * scale).square().mean(-1).sqrt()
        torch.testing.assert_close(rms, torch.ones(2, 3), rtol=2e-3, atol=0)


def test_an_all_zero_token_gives_zeros_not_nan() -> None:
    assert torch.equal(rms_norm(torch.zeros(1, 1, H)), torch.zeros(1, 1, H))
