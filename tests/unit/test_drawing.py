"""How the committed dashboards are read back and written out: variables, legends, units, settings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from drawing.paint import panel_picture
from drawing.panels import Board, Panel, expand, legend_text
from drawing.queries import Series, Span
from drawing.units import written

DASHBOARDS = Path(__file__).parents[2] / "docker" / "grafana" / "dashboards"
SWARM = Board.read(DASHBOARDS / "swarm.json")


def panel_of(board: str, title: str) -> Panel:
    return next(panel for panel in Board.read(DASHBOARDS / f"{board}.json").panels if panel.title == title)


def test_variables_stand_for_everything_unless_chosen() -> None:
    expr = 'rate(a{run_id=~"$run", instance=~"$instance"}[$__rate_interval])'
    assert expand(expr, {"run": "abc"}, "20s") == 'rate(a{run_id=~"abc", instance=~".*"}[20s])'


def test_no_variable_of_a_dashboard_is_left_over() -> None:
    for path in DASHBOARDS.glob("*.json"):
        for panel in Board.read(path).panels:
            for target in panel.targets:
                assert "$" not in expand(target.expr, {}, "1m"), panel.title


def test_a_legend_takes_its_words_from_labels() -> None:
    assert legend_text("stage {{stage}}: {{ instance }}{{gone}}", {"stage": "1", "instance": "h:1"}) == "stage 1: h:1"


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0.0, "none", "0"),
        (1234.0, "short", "1.23 K"),
        (8e7, "bps", "80 Mb/s"),
        (3 * 2.0**30, "bytes", "3 GiB"),
        (0.25, "percentunit", "25 %"),
        (0.0425, "s", "42.5 ms"),
        (0.0, "s", "0 s"),
        (128.0, "suffix:x", "128x"),
        (math.nan, "s", "-"),
    ],
)
def test_numbers_carry_their_units(value: float, unit: str, text: str) -> None:
    assert written(value, unit) == text


def test_a_query_has_its_own_settings_or_its_panels() -> None:
    panel = SWARM.panels[0]
    assert panel.setting("custom.axisPlacement", "A") is None
    assert panel.setting("custom.axisPlacement", "B") == "right"
    assert (panel.setting("unit", "A"), panel.setting("unit", "B")) == ("short", "bps")
    assert panel.setting("min", "A") == 0


@pytest.mark.parametrize(
    ("board", "title", "values"),
    [
        ("swarm", "Throughput against bandwidth", (0.0, 5.0, math.nan, 7.0)),
        ("swarm", "Contribution", (0.25,)),
        ("swarm", "Alerts firing", (3.0,)),
        ("node", "State", (1.0, 2.0, 2.0, 4.0)),
        ("network", "Link rate", (1e6, 1e6, 2e6, 1e9)),
        ("network", "Directory failures", (0.0, 0.0, 0.0, 0.0)),
    ],
)
def test_every_kind_of_panel_is_drawn(board: str, title: str, values: tuple[float, ...], tmp_path: Path) -> None:
    panel = panel_of(board, title)
    times = tuple(1.8e9 + 10 * position for position in range(len(values)))
    series = [Series(target.ref_id, f"line {target.ref_id}", times, values) for target in panel.targets]
    picture = tmp_path / "panel.png"
    panel_picture(panel, series, Span(times[0], times[0] + 30, 10)).savefig(picture)
    assert picture.stat().st_size > 2000
