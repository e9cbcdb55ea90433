"""What makes a cut through the transformer cheap: encoder and decoder of one boundary.

    encoder:  u  = x - anchor(ids)
              z  = u[:h] + W_e u                     rectangular identity + learned projection
              b  = RMSNorm( z - mean so far of z )
    decoder:  x' = anchor(ids) + zeropad(g * b) + W_d (g * b)      g: learned gain per channel
                   + sum over k of W_k (g * b)(t - k)              latent taps

After ResBM (arXiv 2604.11947), section 3, with the norm, the gain and the anchors added: without the norm latents grow
by an order of magnitude at every boundary, and with anchors latents need not carry which token stands where. Without
centring, streams grow a constant part that is hundreds of times the rest; normalised to 16 levels nothing else is left.

Shapes: B batch, T tokens, D model width, h latent width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stage_server.config import BottleneckConfig

NORM_EPSILON = 1e-6
CENTRE_PRIOR = 2.0
"""Zeros, as a number of tokens, that a sequence's mean starts from: its first latent is not all subtracted."""


def rms_norm(x_BTh: Tensor) -> Tensor:
    """x / rms(x) over the last dimension, in float32, without learned weights."""
    x_BTh = x_BTh.float()
    return x_BTh * torch.rsqrt(x_BTh.square().mean(-1, keepdim=True) + NORM_EPSILON)


def centred(z_BTh: Tensor) -> Tensor:
    """z minus the mean of its sequence up to and with itself: causal, so a text can be generated token by token."""
    counts_T1 = torch.arange(1, z_BTh.shape[1] + 1, dtype=z_BTh.dtype, device=z_BTh.device).unsqueeze(-1)
    return z_BTh - z_BTh.cumsum(dim=1) / (counts_T1 + CENTRE_PRIOR)


def delayed(x_BTh: Tensor, distance: int) -> Tensor:
    """Each token's place taken by the one so many tokens before, zeros where there is none."""
    return nn.functional.pad(x_BTh, (0, 0, distance, 0))[:, : x_BTh.shape[1]]


class Encoder(nn.Module):
    """Residual stream to latent."""

    def __init__(self, config: BottleneckConfig, hidden: int, width: int) -> None:
        super().__init__()
        self.identity, self.norm, self.width = config.identity, config.norm, width
        self.centre = config.centre
        self.weight: Tensor | None
        if config.projection == "linear":
            self.weight = nn.Parameter(torch.empty(width, hidden))
        elif config.projection == "subspace":
            self.register_buffer("weight", torch.empty(width, hidden), persistent=False)
        else:
            self.register_parameter("weight", None)

    def forward(self, x_BTD: Tensor, anchor_BTD: Tensor | None) -> Tensor:
        """Latents float32 [B, T, h] of the stream [B, T, D]; the anchor, if any, is subtracted first."""
        u_BTD = x_BTD if anchor_BTD is None else x_BTD - anchor_BTD
        if self.centre:
            # bf16 would round away what little varies beside a large mean
            with torch.autocast(u_BTD.device.type, enabled=False):
                b_BTh = centred(self._project(u_BTD.float()))
        else:
            b_BTh = self._project(u_BTD)
        return rms_norm(b_BTh) if self.norm else b_BTh.float()

    def _project(self, u_BTD: Tensor) -> Tensor:
        return _sum(
            u_BTD[..., : self.width] if self.identity else None,
            None if self.weight is None else nn.functional.linear(u_BTD, self.weight),
        )


class Decoder(nn.Module):
    """Latent to residual stream."""

    def __init__(self, config: BottleneckConfig, hidden: int, width: int) -> None:
        super().__init__()
        self.identity, self.padding = config.identity, hidden - width
        self.weight: Tensor | None
        if config.projection == "linear":
            self.weight = nn.Parameter(torch.empty(hidden, width))
        elif config.projection == "subspace":
            self.register_buffer("weight", torch.empty(hidden, width), persistent=False)
        else:
            self.register_parameter("weight", None)
        # without projections a tap is a weight per channel: matrices as large as the stream's are no part of a boundary
        shape = (hidden, width) if config.projection == "linear" else (width,)
        distances = range(1, config.latent_taps + 1)
        self.earlier = nn.ParameterDict({str(distance): torch.empty(shape) for distance in distances})

    def forward(self, b_BTh: Tensor, anchor_BTD: Tensor | None) -> Tensor:
        """The stream [B, T, D] of latents [B, T, h] to which the gain is already applied."""
        x_BTD = _sum(
            self._padded(b_BTh) if self.identity else None,
            None if self.weight is None else nn.functional.linear(b_BTh, self.weight),
        )
        for distance, weight in self.earlier.items():
            earlier_BTh = delayed(b_BTh, int(distance))
            is_matrix = weight.ndim == 2
            x_BTD = x_BTD + (
                nn.functional.linear(earlier_BTh, weight) if is_matrix else self._padded(weight * earlier_BTh)
            )
        return x_BTD if anchor_BTD is None else x_BTD + anchor_BTD

    def _padded(self, b_BTh: Tensor) -> Tensor:
        return nn.functional.pad(b_BTh, (0, self.padding))


class Boundary(nn.Module):
    """One side of a boundary: the sending stage holds its encoder, the receiving stage its gain and decoder."""

    def __init__(
        self, *, encoder: Encoder | None = None, decoder: Decoder | None = None, gain: int | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        if gain is not None:
            self.gain = nn.Parameter(torch.empty(gain))
        else:
            self.register_parameter("gain", None)

    def use_basis(self, basis_Dh: Tensor) -> None:
        """Fixed orthonormal projections in place of learned ones (Subspace Models)."""
        if self.encoder is not None:
            self.encoder.weight = basis_Dh.mT.contiguous()
        if self.decoder is not None:
            self.decoder.weight = basis_Dh

    def encode(self, x_BTD: Tensor, anchor_BTD: Tensor | None) -> Tensor:
        """Latents to send; without an encoder the stream itself."""
        b_BTh: Tensor = x_BTD.float() if self.encoder is None else self.encoder(x_BTD, anchor_BTD)
        return b_BTh

    def decode(self, b_BTh: Tensor, anchor_BTD: Tensor | None) -> Tensor:
        """The stream of received latents; without a decoder they are the stream."""
        if self.decoder is None:
            return b_BTh
        x_BTD: Tensor = self.decoder(b_BTh if self.gain is None else self.gain * b_BTh, anchor_BTD)
        return x_BTD


def sending_side(config: BottleneckConfig, hidden: int, width: int) -> Boundary:
    """The part of a boundary that the upstream stage holds, parameters not initialised."""
    return Boundary(encoder=Encoder(config, hidden, width) if config.enabled else None)


def receiving_side(config: BottleneckConfig, hidden: int, width: int) -> Boundary:
    """The part of a boundary that the downstream stage holds, parameters not initialised."""
    if not config.enabled:
        return Boundary()
    return Boundary(decoder=Decoder(config, hidden, width), gain=width if config.gain else None)


def _sum(identity: Tensor | None, projected: Tensor | None) -> Tensor:
    if identity is None or projected is None:
        present = projected if identity is None else identity
        if present is None:
            raise ValueError("a boundary without identity and projection lets nothing cross")
        return present
    return identity + projected
