"""`resbm-node bench overhead`: what encoder, decoder and anchor add to a stage: parameters, memory, FLOPs and time.

A middle stage has all three. It is measured against the same stage of a dense pipeline, in turn with it: forward and
backward of microbatches, with writing and reading what crosses the boundaries. FLOPs are those of matrix products.
Muon's steps are not run, they take minutes at the largest width; their FLOPs follow from the shapes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, Spread, Table, Watcher, watching

if TYPE_CHECKING:
    from node.config import RunConfig
    from stage_server.trainer import StageTrainer

WIDTHS = (512, 1024, 2048, 4096)
QUICK_WIDTHS = (256, 512)
HEAD_WIDTH = 64
VOCABULARY = 32_768
"""Of the anchors that are counted. The ones measured have fewer rows: a look-up costs the same."""

MEASURED_VOCABULARY = 2048
MIDDLE, STAGES = 1, 3
NEWTON_SCHULZ_STEPS = 5
"""Of torch.optim.Muon."""

MUON_BYTES, ADAMW_BYTES = 12, 16
"""Training memory of a parameter in float32: itself, its gradient, and one or two moments."""


def overhead(
    *,
    width: Annotated[
        list[int] | None, typer.Option(help="Model widths H.", show_default="512, 1024, 2048, 4096")
    ] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of a stage; more make the share smaller.")] = 1,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a microbatch.")] = 512,
    repeats: Annotated[int | None, typer.Option(min=1, help="Pairs.", show_default="5; --quick: 2")] = None,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Measure what the bottleneck adds to a stage: parameters, FLOPs, time.

    Example: resbm-node bench overhead --width 512 --width 1024
    """
    with watching(json_lines=json_lines) as watcher:
        report = Report("overhead", watcher, quick=quick, out=out)
        plan = Plan(layers, tokens, repeats or (2 if quick else 5))
        results = measure(width or (QUICK_WIDTHS if quick else WIDTHS), plan, watcher)
        report.finish([asdict(result) for result in results], [table_of(results)], summary_of(results))


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    layers: int
    tokens: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Cost:
    """One stage."""

    layer_parameters: int
    boundary_parameters: int  # encoder, decoder, gain, bias, taps
    anchor_parameters: int  # with VOCABULARY rows
    flops: int  # matrix products of one microbatch, forward and backward
    muon_flops: int  # of one optimizer step
    boundary_bytes: int  # of the boundary's parameters, while training
    anchor_bytes: int  # with VOCABULARY rows
    activation_bytes: int  # kept between a microbatch's forward and backward


@dataclass(frozen=True, slots=True)
class Result:
    """A stage with a bottleneck against one without, at one width."""

    hidden: int
    width: int
    plan: Plan
    ours: Cost
    dense: Cost
    seconds_ours: Sequence[float]
    seconds_dense: Sequence[float]

    @property
    def flops_share(self) -> float:
        """What is added, as a share of the dense stage."""
        return self.ours.flops / self.dense.flops - 1.0

    @property
    def muon_share(self) -> float:
        """The same of an optimizer step."""
        return self.ours.muon_flops / self.dense.muon_flops - 1.0

    @property
    def activation_share(self) -> float:
        """The same of what is kept for backward."""
        return self.ours.activation_bytes / self.dense.activation_bytes - 1.0

    @property
    def parameters_share(self) -> float:
        return self.ours.boundary_parameters / self.ours.layer_parameters

    @property
    def time_ratio(self) -> Spread:
        """Ours / dense, pair by pair."""
        return Spread.of([a / b for a, b in zip(self.seconds_ours, self.seconds_dense, strict=True)])


def measure(widths: Sequence[int], plan: Plan, watcher: Watcher) -> list[Result]:
    """All widths, one after another."""
    results = []
    for number, hidden in enumerate(widths):
        watcher.doing(f"H {hidden}", number / len(widths))
        result = _measure_one(hidden, plan)
        results.append(result)
        watcher.note({"event": "case", "hidden": hidden, "time_ratio": result.time_ratio.median})
    return results


