"""`resbm-node bench wire`: what crosses a link, to the byte, and how much less that is than bf16 activations.

Where the model is small enough to be trained here, frames carry what its training makes; a model of H = 4096 gets
stand-ins that are as hard to compress as anything of their kind. Text and tokenizer are real in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, Table, Watcher, watching
from stage_server.codec_names import CodecName

if TYPE_CHECKING:
    from node.bench.frames import FrameCounter, Traffic
    from node.config import RunConfig
    from node.data import Corpus

PRESETS = ("demo", "wide", "narrow", "h4096", "h4096-narrow")
OTHER_CODECS: tuple[CodecName, ...] = ("int8", "bf16", "none")
"""Measured on the first preset, with the weights that int4 has trained."""

WIDEST_TRAINED = 1024
"""Models up to this width are trained; wider ones get stand-ins."""


def wire(
    *,
    preset: Annotated[list[str] | None, typer.Option(help="Runs to measure.", show_default=", ".join(PRESETS))] = None,
    train_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps trained.", show_default="the run's own; --quick: 3")
    ] = None,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Measure real frames: bytes a token each way, and how much smaller than bf16 activations they are.

    Example: resbm-node bench wire --preset demo --train-steps 20
    """
    with watching(json_lines=json_lines) as watcher:
        report = Report("wire", watcher, quick=quick, out=out)
        results = measure(preset or PRESETS, Plan(train_steps or (3 if quick else None)), watcher)
        report.finish([asdict(result) for result in results], tables_of(results), summary_of(results))


Doing = Callable[[str, float], None]
"""Told what is being done and the share of it that is done."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    train_steps: int | None  # None: as many as the run has
    microbatches: int = 16  # of stand-ins, or with another codec


@dataclass(frozen=True, slots=True)
class Result:
    """One run's traffic between two stages."""

    name: str
    run_id: str
    source: str  # where the tensors come from
    codec: str
    hidden: int
    width: int
    tokens: int  # in a microbatch
    traffic: Traffic
    without_zstd: Traffic


def measure(presets: Sequence[str], plan: Plan, watcher: Watcher) -> list[Result]:
    """All presets; the other codecs on the first of them."""
    from node.config import preset
    from node.data import load_corpus

    results: list[Result] = []
    for number, name in enumerate(presets):
        config = preset(name)
        span = (number / len(presets), (number + 1) / len(presets))
        watcher.doing(f"{name}: reading text", span[0])
        corpus = load_corpus(config)

        def doing(text: str, share: float, name: str = name, span: tuple[float, float] = span) -> None:
            watcher.doing(f"{name}: {text}", span[0] + (span[1] - span[0]) * share)

        case = _Case(name, config, corpus, plan, doing)
        made = case.trained(with_other_codecs=number == 0) if case.is_trainable else case.imitated()
        for result in made:
            results.append(result)
            watcher.note({"event": "case", "name": result.name, "compression": result.traffic.compression})
    return results


