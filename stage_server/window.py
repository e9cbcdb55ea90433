"""How many microbatches the first stage keeps in flight: measured, not configured. Pure.

Little's law: a pipe whose slowest stage serves one microbatch every `interval` and whose empty round trip takes
`round_trip` is full with round_trip / interval microbatches in it; more only wait in queues and hold memory. Both are
taken as minima over a recent past, when queues were short, as BBR does for bytes (Cardwell et al., 2016).
"""

from __future__ import annotations

import math
from collections import deque
from datetime import timedelta

_MEMORY = 64  # samples; long enough to hold a quiet moment, short enough to follow a changed route


class CreditWindow:
    """Follows round trips and completions; `size` is the present window, in microbatches."""

    def __init__(self, num_stages: int) -> None:
        self._least = num_stages  # 1F1B needs one per stage, even where round trips are free
        self._round_trips: deque[float] = deque(maxlen=_MEMORY)
        self._intervals: deque[float] = deque(maxlen=_MEMORY)
        self.size = num_stages

    def completed(self, round_trip: timedelta, since_last: timedelta | None) -> None:
        """A microbatch is back. `since_last`: time since the one before it, None for the first of a step."""
        self._round_trips.append(round_trip.total_seconds())
        if since_last is not None:
            self._intervals.append(since_last.total_seconds())
        if len(self._intervals) < 4:
            return
        # The median: gaps between completions are sometimes tiny (two arrive together), never for long.
        interval = max(sorted(self._intervals)[len(self._intervals) // 2], 1e-6)
        self.size = max(self._least, math.ceil(min(self._round_trips) / interval) + 1)
