"""Questions to a Prometheus server's HTTP API."""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from drawing.panels import Panel, expand, legend_text


class QueryFailed(Exception):
    """Prometheus refused a query or did not answer."""


class NoData(Exception):
    """A query was answered with nothing that could be drawn."""


@dataclass(frozen=True, slots=True)
class Span:
    """The time shown: Unix seconds, and seconds between two points."""

    start: float
    end: float
    step: float


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a panel."""

    ref_id: str
    name: str
    times: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Prometheus:
    """A server, and how its dashboards' variables are set."""

    url: str
    variables: Mapping[str, str]
    rate_interval: str = "1m"

    def ask(self, panel: Panel, span: Span) -> list[Series]:
        """All lines of a panel. Raises QueryFailed, and NoData when one of its queries has none."""
        lines: list[Series] = []
        for target in panel.targets:
            expr = expand(target.expr, self.variables, self.rate_interval)
            found = self._query(expr, span, instant=target.instant)
            drawn = [
                Series(target.ref_id, legend_text(target.legend, labels), times, values)
                for labels, times, values in found
                if any(map(math.isfinite, values))
            ]
            if not drawn:
                raise NoData(f"{panel.title}, query {target.ref_id}: nothing for {expr}")
            lines += sorted(drawn, key=lambda line: line.name)
        return lines

    def _query(
        self, expr: str, span: Span, *, instant: bool
    ) -> list[tuple[dict[str, str], tuple[float, ...], tuple[float, ...]]]:
        if instant:
            result = self._get("query", {"query": expr, "time": span.end})
            points = [(series["metric"], [series["value"]]) for series in result]
        else:
            asked = {"query": expr, "start": span.start, "end": span.end, "step": span.step}
            points = [(series["metric"], series["values"]) for series in self._get("query_range", asked)]
        return [
            (labels, tuple(float(time) for time, _ in values), tuple(float(value) for _, value in values))
            for labels, values in points
        ]

    def _get(self, path: str, parameters: Mapping[str, Any]) -> list[Any]:
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=30) as reply:
                answer = json.load(reply)
        except urllib.error.HTTPError as error:
            raise QueryFailed(f"{parameters['query']}: {_cause(error)}") from None
        except OSError as error:
            raise QueryFailed(f"{self.url} does not answer: {error}") from None
        if answer["status"] != "success":
            raise QueryFailed(f"{parameters['query']}: {answer.get('error')}")
        result: list[Any] = answer["data"]["result"]
        return result


def _cause(error: urllib.error.HTTPError) -> str:
    """In Prometheus' words; while it starts it has none."""
    try:
        return str(json.load(error)["error"])
    except (ValueError, KeyError):
        return str(error)