class _Case:
    """Makes the frames of one preset."""

    def __init__(self, name: str, config: RunConfig, corpus: Corpus, plan: Plan, doing: Doing) -> None:
        self._name, self._config, self._corpus, self._plan, self._doing = name, config, corpus, plan, doing

    @property
    def is_trainable(self) -> bool:
        return self._config.model.hidden_size <= WIDEST_TRAINED

    def trained(self, *, with_other_codecs: bool) -> Iterator[Result]:
        """Frames of the last tenth of a training: by then latents say much, so they compress least."""
        from node.bench.chain import Chain

        config, steps = self._config, self._plan.train_steps or self._config.plan.steps
        chain, counters = Chain(config), _counters(config)
        first_counted = steps - max(1, steps // 10) + 1
        for step in range(1, steps + 1):
            self._doing(f"training, step {step} of {steps}", (step - 1) / steps)
            chain.step(step, self._corpus.microbatch, counters if step >= first_counted else ())
        source = f"trained, steps {first_counted} to {steps}"
        yield self._result(self._name, config, source, counters)
        for codec in OTHER_CODECS if with_other_codecs else ():
            self._doing(f"codec {codec}", 1.0)
            other = config.with_overrides(codec=codec)
            counters = _counters(other)
            Chain(other, weights_of=chain).step(steps, self._corpus.microbatch, counters)
            yield self._result(f"{self._name} {codec}", other, f"the same weights, step {steps}", counters)

    def imitated(self) -> Iterator[Result]:
        """Real text, and stand-ins for tensors."""
        from node.bench.tensors import gradients_like, latents_like
        from stage_server.codec import backward_encoding, clip_for, forward_encoding, pack
        from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex

        config, codec = self._config, self._config.codec
        counters, size = _counters(config), (config.plan.batch, config.plan.tokens, config.latent_width)
        there, back = forward_encoding(codec), backward_encoding(codec)
        for index in range(self._plan.microbatches):
            self._doing(f"microbatch {index + 1} of {self._plan.microbatches}", index / self._plan.microbatches)
            name = MicrobatchId(StepIndex(1000), MicrobatchKind.TRAIN, index)
            latents = pack(latents_like(size, seed=index), there, clip_for(codec, there))
            gradients = pack(gradients_like(size, seed=index), back, clip_for(codec, back))
            for counter in counters:
                counter.forward(name, self._corpus.microbatch(name), latents)
                counter.backward(name, 3.0, gradients)
        yield self._result(self._name, config, "stand-ins: normal latents, log-normal gradients", counters)

    def _result(self, name: str, config: RunConfig, source: str, counters: Sequence[FrameCounter]) -> Result:
        plain, without_zstd = (counter.traffic for counter in counters)
        plan, codec = config.plan, config.codec
        return Result(
            name=name,
            run_id=config.run_id,
            source=source,
            codec=codec.forward if codec.forward == codec.backward else f"{codec.forward}/{codec.backward}",
            hidden=config.model.hidden_size,
            width=config.latent_width,
            tokens=plan.batch * plan.tokens,
            traffic=plain,
            without_zstd=without_zstd,
        )


def _counters(config: RunConfig) -> tuple[FrameCounter, FrameCounter]:
    """One with the run's own compression, one that never tries zstandard."""
    from node.bench.frames import FrameCounter

    without_zstd = config.model_copy(update={"codec": config.codec.model_copy(update={"zstd_level": 0})})
    return FrameCounter(config), FrameCounter(without_zstd)


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """Wire compression by preset: dense bytes / wire bytes, both directions together, everything counted."""
    summary = {}
    for result in results:
        key = result.name.replace("-", "_").replace(" ", "_")
        summary[key] = result.traffic.compression
        summary[f"{key}_without_zstd"] = result.without_zstd.compression
    return summary


def tables_of(results: Sequence[Result]) -> list[Table]:
    overview = [
        [
            r.name,
            r.codec,
            str(r.hidden),
            str(r.width),
            str(r.tokens),
            r.source,
            f"{r.traffic.compression:.1f}",
            f"{r.without_zstd.compression:.1f}",
        ]
        for r in results
    ]
    columns = ["run", "codec", "H", "h", "tokens a frame", "tensors", "wire compression", "without zstandard"]
    return [
        Table("wire compression: bf16 bytes / bytes of all frames, both directions", columns, overview),
        Table("bytes a token, forward (latents)", _PART_COLUMNS, [_parts(r, forward=True) for r in results]),
        Table("bytes a token, backward (gradients)", _PART_COLUMNS, [_parts(r, forward=False) for r in results]),
    ]


_PART_COLUMNS = ["run", "bf16", "all", "values", "scales", "token ids", "headers", "all without zstandard"]


def _parts(result: Result, *, forward: bool) -> list[str]:
    traffic = result.traffic
    sent = traffic.forward if forward else traffic.backward
    plain = result.without_zstd.forward if forward else result.without_zstd.backward
    parts = [sent.total, sent.values, sent.scales, sent.ids, sent.headers, plain.total]
    return [result.name, str(2 * result.hidden), *(f"{part / traffic.num_tokens:.3f}" for part in parts)]
