"""Which chunk of a state is fetched from which peer, what is here already, and how long the rest takes.

A plan is a state machine without I/O or clocks: whoever drives it says what time it is, in seconds that only grow.
Peers take chunks as they get done with others, so a faster one gives more. A chunk whose peer takes far longer than
usual is given to a second one as well when nothing else is left to do; whoever brings it first wins.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from stage_server.state_listing import CHUNK_BYTES, StateFile, StateListing

SPEED_WINDOW_SECONDS: Final = 10.0
SHORTEST_SECONDS: Final = 1e-3  # in less than this no rate is measured
PATIENCE: Final = 3.0  # times the mean time of a chunk
MIN_PATIENCE_SECONDS: Final = 1.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive bytes of one file, and the hash by which they are believed."""

    name: str
    file_sha256: bytes
    offset_bytes: int
    size_bytes: int
    sha256: bytes


@dataclass(frozen=True, slots=True)
class StateProgress:
    """How far a download is. `seconds_left` is None while nothing has come, at the rate of the last ten seconds."""

    done_bytes: int
    total_bytes: int
    bytes_per_second: float
    seconds_left: float | None


def chunks_of(file: StateFile) -> Iterator[Chunk]:
    """The chunks of a file, in order."""
    for index, sha256 in enumerate(file.chunk_sha256):
        offset = index * CHUNK_BYTES
        yield Chunk(file.name, file.sha256, offset, min(CHUNK_BYTES, file.size_bytes - offset), sha256)


class FetchPlan:
    """The chunks of one state: waiting, with one peer or more, or here.

    Args:
        listing: the state.
        here: chunks that need not be fetched.
        now: seconds.
    """

    def __init__(self, listing: StateListing, here: Iterable[Chunk], now: float) -> None:
        everything = [chunk for file in listing.files for chunk in chunks_of(file)]
        self._here = set(here)
        self._waiting = deque(chunk for chunk in everything if chunk not in self._here)
        self._held: dict[Chunk, dict[str, float]] = {}  # by whom, since when
        self._total_bytes = listing.size_bytes
        self._done_bytes = sum(chunk.size_bytes for chunk in self._here)
        self._arrivals = deque([(now, 0)])  # when, bytes
        self._num_arrived, self._busy_seconds = 0, 0.0

    @property
    def is_complete(self) -> bool:
        return not self._waiting and not self._held

    def is_here(self, chunk: Chunk) -> bool:
        return chunk in self._here

    def claim(self, donor: str, now: float) -> Chunk | None:
        """The chunk that a peer with a free place should fetch; None: nothing for it at the moment."""
        chunk = self._waiting.popleft() if self._waiting else self._overdue(donor, now)
        if chunk:
            self._held.setdefault(chunk, {})[donor] = now
        return chunk

    def patience_seconds(self) -> float:
        """How long a chunk may be with a peer before another one tries too."""
        mean = self._busy_seconds / self._num_arrived if self._num_arrived else 0.0
        return max(MIN_PATIENCE_SECONDS, PATIENCE * mean)

    def give_back(self, donor: str, chunk: Chunk) -> None:
        """A peer did not bring a chunk: it waits again, before the others, unless someone else is at it."""
        holders = self._held.get(chunk)
        if holders is None or donor not in holders:
            return
        del holders[donor]
        if not holders:
            del self._held[chunk]
            self._waiting.appendleft(chunk)

    def arrived(self, donor: str, chunk: Chunk, now: float) -> bool:
        """A chunk has come from a peer, and its hash is right. False: it was here already."""
        if chunk in self._here:
            return False
        started = self._held.pop(chunk, {}).get(donor, now)
        if chunk in self._waiting:  # given back, and came nevertheless
            self._waiting.remove(chunk)
        self._here.add(chunk)
        self._done_bytes += chunk.size_bytes
        self._num_arrived, self._busy_seconds = self._num_arrived + 1, self._busy_seconds + now - started
        self._arrivals.append((now, chunk.size_bytes))
        return True

    def progress(self, now: float) -> StateProgress:
        while len(self._arrivals) > 1 and self._arrivals[1][0] <= now - SPEED_WINDOW_SECONDS:
            self._arrivals.popleft()
        seconds = now - self._arrivals[0][0]
        recent_bytes = sum(size for _, size in list(self._arrivals)[1:])
        rate = recent_bytes / seconds if seconds >= SHORTEST_SECONDS else 0.0
        left = self._total_bytes - self._done_bytes
        seconds_left = 0.0 if not left else left / rate if rate else None
        return StateProgress(self._done_bytes, self._total_bytes, rate, seconds_left)

    def _overdue(self, donor: str, now: float) -> Chunk | None:
        """Of the chunks that other peers have had for too long, the one that was asked for first."""
        latest = {chunk: max(since.values()) for chunk, since in self._held.items() if donor not in since}
        oldest = min(latest, key=latest.__getitem__, default=None)
        if oldest is None or now - latest[oldest] < self.patience_seconds():
            return None
        return oldest
