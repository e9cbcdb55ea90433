"""How long a peer may say nothing before it is not waited for any more. Pure.

A peer that is busy, or far away, lets others wait now and then; one that is dead, asleep or cut off does so for good.
So the patience with each follows what it has let others wait for: a fixed one is too short on a busy machine, and too
long for all who wait on a quick one.
"""

from __future__ import annotations

from dataclasses import dataclass

HALF_LIFE = 7.0
"""Seconds after which a wait counts for half."""


@dataclass(frozen=True, slots=True)
class Patience:
    """All in seconds."""

    least: float
    factor: float
    """Times the longest of the last waits."""
    longest: float


class Silence:
    """Of one peer, as one listener hears it. Times are seconds of one monotonic clock."""

    def __init__(self, patience: Patience) -> None:
        self._patience = patience
        self.heard_at: float | None = None
        self.longest_wait = 0.0  # between two words, fading

    def heard(self, now: float) -> None:
        """It said something. A silence that was given up on is no habit: it does not count."""
        if self.heard_at is not None:
            silent = now - self.heard_at
            wait = 0.0 if self.is_long(now) else silent
            self.longest_wait = max(wait, self.longest_wait * 0.5 ** (silent / HALF_LIFE))
        self.heard_at = now

    def excuse(self, seconds: float) -> None:
        """The listener itself was away for so long: what it did not hear then is nobody's silence."""
        if self.heard_at is not None:
            self.heard_at += seconds

    def is_long(self, now: float) -> bool:
        """Whether it is not waited for any more. False before its first word."""
        patience = self._patience
        limit = min(max(patience.least, patience.factor * self.longest_wait), patience.longest)
        return self.heard_at is not None and now - self.heard_at > limit
