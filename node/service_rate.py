"""What a peer can serve, followed while it serves. Pure.

The measurement before joining is short, and the machine may have been busy: placement and the shares of sources rest on
this rate, so it is corrected by what the device really took. Small changes are not told: others act on it.
"""

from __future__ import annotations

ENOUGH = 32
"""Microbatches in one measurement."""
WEIGHT = 0.5
"""Of the newest measurement."""
TELLING = 0.2
"""A rate that differs by a smaller share is as good as the one that was told."""


class ServiceRate:
    """Microbatches per second of device time."""

    def __init__(self, measured: float) -> None:
        """`measured`: before joining."""
        self.told = measured
        self._rate: float | None = None
        self._at: tuple[int, float] | None = None

    def follow(self, microbatches: int, compute_seconds: float) -> float:
        """The rate to tell, given what was done so far and the device time that it took."""
        if self._at is None:
            self._at = microbatches, compute_seconds
            return self.told
        done, seconds = microbatches - self._at[0], compute_seconds - self._at[1]
        if done < ENOUGH or seconds <= 0:
            return self.told
        self._at = microbatches, compute_seconds
        newest = done / seconds
        self._rate = newest if self._rate is None else self._rate + WEIGHT * (newest - self._rate)
        if abs(self._rate - self.told) > TELLING * self.told:
            self.told = self._rate
        return self.told
