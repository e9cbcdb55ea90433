"""Whether peers that live long grow: their memory and open files over time.

Memory is proportional (PSS): a peer is several processes that share most pages with the one they were forked from. Two
of them, the averager's, it has only while somebody else serves its stage: like is compared with like, its samples with
as many processes as it mostly has.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

SAMPLE_SECONDS = 20.0
WARM_UP_SECONDS = 120.0
WARM_UP_SHARE = 1 / 6
"""A peer's first part, whichever is longer: it starts, takes over a state, and its allocators find their size."""
FEWEST_SAMPLES = 9
LONG_LIFE = 1 / 2
"""Of the longest that any peer lived. Under churn most live some minutes, and find their size for all of them."""
HOUR = 3600.0
MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Sample:
    """One peer, all its processes together."""

    at: float  # monotonic seconds
    memory_bytes: int
    open_files: int
    processes: int


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line's, by least squares, with its standard error.

    What a peer holds at one moment is much like what it held at the one before, so there is less to learn from the
    points than their number says: they count as n (1 - r) / (1 + r), with r the residuals' correlation from each to the
    next (Santer et al. 2000, J. Geophys. Res. 105, section 3.1).
    """

    per_second: float
    error: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Slope:
        """Of at least three points (x, y) that are not all at one x."""
        xs, ys = zip(*points, strict=True)
        line = statistics.linear_regression(xs, ys)
        residuals = [y - (line.slope * x + line.intercept) for x, y in points]
        spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
        squares = sum(r * r for r in residuals)
        return cls(line.slope, math.sqrt(squares / max(1.0, _effective(residuals, squares) - 2) / spread))


def _effective(residuals: Sequence[float], squares: float) -> float:
    """As how many independent ones they count."""
    if squares <= 0.0:
        return len(residuals)
    follows = sum(a * b for a, b in itertools.pairwise(residuals)) / squares
    return len(residuals) * (1 - max(0.0, follows)) / (1 + max(0.0, follows))


@dataclass(slots=True)
class Health:
    """Samples of all peers."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def survivors(self) -> dict[str, list[Sample]]:
        """Of peers that lived long enough for a trend, what was seen after they had warmed up."""
        enough = LONG_LIFE * max(map(_seconds, self.samples.values()), default=0.0)
        long = {peer: samples for peer, samples in self.samples.items() if _seconds(samples) >= enough}
        settled = {peer: _alike(_settled(samples)) for peer, samples in long.items()}
        return {peer: samples for peer, samples in settled.items() if len(samples) >= FEWEST_SAMPLES}

    def memory_slopes(self) -> dict[str, Slope]:
        """By survivor, bytes a second."""
        return self._slopes(lambda sample: sample.memory_bytes)

    def file_slopes(self) -> dict[str, Slope]:
        """By survivor, open files a second."""
        return self._slopes(lambda sample: sample.open_files)

    def summary(self) -> dict[str, float | int | None]:
        """Medians over the survivors: half of them are below, so that one that is odd does not hide a trend."""
        memory, files = self.memory_slopes().values(), self.file_slopes().values()
        changes = [samples[-1].open_files - samples[0].open_files for samples in self.survivors().values()]
        return {
            "survivors": len(self.survivors()),
            "memory_slope_mb_per_hour": _median(slope.per_second * HOUR / MEGABYTE for slope in memory),
            "memory_slope_error_mb_per_hour": _median(slope.error * HOUR / MEGABYTE for slope in memory),
            "open_files_slope_per_hour": _median(slope.per_second * HOUR for slope in files),
            "open_files_slope_error_per_hour": _median(slope.error * HOUR for slope in files),
            "open_files_change": max(changes, key=abs, default=None),
        }

    def _slopes(self, value: Callable[[Sample], float]) -> dict[str, Slope]:
        return {
            peer: Slope.of([(sample.at, float(value(sample))) for sample in samples])
            for peer, samples in self.survivors().items()
        }


def _seconds(samples: Sequence[Sample]) -> float:
    return samples[-1].at - samples[0].at


def _settled(samples: Sequence[Sample]) -> list[Sample]:
    warm_up = max(WARM_UP_SECONDS, WARM_UP_SHARE * _seconds(samples))
    return [sample for sample in samples if sample.at - samples[0].at >= warm_up]


def _alike(samples: Sequence[Sample]) -> list[Sample]:
    """Those with the number of processes that is most frequent."""
    counts = Counter(sample.processes for sample in samples)
    usual = max(counts, key=counts.__getitem__, default=0)
    return [sample for sample in samples if sample.processes == usual]


def _median(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.median(found) if found else None


async def keep_sampling(health: Health, pids: Callable[[], Mapping[str, int]]) -> None:
    """For ever. `pids`: by peer, its first process; those that are gone meanwhile are passed over."""
    while True:
        for peer, pid in pids().items():
            sample = await asyncio.to_thread(_sample, pid)
            if sample is not None:
                health.samples.setdefault(peer, []).append(sample)
        await asyncio.sleep(SAMPLE_SECONDS)


def _share_of(process: psutil.Process) -> int:
    """Memory in bytes, shared pages divided among those that share them; where the system cannot tell, resident."""
    found = process.memory_full_info()
    return int(getattr(found, "pss", found.rss))


def _sample(pid: int) -> Sample | None:
    memory = files = 0
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
        for process in processes:
            memory += _share_of(process)
            files += process.num_fds()
    except psutil.Error:  # it, or a part of it, has just ended: what was counted is no whole
        return None
    return Sample(time.monotonic(), memory, files, len(processes))
