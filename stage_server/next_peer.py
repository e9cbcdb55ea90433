"""Which of several peers of the next stage a microbatch goes to. Pure, but for chance."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from stage_server.ids import MicrobatchId

_WEIGHT = 0.2  # of the newest measurement
_OVERDUE_FACTOR = 20.0  # times what the slowest peer takes


class ServiceTimes:
    """How long each peer of the next stage takes for one microbatch: hop time over the queue that it stood in."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._answered_at: dict[str, float] = {}
        self._sent: dict[MicrobatchId, tuple[str, float, int]] = {}

    def sent(self, name: MicrobatchId, peer: str, now: float, outstanding: int) -> None:
        """Latents went to the peer, which had so many others to answer. `now`: monotonic seconds."""
        self._sent[name] = peer, now, outstanding

    def returned(self, name: MicrobatchId, peer: str, now: float) -> None:
        """The answer is here. One from another peer than was asked last says nothing of the time that it took."""
        self._answered_at[peer] = now
        asked, sent_at, outstanding = self._sent.get(name, (None, 0.0, 0))
        if asked != peer:
            return
        del self._sent[name]
        seconds = (now - sent_at) / (outstanding + 1)
        before = self.seconds.get(peer)
        self.seconds[peer] = seconds if before is None else before + _WEIGHT * (seconds - before)

    def forget(self, peer: str) -> None:
        """The peer is gone."""
        self.seconds.pop(peer, None)
        self._answered_at.pop(peer, None)

    def overdue(self, outstanding: Mapping[str, int], now: float, least_seconds: float) -> frozenset[str]:
        """Peers that owe answers and have given none for long: they speak, but do not work.

        Long is `least_seconds`, or many times what the slowest takes for as much. Before anything was measured nobody
        is judged.
        """
        if not self.seconds:
            return frozenset()
        slowest = max(self.seconds.values())
        oldest: dict[str, float] = {}
        for peer, sent_at, _ in self._sent.values():
            oldest[peer] = min(sent_at, oldest.get(peer, sent_at))
        return frozenset(
            peer
            for peer, sent_at in oldest.items()
            if (owed := outstanding.get(peer, 0))
            and now - max(sent_at, self._answered_at.get(peer, sent_at))
            > max(least_seconds, _OVERDUE_FACTOR * slowest * (owed + 1))
        )

    def forget_before(self, step: int) -> None:
        """Of earlier steps nothing is waited for any more."""
        self._sent = {name: sent for name, sent in self._sent.items() if name.step >= step}


def choose_next(
    candidates: Sequence[str],
    outstanding: Mapping[str, int],
    seconds: Mapping[str, float],
    last: str | None,
    chance: random.Random,
) -> str | None:
    """The peer to send to; None without candidates.

    Of two drawn at random the one that will have answered first ("power of two choices", Mitzenmacher 2001): near the
    best, without everybody choosing the same. Where they are equal, the one that was sent to last. A peer never
    measured is taken for as fast as the fastest, so that it is tried.
    """
    if not candidates:
        return None
    fastest = min(seconds.values(), default=1.0)

    def wait(peer: str) -> tuple[float, bool]:
        return (outstanding.get(peer, 0) + 1) * seconds.get(peer, fastest), peer != last

    return min(chance.sample(sorted(candidates), min(2, len(candidates))), key=wait)
