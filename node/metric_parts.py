"""Two instruments the Prometheus client lacks: a gauge that is absent while unknown, and a counter that follows."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector


class KnownGauge(Collector):
    """A gauge without a sample until it is set: a loss of 0 and no loss yet are two things."""

    def __init__(self, name: str, text: str, registry: CollectorRegistry) -> None:
        self._name = name
        self._text = text
        self._value: float | None = None
        registry.register(self)

    def set(self, value: float | None) -> None:
        """None: unknown (again)."""
        self._value = value

    def describe(self) -> Iterable[Metric]:
        return [GaugeMetricFamily(self._name, self._text)]

    def collect(self) -> Iterable[Metric]:
        family = GaugeMetricFamily(self._name, self._text)
        if self._value is not None:
            family.add_metric([], self._value)
        return [family]


class Follower:
    """Feeds a counter from a total that is kept elsewhere."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._last = 0.0

    def follow(self, total: float) -> None:
        """The total is this now. One that is smaller than before has begun again from 0."""
        if total != self._last:
            self._counter.inc(total - self._last if total >= self._last else total)
            self._last = total
