"""What `bench wan` measures: which systems, at which points, in which order, for how long. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from node.errors import ConfigInvalid
from node.lab.shapes import LinkShape

UNSHAPED = "unshaped"
BANDWIDTHS = (UNSHAPED, "1000", "100", "80", "40", "20", "10", "5", "2", "1")
QUICK_BANDWIDTHS = (UNSHAPED, "100", "20", "5")
ROUND_TRIPS_MS = (0.0, 50.0, 100.0, 200.0)
QUICK_ROUND_TRIPS_MS = (0.0, 100.0)
REFERENCE_MBIT = 80.0
"""Round trips and losses are varied at this bandwidth, the paper's."""
LATENCY_MS = 100.0
"""Bandwidths are swept without delay and at this round trip."""


class System(StrEnum):
    """Who trains."""

    DENSE = "dense"  # our pipeline without a bottleneck, bf16 both ways
    OURS = "ours"  # the preset as it is
    TORCH = "torch"  # torch.distributed.pipelining, 1F1B over gloo, bf16 both ways


@dataclass(frozen=True, slots=True, order=True)
class Point:
    """What all links are like. `rate_mbit`: of each peer's up-link and down-link; None: not limited."""

    rate_mbit: float | None
    round_trip_ms: float = 0.0
    loss: float = 0.0

    @property
    def shape(self) -> LinkShape:
        return LinkShape.of_round_trip(self.rate_mbit, self.round_trip_ms, self.loss)

    @property
    def rate_text(self) -> str:
        return UNSHAPED if self.rate_mbit is None else f"{self.rate_mbit:.4g} Mbit/s"

    def __str__(self) -> str:
        loss = f", {100 * self.loss:g} % loss" if self.loss else ""
        return f"{self.rate_text}, {self.round_trip_ms:g} ms{loss}"


CALM = Point(None)


@dataclass(frozen=True, slots=True)
class Effort:
    """How long each point is measured."""

    settle_steps: int  # left out after a round trip has changed; after other changes, the one step it fell into
    settle_seconds: float  # likewise: congestion control remembers the shortest round trip, BBR for ten seconds
    min_steps: int
    min_seconds: float
    patience_seconds: float  # where a step would take longer, bytes are counted instead of steps
    crawl_seconds: float  # for how long
    pairs: int  # comparisons of ours at the equivalent bandwidth with ours unshaped, taking turns
    bisections: int  # tries to find the equivalent bandwidth


FULL = Effort(
    settle_steps=3,
    settle_seconds=11.0,
    min_steps=2,
    min_seconds=6.0,
    patience_seconds=32.0,
    crawl_seconds=12.0,
    pairs=3,
    bisections=3,
)
QUICK = Effort(
    settle_steps=1,
    settle_seconds=4.0,
    min_steps=1,
    min_seconds=2.0,
    patience_seconds=6.0,
    crawl_seconds=4.0,
    pairs=1,
    bisections=1,
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """The points for each system, in the order in which they are visited."""

    points: tuple[Point, ...]

    def __post_init__(self) -> None:
        if CALM not in self.points:
            raise ValueError("every sweep has the unshaped point: ratios refer to it")


def sweep(rates_mbit: Sequence[float | None], round_trips_ms: Sequence[float], losses: Sequence[float]) -> Sweep:
    """Bandwidths without delay and at 100 ms, round trips at 80 Mbit/s, each loss at both; fast links first.

    Delays change as seldom as can be, since a window needs steps to follow them.
    """
    reference = _reference(rates_mbit)
    by_delay: dict[float, list[Point]] = {}
    for delay in sorted({0.0, *round_trips_ms}):
        swept = rates_mbit if delay in (0.0, LATENCY_MS) else (reference,)
        rates = sorted(set(swept) | ({None} if delay == 0.0 else {reference}), key=_fast_first)
        by_delay[delay] = [Point(rate, delay) for rate in rates if delay == 0.0 or delay in round_trips_ms]
        for loss in sorted({loss for loss in losses if loss}):
            if delay in round_trips_ms and delay in (0.0, LATENCY_MS):
                by_delay[delay].append(Point(reference, delay, loss))
    return Sweep(tuple(point for points in by_delay.values() for point in points))


def _reference(rates_mbit: Sequence[float | None]) -> float | None:
    """80 Mbit/s where that is among the rates asked for, else the one nearest to it."""
    known = [rate for rate in rates_mbit if rate is not None]
    return min(known, key=lambda rate: abs(rate - REFERENCE_MBIT)) if known else None


def _fast_first(rate_mbit: float | None) -> float:
    return -float("inf") if rate_mbit is None else -rate_mbit


# -- options ----------------------------------------------------------------------------------------------------


def rates_of(texts: Sequence[str]) -> tuple[float | None, ...]:
    """'unshaped' or Mbit/s. Raises ConfigInvalid."""
    return tuple(None if text == UNSHAPED else _number(text, "--bandwidth", 0.01, 100_000.0) for text in texts)


def require_round_trips(values: Sequence[float]) -> tuple[float, ...]:
    """Milliseconds. Raises ConfigInvalid."""
    return tuple(_within(value, "--round-trip", 0.0, 20_000.0) for value in values)


def losses_of(percents: Sequence[float]) -> tuple[float, ...]:
    """Percent to shares. Raises ConfigInvalid."""
    return tuple(_within(percent, "--loss", 0.0, 50.0) / 100 for percent in percents)


def systems_of(texts: Sequence[str]) -> tuple[System, ...]:
    """In the order in which they run: dense first, since it decides which bandwidth is the equivalent one."""
    known = {system.value for system in System}
    for text in texts:
        if text not in known:
            raise ConfigInvalid(f"there is no system {text!r}", remedy=f"choose --system from: {', '.join(System)}")
    return tuple(system for system in System if system in texts)


def _number(text: str, option: str, least: float, most: float) -> float:
    try:
        return _within(float(text), option, least, most)
    except ValueError:
        raise ConfigInvalid(
            f"{option} {text!r} is neither {UNSHAPED} nor a number of Mbit/s", remedy=f"for example {option} 80"
        ) from None


def _within(value: float, option: str, least: float, most: float) -> float:
    if not least <= value <= most:  # NaN is not either
        raise ConfigInvalid(f"{option} {value:g} is not between {least:g} and {most:g}", remedy=f"correct {option}")
    return value


def flush_point(rates_mbit: Sequence[float | None], round_trips_ms: Sequence[float]) -> Point | None:
    """Where the cost of latency is measured: 80 Mbit/s and 100 ms, if both are asked for."""
    return Point(_reference(rates_mbit), LATENCY_MS) if LATENCY_MS in round_trips_ms else None


def flush_plans(microbatches: int, *, quick: bool) -> Iterator[int]:
    """Microbatches per step at which the flush between steps is measured, beside the sweep's own.

    Half, twice, four times as many. Of the longest steps the pace inside is told, which short ones hardly have.
    """
    if not quick:
        counts = {max(2, microbatches // 2), 2 * microbatches, 4 * microbatches} - {microbatches}
        yield from sorted(counts)
