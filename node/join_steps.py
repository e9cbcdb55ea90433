"""The numbered steps of joining, as events: each with a verdict, a duration and what was found."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from node.errors import CodedError
from node.events import CHECK_NAMES, Check, CheckName, Event


class JoinSteps:
    """Emits one Check per step, also for one that fails."""

    def __init__(self, emit: Callable[[Event], None]) -> None:
        self._emit = emit

    @contextmanager
    def step(self, name: CheckName) -> Iterator[Callable[[str], None]]:
        """Runs one step. The yielded function takes what to say of it; a text that starts with "!" is a warning."""
        started = time.monotonic()
        said = [""]
        try:
            yield lambda text: said.__setitem__(0, text)
        except Exception as error:
            cause = error.cause if isinstance(error, CodedError) else str(error)
            self._say(name, "failed", started, cause)
            raise
        warning = said[0].startswith("!")
        self._say(name, "warn" if warning else "ok", started, said[0].removeprefix("!").strip())

    def _say(self, name: CheckName, verdict: str, started: float, detail: str) -> None:
        number = CHECK_NAMES.index(name) + 1
        seconds = time.monotonic() - started
        self._emit(Check(number=number, name=name, verdict=verdict, seconds=seconds, detail=detail))
