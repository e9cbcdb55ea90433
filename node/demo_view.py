"""How a demo is told: to a terminal, to a file, or to a script."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from node.demo_peers import PeerView
from node.events import Evaluation, Step, Summary, emit
from node.progress import StageTotals, StepAggregator
from node.ui import PLAIN_PERIOD_SECONDS, ratio, share, short_bytes, short_count, short_time

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from node.config import RunConfig
    from node.data import Corpus

_RECENT_STEPS = 20
_REDRAW_PERIOD_SECONDS = 0.1


class DemoView(Protocol):
    """Told everything as it happens, in this order, except that notes may come at any time."""

    wants_sample: bool

    def preparing(self, text: str, fraction: float) -> None: ...
    def begin(self, corpus: Corpus) -> None: ...
    def peers(self, peers: Sequence[PeerView]) -> None: ...
    def evaluation(self, evaluation: Evaluation) -> None: ...
    def step(self, step: Step, totals: StepAggregator) -> None: ...
    def tick(self, now: float) -> None: ...
    def note(self, text: str) -> None: ...
    def summary(self, summary: Summary, totals: StepAggregator, sample: str) -> None: ...
    def close(self) -> None: ...


class JsonView:
    """A JSON line per step and one at the end on stdout, and nothing else."""

    wants_sample = False

    def preparing(self, text: str, fraction: float) -> None:
        pass

    def begin(self, corpus: Corpus) -> None:
        pass

    def peers(self, peers: Sequence[PeerView]) -> None:
        pass

    def evaluation(self, evaluation: Evaluation) -> None:
        pass

    def step(self, step: Step, totals: StepAggregator) -> None:
        emit(step)

    def tick(self, now: float) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def summary(self, summary: Summary, totals: StepAggregator, sample: str) -> None:
        emit(summary)

    def close(self) -> None:
        pass


class ConsoleView:
    """For people: on a terminal, the peers and the progress, redrawn in place; else lines now and then."""

    wants_sample = True

    def __init__(self, config: RunConfig, console: Console) -> None:
        from rich.live import Live

        self._config = config
        self._console = console
        self._peers: Sequence[PeerView] = ()
        self._doing = ""
        self._last: Step | None = None
        self._totals: StepAggregator | None = None
        self._last_at = 0.0
        self._drawn_at = 0.0
        self._printed_at = -PLAIN_PERIOD_SECONDS
        self._recent: deque[float] = deque(maxlen=_RECENT_STEPS)
        # No refresh thread: the demo forks, and a fork should happen with one thread.
        self._live = Live("", console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        if self._live:
            self._live.start()

    def preparing(self, text: str, fraction: float) -> None:
        if self._live:
            self._live.update(f"preparing: {text} {100 * fraction:.0f} %", refresh=True)
        elif text != self._doing:
            self._console.print(f"preparing: {text}")
        self._doing = text

    def begin(self, corpus: Corpus) -> None:
        config = self._config
        if self._live:
            self._live.update("starting the coordinator", refresh=True)
        self._console.print(
            f"[bold]{config.name}[/] run {config.run_id}: {config.model.model_type}, "
            f"{config.model.num_hidden_layers} layers of width {config.model.hidden_size} in {config.stages} stages; "
            f"{short_count(corpus.num_train_tokens)} tokens of text"
        )
        self._console.print(
            f"one coordinator and {config.stages} peers, each a process of its own; latents of {config.latent_width} "
            f"numbers a token cross between them ({config.codec.forward} forward, {config.codec.backward} backward)"
        )

    def peers(self, peers: Sequence[PeerView]) -> None:
        if not self._live and len(self._peers) == 0 and all(peer.is_live for peer in peers):
            self._peers = peers
            for peer in sorted(peers, key=lambda peer: peer.stage or 0):
                endpoint = peer.live.endpoint if peer.live else "?"
                self._console.print(f"stage {peer.stage}: {peer.name} at {endpoint}")
        elif self._live:
            self._peers = peers
            self._draw(time.monotonic())

    def evaluation(self, evaluation: Evaluation) -> None:
        self._console.print(f"validation loss {evaluation.loss:.3f} after {evaluation.step} steps")

    def step(self, step: Step, totals: StepAggregator) -> None:
        self._last, self._totals, self._last_at = step, totals, time.monotonic()
        self._recent.append(step.seconds)
        if self._live:
            self._draw(self._last_at)
        elif self._last_at - self._printed_at >= PLAIN_PERIOD_SECONDS or step.step == self._config.plan.steps:
            self._printed_at = self._last_at
            self._console.print(self._progress_line(self._last_at))

    def tick(self, now: float) -> None:
        if self._live:
            self._draw(now)

    def note(self, text: str) -> None:
        self._console.print(f"[yellow]{text}[/]")

    def _draw(self, now: float) -> None:
        from rich.console import Group

        if self._live is None or not self._peers or now - self._drawn_at < _REDRAW_PERIOD_SECONDS:
            return
        self._drawn_at = now
        parts: list[RenderableType] = [peer_table(self._peers, self._config.plan.steps)]
        if self._last is not None:
            parts.append(bar(self._last.step, self._config.plan.steps))
            parts.append(self._progress_line(now))
        self._live.update(Group(*parts), refresh=True)

    def _progress_line(self, now: float) -> str:
        step, totals = self._last, self._totals
        if step is None or totals is None:
            return ""
        typical = statistics.fmean(self._recent)
        left = (self._config.plan.steps - step.step) * typical - (now - self._last_at)
        speed = step.tokens / step.step / typical if typical > 0 else 0.0
        return (
            f"step {step.step}/{self._config.plan.steps} · loss {step.loss:.3f} · {short_count(speed)} tokens/s · "
            f"wire {ratio(totals.dense_bytes, totals.wire_bytes)} smaller · {short_time(left)} left"
        )

    def summary(self, summary: Summary, totals: StepAggregator, sample: str) -> None:
        from rich.markup import escape

        self.close()
        out = self._console.print
        out(stage_table(totals.stages))
        if len(totals.stages) > 1:
            out(link_table(totals.stages))
        if summary.val_loss is not None and summary.val_loss_before is not None:
            out(
                f"[bold]validation loss {summary.val_loss_before:.3f} -> {summary.val_loss:.3f}[/] nats a token "
                f"(the best guess without context: {summary.unigram_entropy:.3f})"
            )
        compression = f", {summary.wire_compression:.0f}x fewer bytes than bf16" if summary.wire_compression else ""
        out(f"{summary.tokens_per_second:,.0f} tokens/s{compression}, weights {summary.weights_digest}")
        if sample:
            out("\n[bold]what it writes[/] (after minutes of training: the shape of Python, not sense)")
            out(f"[cyan]{escape(sample)}[/]\n")

    def close(self) -> None:
        if self._live:
            self._live.stop()
            self._live = None


def bar(done: int, total: int, width: int = 60) -> str:
    """How far, as rich markup."""
    full = width * done // total
    return f"[green]{'━' * full}[/][dim]{'━' * (width - full)}[/]"


def peer_table(peers: Sequence[PeerView], steps: int) -> Table:
    """Who is where."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("peer", "stage", "step", "endpoint", "state"):
        table.add_column(column, no_wrap=True)
    for peer in sorted(peers, key=lambda peer: (peer.stage is None, peer.stage)):
        stage = "" if peer.stage is None else str(peer.stage)
        endpoint = peer.live.endpoint if peer.live else ""
        table.add_row(peer.name, stage, f"{peer.step}/{steps}", endpoint, peer.doing)
    return table


def stage_table(stages: Sequence[StageTotals]) -> Table:
    """What each stage did with its time."""
    from rich.table import Table

    table = Table(title="stages", title_justify="left")
    for column in ("stage", "microbatches", "computing", "waiting for neighbours", "other"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(stages):
        other = max(0.0, stage.seconds - stage.compute_seconds - stage.wait_seconds)
        shares = (share(part, stage.seconds) for part in (stage.compute_seconds, stage.wait_seconds, other))
        table.add_row(str(number), str(stage.microbatches), *shares)
    return table


def link_table(stages: Sequence[StageTotals]) -> Table:
    """What crossed each boundary, everything serialised counted."""
    from rich.table import Table

    table = Table(title="links", title_justify="left")
    for column in ("between", "bf16 would be", "sent forward", "sent back", "smaller by"):
        table.add_column(column, justify="right")
    for number, stage in enumerate(stages[:-1]):
        table.add_row(
            f"{number} and {number + 1}",
            short_bytes(stage.dense_bytes),
            short_bytes(stage.wire_bytes_forward),
            short_bytes(stage.wire_bytes_backward),
            ratio(stage.dense_bytes, stage.wire_bytes),
        )
    return table
