"""The part of a run that decides what a stage computes and what crosses its boundaries.

Every field is part of the run's identity (its hash): two peers with different values would train different models.
Numbers that contradict each other are refused here, at the door.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stage_server.codec_names import BackwardCodec, ForwardCodec

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Frozen(BaseModel):
    """A value: immutable, unknown keys refused, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """A decoder-only Hugging Face architecture, by its config's own field names; and how large its stream begins."""

    model_type: Literal["llama", "qwen3"] = Field("llama", description="transformers model type")
    vocab_size: Positive = Field(2048, description="token ids, 0 to vocab_size-1")
    hidden_size: Positive = Field(384, description="model width H")
    intermediate_size: Positive = Field(1024, description="feed-forward width")
    num_hidden_layers: Positive = Field(4, description="transformer layers, spread over the stages")
    num_attention_heads: Positive = Field(6, description="query heads")
    num_key_value_heads: Positive = Field(6, description="key/value heads; fewer than query heads: GQA")
    max_position_embeddings: Positive = Field(2048, description="longest sequence, tokens")
    tie_word_embeddings: bool = Field(
        False, description="must be false: embedding and head live on different machines and would drift apart"
    )
    initializer_range: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    residual_init: float = Field(
        1.0, gt=0, description="initial weights of what each layer adds to the stream (o_proj, down_proj), times this"
    )
    embedding_multiplier: float = Field(
        1.0,
        gt=0,
        description="what a stage's stream starts from (embeddings, anchors, biases, normed latents), times this",
    )
    extra: dict[str, Any] = Field(
        default_factory=dict, description="further fields of the transformers config, passed on as they are"
    )

    @model_validator(mode="after")
    def _numbers_fit(self) -> ModelConfig:
        if self.tie_word_embeddings:
            raise ValueError(
                "tie_word_embeddings = true: embedding and head live on different machines; set it to false"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if "head_dim" not in self.extra and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size = {self.hidden_size} is not a multiple of "
                f"num_attention_heads = {self.num_attention_heads}"
            )
        return self


class AnchorKind(StrEnum):
    """A stage's own token embedding, added after its decoder."""

    NONE = "none"
    EMBEDDING = "embedding"  # initialised as a copy of the model's embedding; the encoder subtracts it
    INDEPENDENT = "independent"  # own initial values; nothing is subtracted
    FIXED = "fixed"  # one table for all stages, drawn from the seed and never trained; the encoder subtracts it


LEARNED_ANCHORS = frozenset({AnchorKind.EMBEDDING, AnchorKind.INDEPENDENT})


class BottleneckConfig(Frozen):
    """What is done to the residual stream at a boundary. Every variant of the benchmark is a value of this."""

    enabled: bool = Field(True, description="false: the dense residual stream crosses (latent width = hidden size)")
    width: Literal["default", "narrow"] | Positive = Field(
        "default",
        description="latent width h; default: the even number nearest H/34, narrow: nearest H/146 (room for ids, "
        "scales and headers inside 128x and 512x at H = 4096)",
    )
    identity: bool = Field(True, description="rectangular identity path: the first h coordinates pass as they are")
    projection: Literal["linear", "none", "subspace"] = Field(
        "linear",
        description="linear: learned W_e and W_d; subspace: a fixed orthonormal basis that confines every block before "
        "the last boundary (Subspace Models, arXiv 2506.01260)",
    )
    norm: bool = Field(True, description="RMSNorm of the latent, without which latents explode over boundaries")
    centre: bool = Field(
        True,
        description="subtract from a latent the mean of its sequence so far, before the norm: constants are not sent",
    )
    gain: bool = Field(True, description="learned gain per latent channel in the decoder")
    anchor: AnchorKind = Field(AnchorKind.EMBEDDING, description="token embedding of each stage's own")
    bias: bool = Field(True, description="a learned vector that each stage adds to the stream it starts from")
    taps: int = Field(
        3,
        ge=0,
        description="earlier tokens that each stage mixes into its learned anchor, a weight per channel; 0: none",
    )
    latent_taps: int = Field(
        2,
        ge=0,
        description="earlier latents that each decoder reads too, each through a projection of its own (a weight per "
        "channel where there are no projections); 0: none",
    )
    pair_rows: int = Field(
        0, ge=0, description="rows of each stage's hashed table of token pairs, added to its learned anchor; 0: none"
    )
    local_loss: float = Field(
        0.0, ge=0, description="weight of a next-token loss of each earlier stage's own; it sends nothing; 0: none"
    )
    local_loss_until: Fraction = Field(
        1.0, gt=0, description="share of the run's steps over which the local loss fades, linearly, to nothing"
    )


class CodecConfig(Frozen):
    """How latents and their gradients are written on the wire."""

    forward: ForwardCodec = Field(
        "int4",
        description="latents; none: float32, lossless; int8, int4, int2: fixed grids; int4_token: with scales",
    )
    backward: BackwardCodec = Field("int4", description="latent gradients")
    clip: float = Field(2.7, gt=0, description="4-bit grid covers [-clip, clip]; latents have unit RMS")
    clip_int2: float = Field(2.0, gt=0, description="2-bit grid covers [-clip_int2, clip_int2]")
    clip_int8: float = Field(4.5, gt=0, description="8-bit grid covers [-clip_int8, clip_int8]")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="of gradients; stochastic is seeded by run, step, microbatch and boundary"
    )
    zstd_level: int = Field(1, ge=0, le=19, description="zstandard level for payloads it shrinks; 0: never tried")


