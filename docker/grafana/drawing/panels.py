"""The committed dashboards, read back: panels, their queries, and where they stand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_VARIABLE = re.compile(r"\$(__rate_interval|run|stage|instance)\b")
EVERYTHING = {"run": ".*", "stage": ".*", "instance": ".*"}


@dataclass(frozen=True, slots=True)
class Target:
    """One query of a panel."""

    ref_id: str
    expr: str  # with variables
    legend: str
    instant: bool


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel as the dashboard's JSON has it."""

    id: int
    kind: str
    title: str
    x: int
    y: int
    width: int
    height: int
    targets: tuple[Target, ...]
    defaults: Mapping[str, Any]  # of fields: unit, min, max, thresholds, mappings, custom
    overrides: Mapping[str, Mapping[str, Any]]  # by reference letter: property: value

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> Panel:
        """Reads a panel that is no row."""
        place, fields = raw["gridPos"], raw.get("fieldConfig", {})
        return cls(
            id=raw["id"],
            kind=raw["type"],
            title=raw["title"],
            x=place["x"],
            y=place["y"],
            width=place["w"],
            height=place["h"],
            targets=tuple(
                Target(t["refId"], t["expr"], t.get("legendFormat", ""), bool(t.get("instant")))
                for t in raw.get("targets", [])
            ),
            defaults=fields.get("defaults", {}),
            overrides={
                o["matcher"]["options"]: {p["id"]: p["value"] for p in o["properties"]}
                for o in fields.get("overrides", [])
            },
        )

    def setting(self, name: str, ref_id: str, otherwise: Any = None) -> Any:
        """A field's setting, such as "unit" or "custom.axisPlacement": the query's own or the panel's."""
        own = self.overrides.get(ref_id, {})
        if name in own:
            return own[name]
        value: Any = self.defaults
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return otherwise if value is None else value


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    name: str
    title: str
    panels: tuple[Panel, ...]
    rows: tuple[tuple[int, str], ...]  # y, title

    @classmethod
    def read(cls, path: Path) -> Board:
        """Reads a dashboard's JSON."""
        raw = json.loads(path.read_text())
        panels = [panel for panel in raw["panels"] if panel["type"] != "row"]
        rows = [(panel["gridPos"]["y"], panel["title"]) for panel in raw["panels"] if panel["type"] == "row"]
        return cls(path.stem, raw["title"], tuple(map(Panel.of, panels)), tuple(rows))


def expand(expr: str, variables: Mapping[str, str], rate_interval: str) -> str:
    """An expression as Grafana sends it."""
    values = {**EVERYTHING, **variables, "__rate_interval": rate_interval}
    return _VARIABLE.sub(lambda match: values[match[1]], expr)


def legend_text(template: str, labels: Mapping[str, str]) -> str:
    """A series' name: {{label}} stands for the label's value."""
    return re.sub(r"\{\{\s*(\w+)\s*\}\}", lambda match: labels.get(match[1], ""), template)
