"""What a stage has done since its process started: plain counters that only grow, for whoever watches it."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from stage_server.ids import MicrobatchId
from stage_server.reports import LinkBytes
from stage_server.work import Side

_MOST_OUT = 4096  # microbatches whose gradient is waited for; more than any window
_MOST_UNREAD = 4096  # hops that nobody has taken yet; the oldest go first


class Result(enum.StrEnum):
    """What became of a microbatch here. Each computed one counts once, under the first three."""

    TRAINED = "trained"  # its gradient entered this stage's sum
    EVALUATED = "evaluated"  # forward only
    REPLAYED = "replayed"  # either of these, but a neighbour had the result of an earlier life already
    REFUSED = "refused"  # came in a frame that the door refused


class Replays:
    """Tells computing again from computing. Pure.

    A process that restarts from a checkpoint does not remember what it had done after it. Its neighbours do, and say so
    in the handshake: a microbatch that one of them holds from here, or whose step it has committed, was done before.
    """

    def __init__(self) -> None:
        self._known: dict[Side, tuple[int, frozenset[MicrobatchId]]] = {}
        self._under_way: set[MicrobatchId] = set()

    def opened(self, side: Side, committed: int, held: Iterable[MicrobatchId]) -> None:
        """What the handshake with that neighbour said."""
        self._known[side] = (committed, frozenset(held))

    def forwarded(self, name: MicrobatchId) -> None:
        """A microbatch was forwarded here. (What a neighbour comes to hold later is no sign of anything.)"""
        if any(name.step <= committed or name in held for committed, held in self._known.values()):
            self._under_way.add(name)

    def finished(self, name: MicrobatchId) -> bool:
        """The microbatch is done: whether it was computed once more."""
        replayed = name in self._under_way
        self._under_way.discard(name)
        return replayed

    def step_ended(self, step: int) -> None:
        """The step is committed: what of it is not done here was done elsewhere."""
        self._under_way = {name for name in self._under_way if name.step > step}


class HopTimer:
    """Times microbatches from the hand-over of their latents to the link until their gradient is back. Pure."""

    def __init__(self) -> None:
        self._sent_at: dict[MicrobatchId, float] = {}
        self._unread: deque[float] = deque(maxlen=_MOST_UNREAD)

    def sent(self, name: MicrobatchId, now: float) -> None:
        """Latents were handed over; when they are sent again, the newest time counts. `now`: monotonic seconds."""
        self._sent_at[name] = now
        if len(self._sent_at) > _MOST_OUT:
            del self._sent_at[next(iter(self._sent_at))]

    def returned(self, name: MicrobatchId, now: float) -> None:
        """The gradient came in. Duplicates are ignored."""
        sent_at = self._sent_at.pop(name, None)
        if sent_at is not None:
            self._unread.append(now - sent_at)

    def take(self) -> list[float]:
        """Seconds of the hops that ended since the last call."""
        hops = list(self._unread)
        self._unread.clear()
        return hops


@dataclass(slots=True)
class Totals:
    """Counters since the process started. Seconds, bytes and microbatches only grow."""

    compute_seconds: float = 0.0
    wait_seconds: float = 0.0
    dense_bytes_forward: int = 0
    dense_bytes_backward: int = 0
    sent_bytes: dict[Side, int] = field(default_factory=lambda: dict.fromkeys(Side, 0))
    received_bytes: dict[Side, int] = field(default_factory=lambda: dict.fromkeys(Side, 0))
    frames_refused: int = 0
    microbatches: dict[Result, int] = field(default_factory=lambda: dict.fromkeys(Result, 0))
    hops: HopTimer = field(default_factory=HopTimer)

    def link(self) -> LinkBytes:
        """Traffic with the next stage so far."""
        dense_bytes = self.dense_bytes_forward + self.dense_bytes_backward
        return LinkBytes(dense_bytes, self.sent_bytes[Side.DOWNSTREAM], self.received_bytes[Side.DOWNSTREAM])
