"""`resbm-node` processes for tests: started, listened to through their --json lines, and ended."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import pytest

from node.events import Event, parse_event

E = TypeVar("E", bound=Event)
Wrap = Callable[[Sequence[str]], list[str]]


class NodeProcess:
    """One `resbm-node COMMAND ... --json` and what it has said so far."""

    def __init__(self, folder: Path, *arguments: str, wrap: Wrap = list) -> None:
        """`folder`: state and logs. `wrap`: the command line that runs a command line elsewhere."""
        folder.mkdir(exist_ok=True)
        self._out, self._errors = folder / "events.jsonl", folder / "errors.log"
        command = [sys.executable, "-m", "node.cli", *arguments, "--state-dir", str(folder), "--json"]
        with self._out.open("wb") as out, self._errors.open("wb") as errors:
            self.process = subprocess.Popen(wrap(command), stdout=out, stderr=errors)

    def events(self, kind: type[E]) -> list[E]:
        """All events of one kind, oldest first."""
        lines = self._out.read_bytes().splitlines(keepends=True)
        events = [parse_event(line) for line in lines if line.endswith(b"\n")]
        return [event for event in events if isinstance(event, kind)]

    def wait_for(self, kind: type[E], seconds: float, wanted: Callable[[E], bool] = lambda event: True) -> E:
        """The first event of a kind that is wanted; the test fails when none comes or the process ends."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if found := next(filter(wanted, self.events(kind)), None):
                return found
            if self.process.poll() is not None:
                break
            time.sleep(0.1)
        pytest.fail(f"no {kind.__name__}: {self._out.read_text()[-600:]} {self._errors.read_text()[-600:]}")


def leave_all(nodes: Sequence[NodeProcess], seconds: float = 30) -> None:
    """SIGTERM to all, and waits until they are gone."""
    for node in nodes:
        if node.process.poll() is None:
            node.process.terminate()
    for node in nodes:
        node.process.wait(seconds)
