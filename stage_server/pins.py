"""Which checkpoints somebody is downloading at the moment, so that they are not removed under their hands."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Final

MAX_PINNED: Final = 3  # a stranger who downloads again and again must not fill the disk


class Pins:
    """Steps with an expiry each. Safe to use from several threads.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._until: dict[int, float] = {}
        self._lock = threading.Lock()

    def pin(self, step: int, lasting: timedelta) -> bool:
        """Pins a step from now on for a while; never shortens a pin. False: MAX_PINNED others are pinned already."""
        with self._lock:
            self._forget_expired()
            if step not in self._until and len(self._until) >= MAX_PINNED:
                return False
            self._until[step] = max(self._until.get(step, 0.0), self._clock() + lasting.total_seconds())
            return True

    def pinned(self) -> frozenset[int]:
        with self._lock:
            self._forget_expired()
            return frozenset(self._until)

    def _forget_expired(self) -> None:
        now = self._clock()
        self._until = {step: until for step, until in self._until.items() if until > now}
