"""How many microbatches the first stage keeps in flight: measured, not configured. Pure.

Little's law: a pipe whose slowest stage serves one microbatch every `interval` and whose empty round trip takes
`round_trip` is full with round_trip / interval microbatches in it; more only wait in queues and hold memory. As BBR
does for bytes (Cardwell et al., 2016), the round trip is the shortest that was seen lately, when queues were short. A
pipeline empties at every commit, so that each step begins with such a moment: the shortest of this step and the one
before is the pipe's own, however long the steps are, and it follows a changed route within two of them.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from datetime import timedelta

_INTERVALS = 64  # completions over which the pace is measured
_ENOUGH = 4  # intervals, before they are believed
_SLACK = 1.25  # times the exact need: computing times vary, and a pipe that runs dry costs more than a short queue


@dataclass(frozen=True, slots=True)
class Pace:
    """Completions between the fill and the drain of a step; none where all of a step was in flight at once."""

    microbatches: int = 0
    seconds: float = 0.0


NO_PACE = Pace()


class PaceMeter:
    """Measures the pace inside one step: from the first microbatch done, when the pipeline is full, to the last one
    done before this stage has nothing more to compute forward, when it begins to drain."""

    def __init__(self) -> None:
        self.pace = NO_PACE
        self._first_at: float | None = None
        self._now = NO_PACE

    def forwarded(self) -> None:
        """A microbatch is computed forward: the pipeline was full until now."""
        self.pace = self._now

    def done(self, at: float) -> None:
        """A microbatch is done, at so many seconds of a monotonic clock."""
        if self._first_at is None:
            self._first_at = at
        else:
            self._now = Pace(self._now.microbatches + 1, at - self._first_at)


class CreditWindow:
    """Follows round trips and completions; `size` is the present window, in microbatches."""

    def __init__(self, num_stages: int) -> None:
        self._least = num_stages  # 1F1B needs one per stage, even where round trips are free
        self._intervals: deque[float] = deque(maxlen=_INTERVALS)
        self._shortest = math.inf  # round trip of this step, seconds
        self._shortest_before = math.inf  # of the step before
        self._last_at: timedelta | None = None
        self.size = num_stages

    def completed(self, at: timedelta, round_trip: timedelta) -> None:
        """A microbatch is back, at that moment of a monotonic clock."""
        self._shortest = min(self._shortest, round_trip.total_seconds())
        if self._last_at is not None:
            self._intervals.append((at - self._last_at).total_seconds())
        self._last_at = at
        if len(self._intervals) < _ENOUGH:
            return
        # The median: gaps between completions are sometimes tiny (two arrive together), or as long as a round trip
        # (the window was too small), but most of them are the pace of the slowest stage.
        interval = max(sorted(self._intervals)[len(self._intervals) // 2], 1e-6)
        round_trip_seconds = min(self._shortest, self._shortest_before)
        self.size = max(self._least, math.ceil(_SLACK * round_trip_seconds / interval) + 1)

    def step_ended(self) -> None:
        """The pipe is empty now, and the pause until the next completion says nothing of its pace."""
        self._shortest_before, self._shortest = self._shortest, math.inf
        self._last_at = None
