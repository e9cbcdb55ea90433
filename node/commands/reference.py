"""`resbm-node reference`: the same run, unsplit, in one process and without a network.

What a swarm trains must equal what this trains. Nothing crosses a network here, so bytes are 0 and there is no wire
compression to report; the codec's rounding is simulated.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from node.commands import options
from node.cores import threads_of_a_stage
from node.events import Evaluation, Step, Summary, emit

if TYPE_CHECKING:
    from rich.console import Console

    from node.config import RunConfig
    from node.data import Corpus


def reference(
    *,
    run: options.RunFile = None,
    preset: options.PresetName = None,
    stages: options.Stages = None,
    steps: options.Steps = None,
    microbatches: options.Microbatches = None,
    codec: options.Codec = None,
    seed: options.Seed = None,
    threads: Annotated[
        int, typer.Option(min=0, help="Processor threads to compute with; 0: as many as one peer of the demo has.")
    ] = 0,
    json_lines: options.JsonLines = False,
) -> None:
    """Train a run in one process, unsplit: what a swarm must equal, and how fast it could be without a network.

    It takes no outer steps: a run with replicas.averaging = diloco trains otherwise.

    Example: resbm-node reference --preset demo --steps 20
    """
    config = options.chosen_run(
        run, preset, stages=stages, steps=steps, microbatches=microbatches, codec=codec, seed=seed
    )
    output: Output = JsonOutput() if json_lines else TerminalOutput(config)
    with output.preparing() as progress:
        from node.data import load_corpus

        corpus = load_corpus(config, progress)
    output.summary(train(config, corpus, output, threads or threads_of_a_stage(config.stages)))


class Output(Protocol):
    """Who watches: a person at a terminal, or a script."""

    def preparing(self) -> Any: ...
    def training(self) -> Any: ...
    def step(self, step: Step) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def summary(self, summary: Summary) -> None: ...


def train(config: RunConfig, corpus: Corpus, output: Output, threads: int) -> Summary:
    """Trains the unsplit model and tells `output` of each step."""
    import torch

    from node.unsplit import UnsplitModel, weights_digest

    torch.set_num_threads(threads)
    plan = config.plan
    tokens_per_step = plan.microbatches_per_step * plan.batch * plan.tokens
    model = UnsplitModel(config, config.run_id)

    def evaluate(committed: int) -> float | None:
        if not plan.evaluation_microbatches:
            return None
        loss: float = model.evaluate(committed + 1, corpus.microbatch)
        output.evaluation(Evaluation(stage=config.stages - 1, step=committed, loss=loss))
        return loss

    training_seconds = 0.0
    with output.training():
        before = evaluate(0)
        for step in range(1, plan.steps + 1):
            started = time.perf_counter()
            loss = model.train_step(step, corpus.microbatch)
            seconds = time.perf_counter() - started
            training_seconds += seconds
            tokens = step * tokens_per_step
            output.step(Step(step=step, loss=loss, tokens=tokens, seconds=seconds, dense_bytes=0, wire_bytes=0))
            if plan.evaluate_every and step % plan.evaluate_every == 0 and step < plan.steps:
                evaluate(step)
        after = evaluate(plan.steps)
    return Summary(
        val_loss_before=before,
        val_loss=after,
        wire_compression=None,
        tokens_per_second=plan.steps * tokens_per_step / training_seconds,
        weights_digest=weights_digest(model.parameters_fp32()),
        unigram_entropy=corpus.unigram_entropy,
        steps=plan.steps,
        stages=config.stages,
        restarts=0,
    )


class JsonOutput:
    """JSON lines on stdout and nothing else."""

    @contextmanager
    def preparing(self) -> Iterator[None]:
        yield None

    @contextmanager
    def training(self) -> Iterator[None]:
        yield None

    def step(self, step: Step) -> None:
        emit(step)

    def evaluation(self, evaluation: Evaluation) -> None:
        emit(evaluation)

    def summary(self, summary: Summary) -> None:
        emit(summary)


class TerminalOutput:
    """A live line on a terminal; a line now and then where output goes to a file."""

    def __init__(self, config: RunConfig) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._config = config
        self._console: Console = Console(highlight=False, soft_wrap=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )

    @contextmanager
    def preparing(self) -> Iterator[Any]:
        with self._progress as progress:
            task = progress.add_task("reading text", total=1.0, note="")
            yield lambda text, fraction: progress.update(task, description=text, completed=fraction)
            progress.remove_task(task)

    @contextmanager
    def training(self) -> Iterator[None]:
        config, plan = self._config, self._config.plan
        self._console.print(
            f"[bold]{config.name}[/] run {config.run_id}: {config.model.model_type}, "
            f"{config.model.num_hidden_layers} layers of width {config.model.hidden_size}, "
            f"{config.stages} stages in one process, latents of {config.latent_width} numbers a token"
        )
        with self._progress as progress:
            self._task = progress.add_task("training", total=plan.steps, note="first validation")
            yield

    def step(self, step: Step) -> None:
        plan = self._config.plan
        tokens_per_step = plan.microbatches_per_step * plan.batch * plan.tokens
        note = f"step {step.step}/{plan.steps}  loss {step.loss:.3f}  {tokens_per_step / step.seconds:,.0f} tokens/s"
        self._progress.update(self._task, completed=step.step, note=note)
        if not self._console.is_terminal and (step.step % max(1, plan.steps // 20) == 0 or step.step == 1):
            self._console.print(note)

    def evaluation(self, evaluation: Evaluation) -> None:
        self._console.print(f"validation loss {evaluation.loss:.3f} after {evaluation.step} steps")

    def summary(self, summary: Summary) -> None:
        print_line = self._console.print
        if summary.val_loss is not None:
            print_line(
                f"[bold]validation loss {summary.val_loss_before:.3f} -> {summary.val_loss:.3f}[/] nats a token "
                f"(best without context: {summary.unigram_entropy:.3f})"
            )
        print_line(f"{summary.tokens_per_second:,.0f} tokens/s, weights {summary.weights_digest}")