class OptimizerConfig(Frozen):
    """Muon for hidden matrices, AdamW for the rest; one schedule that follows the global step."""

    hidden: Literal["muon", "adamw"] = Field("muon", description="optimizer of 2-D hidden matrices")
    muon_lr: float = Field(6e-3, gt=0, description="peak learning rate of Muon (match_rms_adamw scaling)")
    muon_momentum: Fraction = Field(0.95, description="Nesterov momentum of Muon")
    boundary_rate: float = Field(
        1.0, gt=0, description="learning rate of encoders and decoders, as a share of the other hidden matrices'"
    )
    adamw_lr: float = Field(6e-3, gt=0, description="peak learning rate of AdamW")
    adamw_betas: tuple[Fraction, Fraction] = Field((0.9, 0.95), description="AdamW betas")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices; norms and gains have none")
    clip_norm: float = Field(
        1.0, ge=0, description="gradient norm limit of the whole model; each stage clips at this / sqrt(S); 0: off"
    )
    warmup_fraction: Fraction = Field(0.05, description="share of the run's steps with rising learning rate")
    final_fraction: Fraction = Field(0.05, description="learning rate of the last step, as a share of the peak")


class ComputeConfig(Frozen):
    """Numbers that change the bits of the result and so belong to the run."""

    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: autocast; weights stay fp32")


class PlanConfig(Frozen):
    """How much is trained, evaluated and saved."""

    steps: Positive = Field(100, description="optimizer steps")
    microbatches_per_step: Positive = Field(8, description="microbatches in one step")
    batch: Positive = Field(2, description="sequences B in a microbatch")
    tokens: Positive = Field(256, description="tokens T in a sequence")
    evaluate_every: int = Field(
        0, ge=0, description="steps between validations; 0: only before the first and after the last"
    )
    evaluation_microbatches: int = Field(8, ge=0, description="microbatches of one validation; 0: never validate")
    checkpoint_every: Positive = Field(10, description="steps between checkpoints of a stage")


class DilocoConfig(Frozen):
    """Replicas that average seldom (arXiv 2311.08105); for replicas.averaging = diloco."""

    inner_steps: Positive = Field(50, description="steps that each replica takes by itself before an outer step")
    outer_lr: float = Field(0.7, gt=0, description="learning rate of the outer Nesterov step")
    outer_momentum: float = Field(0.9, ge=0, lt=1, description="momentum of the outer Nesterov step")
    wire: Literal["fp16", "fp32"] = Field("fp16", description="how what is averaged travels: 2 or 4 bytes a value")


class StageConfig(Frozen):
    """All that decides what the stages of a run compute: the same for every peer of the run."""

    stages: Positive = Field(4, description="pipeline stages S")
    seed: int = Field(0, ge=0, lt=2**31, description="seed of weights, data order and stochastic rounding")
    model: ModelConfig = ModelConfig()
    bottleneck: BottleneckConfig = BottleneckConfig()
    codec: CodecConfig = CodecConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    compute: ComputeConfig = ComputeConfig()
    plan: PlanConfig = PlanConfig()

    @model_validator(mode="after")
    def _numbers_fit(self) -> StageConfig:
        model, plan = self.model, self.plan
        if self.stages > model.num_hidden_layers:
            raise ValueError(f"stages = {self.stages} is more than model.num_hidden_layers = {model.num_hidden_layers}")
        if self.latent_width > model.hidden_size:
            raise ValueError(f"bottleneck.width = {self.latent_width} is wider than hidden_size = {model.hidden_size}")
        if plan.tokens > model.max_position_embeddings:
            raise ValueError(
                f"plan.tokens = {plan.tokens} is more than max_position_embeddings = {model.max_position_embeddings}"
            )
        bottleneck = self.bottleneck
        if bottleneck.enabled and not bottleneck.identity and bottleneck.projection == "none":
            raise ValueError("bottleneck.identity = false with projection = none lets nothing cross the boundary")
        if bottleneck.enabled and bottleneck.projection == "subspace":
            ours = (bottleneck.identity, bottleneck.centre, bottleneck.norm, bottleneck.gain, bottleneck.bias)
            if any(ours) or bottleneck.latent_taps or bottleneck.anchor is not AnchorKind.FIXED:
                raise ValueError(
                    "bottleneck.projection = subspace needs identity, centre, norm, gain and bias = false, "
                    "latent_taps = 0 and anchor = fixed"
                )
        elif bottleneck.anchor is AnchorKind.FIXED:
            raise ValueError("bottleneck.anchor = fixed is for bottleneck.projection = subspace alone")
        if bottleneck.pair_rows and bottleneck.anchor not in LEARNED_ANCHORS:
            raise ValueError("bottleneck.pair_rows adds to a learned anchor: set anchor = embedding")
        if bottleneck.enabled and bottleneck.local_loss:
            if bottleneck.anchor not in LEARNED_ANCHORS:
                raise ValueError("bottleneck.local_loss has a learned anchor as its head: set anchor = embedding")
            if plan.tokens < 2:
                raise ValueError("bottleneck.local_loss needs a token that follows another: plan.tokens of at least 2")
        fixed_grid = self.codec.forward in ("int8", "int4", "int2")
        if fixed_grid and not (bottleneck.enabled and bottleneck.norm):
            raise ValueError(
                f"codec.forward = {self.codec.forward} has a fixed grid and needs bottleneck.norm = true; "
                "choose int4_token, bf16 or none without it"
            )
        return self

    @property
    def latent_width(self) -> int:
        """h: the width of what crosses a boundary."""
        width, hidden = self.bottleneck.width, self.model.hidden_size
        if not self.bottleneck.enabled:
            return hidden
        if isinstance(width, int):
            return width
        return max(2, 2 * round(hidden / {"default": 68, "narrow": 292}[width]))
