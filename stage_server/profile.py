"""Where a stage's time goes, by kind of work. A span costs a few microseconds, so it is always on."""

from __future__ import annotations

import enum
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


class Work(enum.StrEnum):
    """Kinds of work. Each is done by one thread alone: DECODE by the event loop's, the others by the device's."""

    DATA = "data"  # the first stage reads token ids
    UNPACK = "unpack"  # bytes to latents or gradients
    FORWARD = "forward"  # recomputation included
    BACKWARD = "backward"
    PACK = "pack"  # latents or gradients to bytes
    ENCODE = "encode"  # bytes to messages: zstandard, checksum, protobuf
    DECODE = "decode"  # messages to bytes: the same, and all checks at the door
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Spent:
    """Time of one kind of work.

    `cpu_seconds` is that of the thread which did it: less than wall time where the machine was busy with others, and
    without the helper threads of torch. On a GPU the host's wall time counts, wherever it happened to wait.
    """

    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def plus(self, other: Spent) -> Spent:
        return Spent(self.wall_seconds + other.wall_seconds, self.cpu_seconds + other.cpu_seconds)

    def minus(self, other: Spent) -> Spent:
        return Spent(self.wall_seconds - other.wall_seconds, self.cpu_seconds - other.cpu_seconds)


WorkTimes = Mapping[Work, Spent]


class Profile:
    """Adds up spans. Any thread may read; each kind of work has one writer."""

    def __init__(self) -> None:
        self._spent = dict.fromkeys(Work, Spent())
        self._at_lap = dict(self._spent)

    @contextmanager
    def span(self, work: Work) -> Iterator[None]:
        """Counts what is done within. Spans do not nest: time would count twice."""
        wall, cpu = time.perf_counter(), time.thread_time()
        try:
            yield
        finally:
            spent = Spent(time.perf_counter() - wall, time.thread_time() - cpu)
            self._spent[work] = self._spent[work].plus(spent)

    def lap(self) -> dict[Work, Spent]:
        """What was spent since the lap before; kinds of work that did not happen are left out."""
        now, before = dict(self._spent), self._at_lap
        self._at_lap = now
        return {work: now[work].minus(before[work]) for work in Work if now[work] != before[work]}
