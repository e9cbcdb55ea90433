"""What a volunteer sees while joining and serving: numbered checks, then a live line: "am I contributing?".

What to say is pure (`Contribution`, `check_line`, `contribution_line`); where to say it is one of three displays: a
terminal, plain lines, or JSON lines for scripts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from node.errors import describe
from node.events import (
    CHECK_NAMES,
    Assigned,
    Check,
    Complete,
    Cover,
    Coverage,
    Error,
    Evaluation,
    Event,
    Link,
    Live,
    Moving,
    Relieved,
    Rewind,
    StageStep,
    StateTransfer,
    Worker,
    emit,
)

if TYPE_CHECKING:
    from rich.console import Console

_MARKS = {"ok": "[green]ok[/]", "warn": "[yellow]warn[/]", "failed": "[red]failed[/]"}
_SMOOTHING = 0.2
PLAIN_PERIOD_SECONDS = 10.0
_REDRAW_PERIOD_SECONDS = 0.1


def short_count(number: float) -> str:
    """'950', '2.1k', '13M': at most four characters."""
    for unit in ("", "k", "M", "G"):
        if number < 999.5:
            digits = 0 if unit == "" or number >= 9.95 else 1
            return f"{number:.{digits}f}{unit}"
        number /= 1000
    return f"{number:.0f}T"


def short_bytes(number: float) -> str:
    """'950 B', '2.1 kB', '13 MB'."""
    text = short_count(number)
    return f"{text} B" if text[-1].isdigit() else f"{text[:-1]} {text[-1]}B"


def short_time(seconds: float) -> str:
    """'0:07', '3:20' (minutes), '2:03:20'."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def share(part: float, whole: float) -> str:
    """'83 %', or '-' of nothing."""
    return f"{100 * part / whole:.0f} %" if whole > 0 else "-"


def ratio(dense_bytes: float, wire_bytes: float) -> str:
    """'113x', or '-' when nothing crossed."""
    return f"{dense_bytes / wire_bytes:.0f}x" if wire_bytes > 0 else "-"


@dataclass(frozen=True, slots=True)
class Contribution:
    """All that the live line says. `observe` makes the next one of an event."""

    run: str = ""
    stage: int | None = None
    num_stages: int | None = None
    step: int = 0
    steps: int = 0
    loss: float | None = None
    microbatches: int = 0
    tokens_per_second: float | None = None
    step_seconds: float | None = None
    dense_bytes: int = 0
    wire_bytes: int = 0
    links: dict[str, bool] = field(default_factory=dict)
    beside: tuple[int, ...] = ()
    """Further stages that this machine serves."""
    paused: str = ""
    """Why the whole run stands still."""
    trouble: str = ""
    transfer: StateTransfer | None = None
    live: bool = False
    complete: bool = False

    def observe(self, event: Event) -> Contribution:
        after = self
        match event:
            case Assigned():
                after = replace(self, stage=event.stage, num_stages=event.num_stages)
            case Live():
                live = replace(self, run=event.run, stage=event.stage, steps=event.steps, live=True, trouble="")
                after = replace(live, step=event.committed_step)
            case StageStep():
                after = self._after_step(event)
            case StateTransfer():
                after = replace(self, transfer=event)
            case Link():
                after = replace(self, links={**self.links, event.side: event.state == "open"})
            case Coverage():
                after = replace(self, paused=event.detail)
            case Complete():
                after = replace(self, complete=True, step=event.step)
            case Worker(state="restarting"):
                wait = f"in {event.in_seconds:.0f} s" if event.in_seconds >= 1 else "now"
                after = replace(self, live=False, links={}, trouble=f"worker {event.detail}, restarts {wait}")
        return after

    def observe_beside(self, stage: int, event: Event) -> Contribution:
        """Of a worker beside the first one."""
        others = tuple(other for other in self.beside if other != stage)
        match event:
            case Live():
                return replace(self, beside=tuple(sorted((*others, stage))))
            case Worker(state="exited"):
                return replace(self, beside=others)
        return self

    def _after_step(self, event: StageStep) -> Contribution:
        link = event.link
        rate = event.tokens / event.seconds if event.seconds > 0 else None
        return replace(
            self,
            transfer=None,
            step=event.step,
            loss=self.loss if event.loss is None else event.loss,
            microbatches=self.microbatches + event.microbatches,
            tokens_per_second=_smoothed(self.tokens_per_second, rate),
            step_seconds=_smoothed(self.step_seconds, event.seconds),
            dense_bytes=self.dense_bytes + (link.dense_bytes if link else 0),
            wire_bytes=self.wire_bytes + (link.wire_bytes if link else 0),
        )

    @property
    def missing_links(self) -> list[str]:
        """Stages whose link is down, in words."""
        if self.stage is None:
            return []
        names = {"upstream": self.stage - 1, "downstream": self.stage + 1}
        return [f"stage {names[side]}" for side, is_open in self.links.items() if not is_open]


