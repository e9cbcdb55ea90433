"""One stage of a Hugging Face decoder-only model: its layers, and what it holds of its boundaries.

The module tree mirrors the names of the whole model, so `named_parameters()` of any stage gives global names
(`model.layers.3.self_attn.q_proj.weight`, `anchors.1.weight`, `boundaries.0.encoder.weight`), and the stages' names are
disjoint. Every parameter is drawn from a generator of its own, seeded by the run's seed and that name: a stage
initialised alone equals the same slice of the whole model.

Shapes: B batch, T tokens, D model width, h latent width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from stage_server import subspace
from stage_server.bottleneck import Boundary, receiving_side, sending_side
from stage_server.config import LEARNED_ANCHORS, AnchorKind, ModelConfig, StageConfig
from stage_server.errors import ConfigImpossible
from stage_server.local_context import LocalContext
from stage_server.losses import local_loss, with_gradient_of

SUBTRACTED = frozenset({AnchorKind.EMBEDDING, AnchorKind.FIXED})
EMBEDDING_NAME = "model.embed_tokens.weight"
ADDED_TO_THE_STREAM = (".o_proj.weight", ".down_proj.weight")
INITIAL_RATIO = 2.5
"""Initial RMS of decoded latents, and of a bias, over that of the anchors."""


def layer_range(num_layers: int, num_stages: int, stage: int) -> range:
    """The layers of a stage: contiguous, as even as can be; earlier stages take one more, the last has the head."""
    base, more = divmod(num_layers, num_stages)
    start = stage * base + min(stage, more)
    return range(start, start + base + (stage < more))


def transformers_config(model: ModelConfig) -> Any:
    """The transformers config of the whole model.

    Raises:
        ConfigImpossible: `model.extra` repeats a field of its own, or asks for something that cannot be cut exactly
            (dropout, sliding windows).
    """
    fields = model.model_dump(exclude={"model_type", "extra", "residual_init", "embedding_multiplier"})
    if repeated := sorted(fields.keys() & model.extra.keys()):
        raise ConfigImpossible(f"model.extra.{repeated[0]} repeats model.{repeated[0]}")
    fields |= {"head_dim": model.hidden_size // model.num_attention_heads, "pad_token_id": None} | model.extra
    fields |= {"bos_token_id": None, "eos_token_id": None, "use_cache": False}
    try:
        config = AutoConfig.for_model(model.model_type, **fields)
    except (TypeError, ValueError, KeyError) as problem:
        raise ConfigImpossible(f"transformers refuses the model: {problem}") from problem
    if getattr(config, "attention_dropout", 0):
        raise ConfigImpossible("model.extra.attention_dropout is not 0: training would not be reproducible")
    if set(getattr(config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ConfigImpossible("model.extra asks for sliding-window attention: only full attention is supported")
    return config


class StageModule(nn.Module):
    """Stage s of S: embedding or decoder, layers, encoder or norm and head.

    Args:
        config: the run's; decides everything.
        stage: index s, 0 to S-1.
        device: where the parameters live. Initial values are drawn on the CPU, so they are the same on every device.
    """

    model: Any  # parts of transformers' model, under their own names
    lm_head: Any
    rotary: Any
    basis: Tensor
    fixed: Tensor

    def __init__(self, config: StageConfig, stage: int, device: torch.device | str = "cpu") -> None:
        super().__init__()
        if not 0 <= stage < config.stages:
            raise ConfigImpossible(f"stage {stage} does not exist: the run has stages 0 to {config.stages - 1}")
        self.stage, self.is_first, self.is_last = stage, stage == 0, stage == config.stages - 1
        self.subtracts_anchor = config.bottleneck.enabled and config.bottleneck.anchor in SUBTRACTED
        self._multiplier = config.model.embedding_multiplier
        # latents without a norm have the stream's own scale already
        is_normed = config.bottleneck.enabled and config.bottleneck.norm
        self._latent_multiplier = self._multiplier if is_normed else 1.0
        hf_config = transformers_config(config.model)
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=torch.float32)
            self._take_layers(whole, config)
            self._add_boundaries(config)
        # buffers are computed, not learned: a fresh instance off the meta device has them right
        self.rotary = type(whole.model.rotary_emb)(config=hf_config)
        self._materialise(config, torch.device(device))
        self.is_confined = config.bottleneck.enabled and config.bottleneck.projection == "subspace"
        if self.is_confined:
            self._confine(config, torch.device(device))

    def _take_layers(self, whole: Any, config: StageConfig) -> None:
        layers = layer_range(config.model.num_hidden_layers, config.stages, self.stage)
        self.model = nn.Module()
        if self.is_first:
            self.model.embed_tokens = whole.model.embed_tokens
        self.model.layers = nn.ModuleDict({str(i): whole.model.layers[i] for i in layers})
        if self.is_last:
            self.model.norm = whole.model.norm
            self.lm_head = whole.lm_head

    def _add_boundaries(self, config: StageConfig) -> None:
        bottleneck, hidden, width = config.bottleneck, config.model.hidden_size, config.latent_width
        self.anchors, self.boundaries = nn.ModuleDict(), nn.ModuleDict()
        if not self.is_first:
            self.boundaries[str(self.stage - 1)] = receiving_side(bottleneck, hidden, width)
            if bottleneck.enabled and bottleneck.anchor in LEARNED_ANCHORS:
                self.anchors[str(self.stage)] = nn.Embedding(config.model.vocab_size, hidden)
        if not self.is_last:
            self.boundaries[str(self.stage)] = sending_side(bottleneck, hidden, width)
        self.contexts, self.biases = nn.ModuleDict(), nn.ParameterDict()
        has_context = bottleneck.enabled and bottleneck.anchor in LEARNED_ANCHORS
        if has_context and (bottleneck.taps or bottleneck.pair_rows):
            self.contexts[str(self.stage)] = LocalContext(bottleneck.taps, bottleneck.pair_rows, hidden)
        if bottleneck.enabled and bottleneck.bias:
            self.biases[str(self.stage)] = nn.Parameter(torch.empty(hidden))

    def _materialise(self, config: StageConfig, device: torch.device) -> None:
        """Give each parameter its memory and initial values, one by one: the peak is the stage and one parameter."""
        for path, module in self.named_modules():
            for leaf, parameter in list(module.named_parameters(recurse=False)):
                value = initial_value(config, f"{path}.{leaf}" if path else leaf, parameter.shape)
                module.register_parameter(leaf, nn.Parameter(value.to(device)))
        self.rotary.to(device)

    def _confine(self, config: StageConfig, device: torch.device) -> None:
        """Subspace Models: constants of the run in place of learned projections and anchors."""
        basis_Dk = subspace.basis_Dk(config).to(device)
        self.register_buffer("basis", basis_Dk, persistent=False)
        self.register_buffer("fixed", subspace.fixed_embedding_VD(config).to(device), persistent=False)
        for boundary in self.boundaries.values():
            cast(Boundary, boundary).use_basis(basis_Dk)
        if not self.is_last:  # the stream is not cut after the last stage: there it is free
            subspace.confine(self.model.layers.values(), basis_Dk)

    def named_global_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Every parameter under its name in the whole model, sorted by name."""
        return iter(sorted(self.named_parameters()))

    def forward(self, ids_BT: Tensor, latents_BTh: Tensor | None, local_weight: float = 0.0) -> Tensor:
        """Latents for the next stage, float32 [B, T, h]; on the last stage logits [B, T, V].

        Args:
            ids_BT: input token ids, int64 [B, T]; every stage needs them for its anchor.
            latents_BTh: what the stage before sent, [B, T, h]; None on stage 0.
            local_weight: of this stage's own next-token loss, whose gradient then joins that of the latents.
        """
        x_BTD, anchor_BTD = self._enter(ids_BT, latents_BTh)
        positions_1T = torch.arange(ids_BT.shape[1], device=ids_BT.device).unsqueeze(0)
        rotary = self.rotary(x_BTD, position_ids=positions_1T)
        for layer in self.model.layers.values():
            # no mask: transformers' sdpa attention is then causal by itself
            x_BTD = layer(
                x_BTD, attention_mask=None, position_ids=positions_1T, position_embeddings=rotary, use_cache=False
            )
        if self.is_last:
            logits_BTV: Tensor = self.lm_head(self.model.norm(x_BTD))
            return logits_BTV
        sent_BTh = self._boundary(self.stage).encode(x_BTD, anchor_BTD if self.subtracts_anchor else None)
        if local_weight and torch.is_grad_enabled():
            loss = local_loss(x_BTD, ids_BT, self._own_table().weight)
            return with_gradient_of(local_weight * loss, sent_BTh)
        return sent_BTh

    def _enter(self, ids_BT: Tensor, latents_BTh: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The stream before the first layer, and this stage's anchor; one table look-up serves both ends."""
        fixed_BTD = _times(self._multiplier, self.fixed[ids_BT]) if self.is_confined else None
        if latents_BTh is None:
            embedded_BTD = self.model.embed_tokens(ids_BT)
            if fixed_BTD is not None:
                learned_BTD = subspace.project(embedded_BTD, self.basis)
                return fixed_BTD + _times(self._multiplier, learned_BTD), fixed_BTD
            embedded_BTD = self._in_context(ids_BT, embedded_BTD)
            return self._biased(embedded_BTD), embedded_BTD  # the first stage's anchor is the embedding itself
        key = str(self.stage)
        anchor_BTD = self._in_context(ids_BT, self.anchors[key](ids_BT)) if key in self.anchors else fixed_BTD
        latents_BTh = _times(self._latent_multiplier, latents_BTh)
        return self._biased(self._boundary(self.stage - 1).decode(latents_BTh, anchor_BTD)), anchor_BTD

    def _in_context(self, ids_BT: Tensor, anchor_BTD: Tensor) -> Tensor:
        """The anchor at its scale in the stream, with what the tokens before say of each token."""
        key = str(self.stage)
        in_context_BTD = self.contexts[key](ids_BT, anchor_BTD) if key in self.contexts else anchor_BTD
        return _times(self._multiplier, in_context_BTD)

    def _own_table(self) -> nn.Embedding:
        """A row for each token: this stage's anchors, on the first stage the embeddings."""
        return cast(nn.Embedding, self.model.embed_tokens if self.is_first else self.anchors[str(self.stage)])

    def _biased(self, x_BTD: Tensor) -> Tensor:
        key = str(self.stage)
        return x_BTD + _times(self._multiplier, self.biases[key]) if key in self.biases else x_BTD

    def _boundary(self, index: int) -> Boundary:
        return cast(Boundary, self.boundaries[str(index)])


def initial_gain(config: StageConfig) -> float:
    """Initial gain of a decoder, so that the decoded stream starts at RMS 2.5 times that of the anchor.

    Latents have unit RMS over h channels, embeddings `initializer_range` over all D: with a gain of 1 the latents would
    drown the anchor. Between 1.8 and 2.6 times is best by a tenth of a nat against a gain of 1 in short runs (D = 192).
    """
    if not config.bottleneck.norm:
        return 1.0  # the stream crosses at its own scale
    return INITIAL_RATIO * config.model.initializer_range * math.sqrt(config.model.hidden_size / config.latent_width)


def initial_value(config: StageConfig, name: str, shape: torch.Size) -> Tensor:
    """Initial values of one parameter, float32 on the CPU: a pure function of the run's seed and its global name."""
    owner, leaf = name.split(".", maxsplit=1)[0], name.rsplit(".", maxsplit=1)[-1]
    if owner == "anchors" and config.bottleneck.anchor is AnchorKind.EMBEDDING:
        name = EMBEDDING_NAME
    if leaf == "bias" or owner == "contexts" or ".decoder.earlier." in name:
        return torch.zeros(shape)
    if owner == "biases":
        return torch.full(shape, INITIAL_RATIO * config.model.initializer_range)
    if leaf == "gain":
        return torch.full(shape, initial_gain(config))
    if len(shape) == 1:
        return torch.ones(shape)
    digest = hashlib.sha256(f"{config.seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    spread = config.model.initializer_range * (
        config.model.residual_init if name.endswith(ADDED_TO_THE_STREAM) else 1.0
    )
    return torch.empty(shape).normal_(0.0, spread, generator=generator)


def _times(factor: float, x: Tensor) -> Tensor:
    return x if factor == 1.0 else factor * x
