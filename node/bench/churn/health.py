"""Whether peers that live long grow: their memory and open files over time, and what a run leaves behind."""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import psutil

SAMPLE_SECONDS = 10.0
WARM_UP_SECONDS = 120.0
"""A peer's first ones: it starts, takes over a state, and its allocators find their size."""
FEWEST_SAMPLES = 12
HOUR = 3600.0
MEGABYTE = 1e6


@dataclass(frozen=True, slots=True)
class Sample:
    """One peer, all its processes together."""

    at: float  # monotonic seconds
    resident_bytes: int
    open_files: int


@dataclass(frozen=True, slots=True)
class Slope:
    """A straight line's, by least squares, with its standard error."""

    per_second: float
    error: float

    @classmethod
    def of(cls, points: Sequence[tuple[float, float]]) -> Slope:
        """Of at least three points (x, y) that are not all at one x."""
        xs, ys = zip(*points, strict=True)
        line = statistics.linear_regression(xs, ys)
        residuals = [y - (line.slope * x + line.intercept) for x, y in points]
        spread = sum((x - statistics.fmean(xs)) ** 2 for x in xs)
        return cls(line.slope, math.sqrt(sum(r * r for r in residuals) / (len(points) - 2) / spread))


@dataclass(slots=True)
class Health:
    """Samples of all peers."""

    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def survivors(self) -> dict[str, list[Sample]]:
        """Of peers that lived long enough for a trend, what was seen after they had warmed up."""
        settled = {
            peer: [sample for sample in samples if sample.at - samples[0].at >= WARM_UP_SECONDS]
            for peer, samples in self.samples.items()
        }
        return {peer: samples for peer, samples in settled.items() if len(samples) >= FEWEST_SAMPLES}

    def memory_slopes(self) -> dict[str, Slope]:
        """By survivor, bytes a second."""
        return {
            peer: Slope.of([(sample.at, float(sample.resident_bytes)) for sample in samples])
            for peer, samples in self.survivors().items()
        }

    def summary(self) -> dict[str, float | int | None]:
        """Medians over the survivors: half of them are below, so that one that is odd does not hide a trend."""
        slopes = self.memory_slopes().values()
        files = [samples[-1].open_files - samples[0].open_files for samples in self.survivors().values()]
        hourly = HOUR / MEGABYTE
        return {
            "survivors": len(slopes),
            "memory_slope_mb_per_hour": statistics.median(s.per_second for s in slopes) * hourly if slopes else None,
            "memory_slope_error_mb_per_hour": statistics.median(s.error for s in slopes) * hourly if slopes else None,
            "open_files_change": max(files, key=abs) if files else None,
        }


async def keep_sampling(health: Health, pids: Callable[[], Mapping[str, int]]) -> None:
    """For ever. `pids`: by peer, its first process; those that are gone meanwhile are passed over."""
    while True:
        for peer, pid in pids().items():
            sample = await asyncio.to_thread(_sample, pid)
            if sample is not None:
                health.samples.setdefault(peer, []).append(sample)
        await asyncio.sleep(SAMPLE_SECONDS)


def _sample(pid: int) -> Sample | None:
    resident = files = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            resident += process.memory_info().rss
            files += process.num_fds()
    except psutil.Error:  # it, or a part of it, has just ended: what was counted is no whole
        return None
    return Sample(time.monotonic(), resident, files)