def _smoothed(before: float | None, now: float | None) -> float | None:
    """Exponential moving average."""
    if before is None or now is None:
        return now if now is not None else before
    return before + _SMOOTHING * (now - before)


def verdict(state: Contribution) -> tuple[str, str]:
    """(style, words): is this machine contributing?"""
    if state.complete:
        return "green", "run complete, serving its weights"
    if state.trouble:
        return "red", state.trouble
    if not state.live or state.transfer is not None:
        return "yellow", "joining" if state.transfer is None else _on_its_way(state.transfer)
    waiting = _waiting(state)
    return ("yellow", waiting) if waiting else ("green", "contributing")


def _waiting(state: Contribution) -> str:
    """What keeps a live peer from contributing; empty when nothing does."""
    if state.paused:
        return state.paused
    if state.missing_links:
        return f"waiting for {' and '.join(state.missing_links)}"
    return "" if state.microbatches else "waiting for the first microbatch"


def _on_its_way(transfer: StateTransfer) -> str:
    if transfer.done_bytes >= transfer.total_bytes:
        return "catching up with the stage's other peers"
    left = "" if transfer.seconds_left is None else f", {short_time(transfer.seconds_left)} left"
    amount = f"{short_bytes(transfer.done_bytes)} of {short_bytes(transfer.total_bytes)}"
    return f"taking over the stage's state: {amount}{left}"


def contribution_line(state: Contribution) -> str:
    """Am I contributing? One line of rich markup."""
    style, words = verdict(state)
    parts = [f"[bold {style}]{words}[/]"]
    if state.stage is not None:
        parts.append(f"stage {state.stage}" + (f" of {state.num_stages}" if state.num_stages else ""))
    if state.beside:
        parts.append(f"standing in at {', '.join(map(str, state.beside))}")
    if state.steps:
        parts.append(f"step {state.step}/{state.steps}")
    if state.loss is not None:
        parts.append(f"loss {state.loss:.3f}")
    if state.microbatches:
        parts.append(f"{short_count(state.microbatches)} microbatches")
    if state.tokens_per_second is not None:
        parts.append(f"{short_count(state.tokens_per_second)} tokens/s")
    if state.wire_bytes:
        parts.append(f"wire {ratio(state.dense_bytes, state.wire_bytes)}")
    if state.links:
        parts.append(f"links {sum(state.links.values())}/{len(state.links)}")
    if state.step_seconds is not None and not state.complete:
        parts.append(f"{short_time((state.steps - state.step) * state.step_seconds)} left")
    return " · ".join(parts)


def check_line(check: Check) -> str:
    """One numbered step of joining, as rich markup."""
    from rich.markup import escape

    mark = _MARKS[check.verdict] + " " * (7 - len(check.verdict))
    number = f"{check.number}/{len(CHECK_NAMES)}"
    return f"{number}  {check.name:<9} {mark} {check.seconds:6.1f} s  {escape(check.detail)}"


def event_line(event: Event) -> str | None:
    """What is worth a line of its own, as rich markup; None for what the live line already shows."""
    from rich.markup import escape

    line = None
    match event:
        case Check():
            line = check_line(event)
        case Assigned() | Live() | Cover() | Relieved() | Moving():
            line = f"     {_place(event)}"
        case Link(state="lost"):
            line = f"     [yellow]link {event.side} lost[/]: {escape(event.detail)}"
        case Coverage(unserved=stages):
            line = f"     [yellow]{escape(event.detail)}[/]" if stages else "     every stage is served"
        case Evaluation():
            line = f"     validation loss {event.loss:.3f} after {event.step} steps"
        case Worker(state="restarting"):
            line = f"     [yellow]worker {escape(event.detail)}[/], restarts in {event.in_seconds:.1f} s"
        case Complete():
            line = f"     [green]run complete[/]: {event.step} steps"
        case Rewind():
            again = f"{event.redone} steps are done again" if event.redone else "nothing is to be done again here"
            line = f"     [yellow]back to step {event.to_step}[/], {again}: {escape(event.reason)}"
        case Error():
            line = f"[red]{escape(describe(event))}[/]"
    return line


