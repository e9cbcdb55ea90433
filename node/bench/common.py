"""What all benchmarks share: who watches, the facts of the machine, tables, and the result file."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from node.errors import MachineUnfit
from node.folders import replace_text
from node.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

Quick = Annotated[bool, typer.Option("--quick", help="A few minutes at most: the same code, fewer repeats.")]
JsonLines = Annotated[bool, typer.Option("--json", help="Print JSON lines only, the last one a summary.")]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out", help="Where the full result goes.", metavar="FILE", show_default="./runs/bench/NAME-TIME.json"
    ),
]


PLAIN_PERIOD_SECONDS = 10.0
"""Between lines where output goes to a file."""
FILE_WIDTH = 200
"""Columns for tables that go to a file or a pipe: nothing there says how many there are, and 80 break their words."""


@dataclass(frozen=True, slots=True)
class Table:
    """Figures for people. Every cell is text already."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---", *["---:"] * (len(self.columns) - 1)], *self.rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


class Watcher(Protocol):
    """Who watches a benchmark: a person at a terminal, or a script."""

    def doing(self, text: str, done: float) -> None:
        """What is being done, and the share of the whole that is done (0 to 1)."""

    def note(self, fields: Mapping[str, Any]) -> None:
        """One measurement is made: `event` names its kind."""

    def end(self, tables: Sequence[Table], summary: Mapping[str, Any], path: Path) -> None:
        """The result."""


class JsonWatcher:
    """JSON lines on stdout and nothing else."""

    def doing(self, text: str, done: float) -> None:
        pass

    def note(self, fields: Mapping[str, Any]) -> None:
        print(json.dumps(fields), flush=True)  # noqa: T201

    def end(self, tables: Sequence[Table], summary: Mapping[str, Any], path: Path) -> None:
        print(json.dumps({"event": "summary", **summary, "file": str(path)}), flush=True)  # noqa: T201


class TerminalWatcher:
    """A progress bar with the time left, and tables at the end."""

    def __init__(self, console: Console) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._console = console
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            transient=True,
            auto_refresh=False,  # no thread: some benchmarks fork
            speed_estimate_period=600.0,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task("starting", total=1.0)
        self._said_at = -PLAIN_PERIOD_SECONDS

    def doing(self, text: str, done: float) -> None:
        self.progress.update(self._task, description=text, completed=done, refresh=True)
        if not self._console.is_terminal and time.monotonic() - self._said_at >= PLAIN_PERIOD_SECONDS:
            self._said_at = time.monotonic()
            self._console.print(f"{100 * done:3.0f} % {text}")

    def note(self, fields: Mapping[str, Any]) -> None:
        if text := fields.get("text"):
            self._console.print(text)

    def end(self, tables: Sequence[Table], summary: Mapping[str, Any], path: Path) -> None:
        self.progress.stop()
        for table in tables:
            self._console.print(_rich_table(table))
        facts = ", ".join(f"{key} {_short(value)}" for key, value in summary.items() if not isinstance(value, dict))
        self._console.print(f"[bold]{facts}[/]")
        self._console.print(f"full result: {path}")


@contextmanager
def watching(*, json_lines: bool) -> Iterator[Watcher]:
    """The watcher that the command line asks for; the terminal is left as it was."""
    if json_lines:
        yield JsonWatcher()
        return
    from rich.console import Console

    console = Console(highlight=False)
    watcher = TerminalWatcher(
        console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=FILE_WIDTH)
    )
    with watcher.progress:
        yield watcher


def _rich_table(table: Table) -> Any:
    from rich.table import Table as RichTable

    drawn = RichTable(title=table.title, title_justify="left")
    for number, column in enumerate(table.columns):
        drawn.add_column(column, justify="right" if number else "left")
    for row in table.rows:
        drawn.add_row(*row)
    return drawn


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# -- figures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeats of one measurement: the middle, and how far they lie apart."""

    median: float
    low: float
    high: float
    repeats: Sequence[float]

    @classmethod
    def of(cls, repeats: Sequence[float]) -> Spread:
        return cls(statistics.median(repeats), min(repeats), max(repeats), tuple(repeats))

    def text(self, digits: int = 2) -> str:
        """'0.93 (0.91 to 0.95)'."""
        return f"{self.median:.{digits}f} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def machine_facts() -> dict[str, Any]:
    """What a reader needs to know of the machine that made a figure."""
    import psutil

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average_before": list(os.getloadavg()),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": metadata.version("torch"),  # not imported: some benchmarks fork
        "grpcio": metadata.version("grpcio"),
        "software": __version__,
    }


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


# -- the result -------------------------------------------------------------------------------------------------


class Report:
    """Collects one benchmark's result, then writes and tells it."""

    def __init__(self, name: str, watcher: Watcher, *, quick: bool, out: Path | None) -> None:
        """Raises MachineUnfit at once, not after an hour, when `out` cannot be written."""
        self.watcher = watcher
        self._path = out or Path("runs", "bench", f"{name}-{datetime.now():%Y%m%d-%H%M%S}.json")
        with _writable(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._path.parent):
                pass
        self._started = time.monotonic()
        self._result: dict[str, Any] = {
            "benchmark": name,
            "command": f"resbm-node {' '.join(sys.argv[1:])}",
            "quick": quick,
            "date": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
            "machine": machine_facts(),
        }

    def finish(self, measurements: Any, tables: Sequence[Table], summary: Mapping[str, Any]) -> None:
        """Writes the file and tells the watcher. Raises MachineUnfit when the disk refuses."""
        self._result |= {
            "seconds": round(time.monotonic() - self._started, 1),
            "load_average_after": list(os.getloadavg()),
            "summary": dict(summary),
            "tables": [asdict(table) for table in tables],
            "measurements": measurements,
        }
        with _writable(self._path):
            replace_text(self._path, json.dumps(self._result, indent=1, default=_plain) + "\n")
        self.watcher.end(tables, summary, self._path)


def _plain(value: Any) -> Any:
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return value.model_dump()
    raise TypeError(f"{value!r} is no part of a result file")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineUnfit(
            f"the result file {path} cannot be written: {error.strerror}", remedy="choose another --out"
        ) from error


def tables_of(result: Mapping[str, Any]) -> list[Table]:
    """The tables of a result file."""
    return [Table(table["title"], table["columns"], table["rows"]) for table in result["tables"]]


def repeat(measure: Callable[[], float], times: int) -> Spread:
    """One measurement, several times."""
    return Spread.of([measure() for _ in range(times)])
