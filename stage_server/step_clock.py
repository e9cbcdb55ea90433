"""How a peer spends its wall time, step by step."""

from __future__ import annotations

import time
from datetime import timedelta

from stage_server.reports import LinkBytes
from stage_server.totals import Totals
from stage_server.window import Pace, PaceMeter


class StepClock:
    """Splits wall time into computing and waiting, and cuts it at commits."""

    def __init__(self, totals: Totals) -> None:
        self._totals = totals
        self._lap_started = time.monotonic()
        self._before = (0.0, 0.0, totals.link())
        self._pace = PaceMeter()

    def computing(self) -> _Span:
        """For a `with` around work."""
        return _Span(self._totals, "compute_seconds")

    def waiting(self) -> _Span:
        """For a `with` around waiting."""
        return _Span(self._totals, "wait_seconds")

    def forwarded(self) -> None:
        """A training microbatch is computed forward."""
        self._pace.forwarded()

    def done(self) -> None:
        """A training microbatch is done."""
        self._pace.done(time.monotonic())

    def lap(self) -> tuple[timedelta, Pace, timedelta, timedelta, LinkBytes]:
        """(wall, pace, compute, wait, link traffic) since the lap before."""
        now, totals, link = time.monotonic(), self._totals, self._totals.link()
        compute, wait, before = self._before
        self._before = (totals.compute_seconds, totals.wait_seconds, link)
        wall = timedelta(seconds=now - self._lap_started)
        self._lap_started = now
        pace, self._pace = self._pace.pace, PaceMeter()
        traffic = LinkBytes(
            link.dense_bytes - before.dense_bytes,
            link.wire_bytes_forward - before.wire_bytes_forward,
            link.wire_bytes_backward - before.wire_bytes_backward,
        )
        seconds = timedelta(seconds=totals.compute_seconds - compute), timedelta(seconds=totals.wait_seconds - wait)
        return wall, pace, *seconds, traffic


class _Span:
    """Adds the time between enter and exit to one counter."""

    def __init__(self, totals: Totals, counter: str) -> None:
        self._totals = totals
        self._counter = counter

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        elapsed = time.monotonic() - self._started
        setattr(self._totals, self._counter, getattr(self._totals, self._counter) + elapsed)