def _place(event: Assigned | Live | Cover | Relieved | Moving) -> str:
    """Which stage this machine serves, or serves no more."""
    from rich.markup import escape

    match event:
        case Assigned():
            return f"[bold]stage {event.stage} of {event.num_stages}[/]: {escape(event.reason)}"
        case Live():
            metrics = f", metrics at http://{event.metrics_endpoint}/metrics" if event.metrics_endpoint else ""
            return f"serving at {event.endpoint} as {event.peer_id}{metrics}"
        case Cover():
            return f"serving stage {event.stage} too: {escape(event.reason)}"
        case Relieved():
            return f"leaving stage {event.stage} to {event.peer_id}"
        case Moving():
            return f"leaving stage {event.stage} for stage {event.to_stage}: {escape(event.reason)}"


def beside_line(stage: int, event: Event) -> str | None:
    """The same of a worker beside the first one: less of it, and with its stage."""
    match event:
        case Live() | Worker(state="restarting") | Error():
            line = event_line(event)
            return None if line is None else f"     stage {stage}: {line.strip()}"
        case Relieved():
            return event_line(event)
    return None


class JoinDisplay(Protocol):
    """Where a joining peer's story is told."""

    def show(self, event: Event) -> None: ...
    def show_beside(self, stage: int, event: Event) -> None: ...
    def close(self) -> None: ...


class JsonDisplay:
    """Every event as a JSON line on stdout, and nothing else."""

    def show(self, event: Event) -> None:
        emit(event)

    def show_beside(self, stage: int, event: Event) -> None:
        emit(event)

    def close(self) -> None:
        pass


class PlainDisplay:
    """Lines, for a file or a pipe: events as they come, the live line now and then and when its verdict changes."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._state = Contribution()
        self._said = ("", -math.inf)

    def show(self, event: Event) -> None:
        if (line := event_line(event)) is not None:
            self._console.print(line)
        self._state = self._state.observe(event)
        if isinstance(event, StageStep | Link | Complete | StateTransfer):
            self._say()

    def show_beside(self, stage: int, event: Event) -> None:
        if (line := beside_line(stage, event)) is not None:
            self._console.print(line)
        self._state = self._state.observe_beside(stage, event)

    def _say(self) -> None:
        (_, words), now = verdict(self._state), self._clock()
        if words != self._said[0] or now - self._said[1] >= PLAIN_PERIOD_SECONDS:
            self._said = (words, now)
            self._console.print(contribution_line(self._state))

    def close(self) -> None:
        if self._state.microbatches:
            self._console.print(contribution_line(self._state))


class LiveDisplay:
    """A terminal: lines scroll by, and the last line is redrawn."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from rich.live import Live as RichLive

        self._console = console
        self._clock = clock
        self._state = Contribution()
        self._drawn_at = -math.inf
        # No refresh thread: the supervisor forks, and a fork should happen with one thread.
        self._live = RichLive("", console=console, auto_refresh=False)
        self._live.start()

    def show(self, event: Event) -> None:
        if (line := event_line(event)) is not None:
            self._console.print(line)
        self._state = self._state.observe(event)
        now = self._clock()
        if now - self._drawn_at >= _REDRAW_PERIOD_SECONDS or not isinstance(event, StageStep):
            self._drawn_at = now
            self._live.update(contribution_line(self._state), refresh=True)

    def show_beside(self, stage: int, event: Event) -> None:
        if (line := beside_line(stage, event)) is not None:
            self._console.print(line)
        before, self._state = self._state, self._state.observe_beside(stage, event)
        if self._state != before:
            self._live.update(contribution_line(self._state), refresh=True)

    def close(self) -> None:
        self._live.update(contribution_line(self._state), refresh=True)
        self._live.stop()


def join_display(*, json_lines: bool) -> JoinDisplay:
    """JSON lines, or what the terminal (or the lack of one) asks for."""
    if json_lines:
        return JsonDisplay()
    from rich.console import Console

    console = Console(highlight=False)
    return LiveDisplay(console) if console.is_terminal else PlainDisplay(Console(highlight=False, soft_wrap=True))
