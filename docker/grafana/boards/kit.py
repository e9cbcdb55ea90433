"""What dashboards are made of: plain descriptions of panels, and how they become Grafana's.

Grafana's builders give neither panels their ids nor queries their reference letters; both are given here, in order.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from grafana_foundation_sdk.builders import bargauge, common, dashboard, prometheus, stat, statetimeline, timeseries
from grafana_foundation_sdk.models import common as shapes
from grafana_foundation_sdk.models import dashboard as model

SOURCE = model.DataSourceRef(type_val="prometheus", uid="resbm-prometheus")
"""The data source of provisioning/datasources/prometheus.yml."""

GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
Step = tuple[float | None, str]
NEUTRAL: Sequence[Step] = ((None, BLUE),)
"""Colour steps for what is neither good nor bad by itself: (from this value on, colour); the first is the base."""

Kind = Literal["graph", "stat", "timeline", "bars"]


@dataclass(frozen=True, slots=True)
class Query:
    """One PromQL expression. `right`: on the right, logarithmic axis, with that unit and label; graphs only."""

    expr: str
    legend: str
    right: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel. Units are Grafana's: https://grafana.com/docs/grafana/latest/panels-visualizations/."""

    kind: Kind
    title: str
    description: str
    queries: Sequence[Query]
    unit: str
    width: int = 8  # of 24 columns
    height: int = 8
    axis: str = ""
    steps: Sequence[Step] = NEUTRAL
    least: float | None = None
    most: float | None = None
    stacked: bool = False
    log_scale: bool = False
    decimals: int | None = None
    names: Mapping[str, tuple[str, str]] = field(default_factory=dict)  # value: (text, colour); timelines


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard: rows of panels."""

    uid: str
    title: str
    description: str
    rows: Sequence[tuple[str, Sequence[Panel]]]

    def build(self) -> model.Dashboard:
        """The dashboard as Grafana's API takes it."""
        builder = (
            dashboard.Dashboard(self.title)
            .uid(self.uid)
            .description(self.description)
            .tags(["resbm-node"])
            .editable()
            .refresh("5s")
            .time("now-30m", "now")
            .timezone("browser")
            .tooltip(model.DashboardCursorSync.CROSSHAIR)
            .link(dashboard.DashboardLink("Dashboards").type(model.DashboardLinkType.DASHBOARDS).tags(["resbm-node"]))
        )
        for name, label, query in _VARIABLES:
            builder.with_variable(_variable(name, label, query))
        number = 0
        for title, panels in self.rows:
            number += 1
            builder.with_row(dashboard.Row(title).id(number))
            for panel in panels:
                number += 1
                builder.with_panel(_builder(panel).id(number))
        return builder.build()


_VARIABLES = (
    ("run", "Run", "label_values(resbm_node_info, run_id)"),
    ("stage", "Stage", 'label_values(resbm_node_info{run_id=~"$run"}, stage)'),
    ("instance", "Instance", 'label_values(resbm_node_info{run_id=~"$run", stage=~"$stage"}, instance)'),
)


def _variable(name: str, label: str, query: str) -> dashboard.QueryVariable:
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(SOURCE)
        .query(query)
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .include_all(True)
        .all_value(".*")
        .multi(True)
        .current(model.VariableOption(text="All", value="$__all", selected=True))
    )


def _builder(panel: Panel) -> Any:
    kinds: dict[Kind, Callable[[Panel], Any]] = {"graph": _graph, "stat": _stat, "timeline": _timeline, "bars": _bars}
    builder = kinds[panel.kind](panel)
    two_axes = any(query.right for query in panel.queries)
    builder.title(panel.title).description(panel.description).datasource(SOURCE)
    builder.span(panel.width).height(panel.height)
    builder.unit(panel.unit).thresholds(_thresholds(panel.steps))
    if panel.least is not None and not two_axes:
        builder.min(panel.least)
    if panel.most is not None:
        builder.max(panel.most)
    if panel.decimals is not None:
        builder.decimals(panel.decimals)
    for letter, query in zip(string.ascii_uppercase, panel.queries, strict=False):
        builder.with_target(_target(letter, query, instant=panel.kind in ("stat", "bars")))
        if two_axes:
            properties = _right(*query.right) if query.right else {"min": panel.least}
            builder.override_by_query(letter, [model.DynamicConfigValue(k, v) for k, v in properties.items()])
    return builder


def _right(unit: str, label: str) -> dict[str, object]:
    return {
        "unit": unit,
        "custom.axisPlacement": "right",
        "custom.axisLabel": label,
        "custom.scaleDistribution": {"type": "log", "log": 10},
    }


def _target(letter: str, query: Query, *, instant: bool) -> prometheus.Dataquery:
    target = prometheus.Dataquery().ref_id(letter).expr(query.expr).legend_format(query.legend).datasource(SOURCE)
    return target.instant() if instant else target.range()


def _thresholds(steps: Sequence[Step]) -> dashboard.ThresholdsConfig:
    points = [model.Threshold(value=value, color=color) for value, color in steps]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(points)


def _graph(panel: Panel) -> timeseries.Panel:
    builder = (
        timeseries.Panel()
        .axis_label(panel.axis)
        .line_width(2)
        .fill_opacity(40 if panel.stacked else 8)
        .show_points(shapes.VisibilityMode.NEVER)
        .span_nulls(False)
        .legend(_legend(["lastNotNull", "mean"]))
        .tooltip(common.VizTooltipOptions().mode(shapes.TooltipDisplayMode.MULTI))
    )
    if panel.stacked:
        builder.stacking(common.StackingConfig().mode(shapes.StackingMode.NORMAL).group("A"))
    if panel.log_scale:
        scale = common.ScaleDistributionConfig().type(shapes.ScaleDistribution.LOG).log(10)
        builder.scale_distribution(scale)
    if len(panel.steps) > 1:
        style = common.GraphThresholdsStyleConfig().mode(shapes.GraphTresholdsStyleMode.DASHED)
        builder.thresholds_style(style)
    return builder


def _legend(calculations: list[str]) -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(shapes.LegendDisplayMode.TABLE)
        .placement(shapes.LegendPlacement.BOTTOM)
        .calcs(calculations)
        .show_legend(True)
    )


def _stat(panel: Panel) -> stat.Panel:
    return (
        stat.Panel()
        .reduce_options(_last_value())
        .color_mode(shapes.BigValueColorMode.VALUE)
        .graph_mode(shapes.BigValueGraphMode.NONE)
        .text_mode(shapes.BigValueTextMode.AUTO)
    )


def _bars(panel: Panel) -> bargauge.Panel:
    return (
        bargauge.Panel()
        .reduce_options(_last_value())
        .orientation(shapes.VizOrientation.HORIZONTAL)
        .display_mode(shapes.BarGaugeDisplayMode.BASIC)
        .show_unfilled(True)
    )


def _last_value() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).values(False)


def _timeline(panel: Panel) -> statetimeline.Panel:
    names = {
        value: model.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(panel.names.items())
    }
    return (
        statetimeline.Panel()
        .mappings([model.ValueMap(options=names)])
        .merge_values(True)
        .row_height(0.8)
        .show_value(shapes.VisibilityMode.AUTO)
        .legend(_legend([]))
    )