def config_of(hidden: int, plan: Plan, *, dense: bool) -> RunConfig:
    """Three stages of a Llama of this width, of which the middle one is measured. Raises ConfigImpossible."""
    from node.config import preset, validated

    values = preset("demo").model_dump()
    values["stages"] = STAGES
    values["model"] |= {
        "hidden_size": hidden,
        "intermediate_size": 7 * hidden // 2,
        "num_hidden_layers": STAGES * plan.layers,
        "num_attention_heads": max(1, hidden // HEAD_WIDTH),
        "num_key_value_heads": max(1, hidden // HEAD_WIDTH),
        "vocab_size": MEASURED_VOCABULARY,
        "max_position_embeddings": max(2048, plan.tokens),
    }
    values["bottleneck"] |= {"width": "default", "local_loss": 0.0}
    values["plan"] |= {"batch": 1, "tokens": plan.tokens}
    if dense:
        values["bottleneck"]["enabled"] = False
        values["codec"] |= {"forward": "bf16", "backward": "bf16"}
    return validated(values, f"H {hidden}")


def _measure_one(hidden: int, plan: Plan) -> Result:
    ours, dense = (_Stage(config_of(hidden, plan, dense=dense)) for dense in (False, True))
    costs = (ours.cost(), dense.cost())
    seconds: tuple[list[float], list[float]] = ([], [])
    for repeat in range(plan.repeats):
        turns = ((ours, seconds[0]), (dense, seconds[1]))
        for stage, taken in turns if repeat % 2 else reversed(turns):  # who goes first must not matter
            taken.append(stage.seconds())
    return Result(hidden, ours.config.latent_width, plan, *costs, *seconds)


class _Stage:
    """A middle stage with something to compute."""

    def __init__(self, config: RunConfig) -> None:
        import numpy as np
        import torch

        from stage_server.codec import backward_encoding, clip_for, forward_encoding, pack
        from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
        from stage_server.trainer import StageTrainer

        self.config = config
        self._name = MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, 0)
        self._trainer: StageTrainer = StageTrainer(config, "overhead", MIDDLE, activation_budget_bytes=1 << 40)
        size = (config.plan.batch, config.plan.tokens, config.latent_width)
        there, back = forward_encoding(config.codec), backward_encoding(config.codec)
        generator = torch.Generator().manual_seed(0)
        noise_BTh = torch.randn(size, generator=generator)
        self._latents = pack(noise_BTh, there, clip_for(config.codec, there))
        self._gradients = pack(1e-5 * noise_BTh, back, clip_for(config.codec, back))
        ids = np.random.default_rng(0).integers(0, MEASURED_VOCABULARY, (size[0], size[1] + 1))
        self._token_ids = ids.astype(np.int32)
        self._pass()  # allocators and caches

    def seconds(self) -> float:
        """Processor time of all threads: what others compute beside it counts little."""
        started = time.process_time()
        self._pass()
        return time.process_time() - started

    def cost(self) -> Cost:
        from torch.utils.flop_counter import FlopCounterMode

        from stage_server.optimizer import is_hidden_matrix

        parameters = dict(self._trainer.parameters_fp32())
        anchors = [p for name, p in parameters.items() if name.startswith("anchors.")]
        boundary = {n: p for n, p in parameters.items() if n.startswith(("boundaries.", "biases.", "contexts."))}
        hidden = {name for name, p in parameters.items() if is_hidden_matrix(name, p)}
        anchor_parameters = sum(p.numel() for p in anchors) * VOCABULARY // MEASURED_VOCABULARY
        with FlopCounterMode(display=False) as counter:
            self._pass()
        return Cost(
            layer_parameters=sum(p.numel() for name, p in parameters.items() if name.startswith("model.layers.")),
            boundary_parameters=sum(p.numel() for p in boundary.values()),
            anchor_parameters=anchor_parameters,
            flops=counter.get_total_flops(),
            muon_flops=sum(muon_flops(*parameters[name].shape) for name in hidden),
            boundary_bytes=sum(
                (MUON_BYTES if name in hidden else ADAMW_BYTES) * p.numel() for name, p in boundary.items()
            ),
            anchor_bytes=ADAMW_BYTES * anchor_parameters,
            activation_bytes=self._trainer.memory().microbatch_activations_bytes,
        )

    def _pass(self) -> None:
        self._trainer.forward(self._name, self._token_ids, self._latents)
        self._trainer.backward(self._name, self._gradients)
        self._trainer.discard()


def muon_flops(rows: int, columns: int) -> int:
    """Newton-Schulz iterations on one matrix: X Xᵀ, its square, and a polynomial of it times X."""
    small, large = sorted((rows, columns))
    return NEWTON_SCHULZ_STEPS * (4 * small * small * large + 2 * small**3)


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """The worst over all widths, and each width's time."""
    return {
        "flops_share": max(result.flops_share for result in results),
        "muon_flops_share": max(result.muon_share for result in results),
        "activation_share": max(result.activation_share for result in results),
        "parameters_share": max(result.parameters_share for result in results),
        "time_ratio": {str(result.hidden): result.time_ratio.median for result in results},
    }


def table_of(results: Sequence[Result]) -> Table:
    plan = results[0].plan
    rows = [
        [
            str(result.hidden),
            str(result.width),
            f"{result.ours.layer_parameters / 1e6:.1f} M",
            f"{result.ours.boundary_parameters / 1e6:.3f} M ({100 * result.parameters_share:.2f} %)",
            f"{result.ours.boundary_bytes / 2**20:.1f} MiB",
            f"{result.ours.anchor_parameters / 1e6:.1f} M, {result.ours.anchor_bytes / 2**20:.0f} MiB",
            f"{100 * result.activation_share:.1f} %",
            f"{100 * result.flops_share:.2f} %",
            f"{100 * result.muon_share:.2f} %",
            result.time_ratio.text(3),
        ]
        for result in results
    ]
    columns = [
        "H",
        "h",
        "layers",
        "encoder, decoder, gain, bias, taps",
        "their training memory",
        f"anchor, V {VOCABULARY:,}",
        "activations added",
        "FLOPs added",
        "Muon FLOPs added",
        "processor time, x dense",
    ]
    title = f"a middle stage with {plan.layers} layer{'s' * (plan.layers > 1)}, {plan.tokens} tokens a microbatch, fp32"
    return Table(title, columns, rows)
