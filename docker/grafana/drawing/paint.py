"""How panels look: roughly as Grafana draws them, in its dark theme, with matplotlib."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from matplotlib import dates
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from drawing.panels import Board, Panel
from drawing.queries import Series, Span
from drawing.units import written

_PAGE, _PANEL, _GRID, _TEXT, _FAINT = "#111217", "#181b1f", "#2c3235", "#ccccdc", "#8e8e9c"
_LINES = ("#73bf69", "#f2cc0c", "#8ab8ff", "#ff780a", "#f2495c", "#b877d9", "#56a64b", "#5794f2", "#ffb357", "#ff7383")
_NAMED = {"green": "#73bf69", "yellow": "#fade2a", "red": "#f2495c", "blue": "#5794f2"}
_COLUMN_INCHES, _ROW_INCHES, _HEAD_INCHES = 0.62, 0.36, 0.55
_SMALLEST_TOP = {"none": 0.2, "short": 0.2}  # a line of zeros is one, not a picture of rounding errors
_MOST_NAMED = 8  # series in a legend; Grafana scrolls, a picture cannot

Drawn = Sequence[tuple[Panel, Sequence[Series]]]


def panel_picture(panel: Panel, series: Sequence[Series], span: Span) -> Figure:
    """One panel alone."""
    figure = Figure((panel.width * _COLUMN_INCHES, panel.height * _ROW_INCHES), facecolor=_PANEL)
    _paint(figure, panel, series, span)
    return figure


def board_picture(board: Board, drawn: Drawn, span: Span) -> Figure:
    """All panels of a dashboard in their places."""
    rows = max(panel.y + panel.height for panel in board.panels)
    heights = [_HEAD_INCHES, rows * _ROW_INCHES]
    figure = Figure((24 * _COLUMN_INCHES, sum(heights)), facecolor=_PAGE)
    halves = figure.add_gridspec(2, 1, height_ratios=heights)
    head, body = figure.add_subfigure(halves[0]), figure.add_subfigure(halves[1])
    for part in (head, body):
        part.set_facecolor(_PAGE)
    head.text(0.01, 0.4, board.title, color=_TEXT, fontsize=15, va="center")
    grid = body.add_gridspec(rows, 24)
    for y, title in board.rows:
        body.text(0.01, 1 - (y + 0.5) / rows, title, color=_TEXT, fontsize=10, va="center", weight="bold")
    for panel, series in drawn:
        place = grid[panel.y : panel.y + panel.height, panel.x : panel.x + panel.width]
        part = body.add_subfigure(place, facecolor=_PANEL, edgecolor=_PAGE, linewidth=4)
        _paint(part, panel, series, span)
    return figure


def _paint(figure: FigureBase, panel: Panel, series: Sequence[Series], span: Span) -> None:
    width, height = panel.width * _COLUMN_INCHES, panel.height * _ROW_INCHES
    figure.text(0.12 / width, 1 - 0.12 / height, panel.title, color=_TEXT, fontsize=9.5, va="top")
    axes = figure.add_subplot()
    axes.set_facecolor(_PANEL)
    axes.tick_params(colors=_FAINT, labelsize=7, length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    painters: dict[str, Callable[[Axes, Panel, Sequence[Series], Span], None]] = {
        "timeseries": _graph,
        "stat": _stat,
        "bargauge": _bars,
        "state-timeline": _timeline,
    }
    painters[panel.kind](axes, panel, series, span)
    left = {"timeseries": 0.75, "state-timeline": 1.9}.get(panel.kind, 0.2)
    right = 0.95 if _has_right(panel) else 0.2
    bottom = 0.35 + 0.17 * _legend_rows(panel, len(series)) if panel.kind == "timeseries" else 0.3
    figure.subplots_adjust(left=left / width, right=1 - right / width, top=1 - 0.45 / height, bottom=bottom / height)


def _legend_rows(panel: Panel, num_series: int) -> int:
    return math.ceil(min(num_series, _MOST_NAMED) / _legend_columns(panel))


def _legend_columns(panel: Panel) -> int:
    return 4 if panel.width >= 20 else 2


def _has_right(panel: Panel) -> bool:
    return any(panel.setting("custom.axisPlacement", target.ref_id) == "right" for target in panel.targets)


# -- graphs -----------------------------------------------------------------------------------------------------


def _graph(axes: Axes, panel: Panel, series: Sequence[Series], span: Span) -> None:
    right = _right_axis(axes, panel) if _has_right(panel) else None
    colours = itertools.cycle(_LINES)
    lines = []
    for line in series:
        on_right = right is not None and panel.setting("custom.axisPlacement", line.ref_id) == "right"
        target = right if on_right and right is not None else axes
        times = list(map(_day, line.times))
        unit = panel.setting("unit", line.ref_id, "none")
        label = f"{line.name}  {written(_last(line.values), unit, panel.setting('decimals', line.ref_id))}"
        colour = next(colours)
        lines += target.plot(times, line.values, color=colour, linewidth=1.4, label=label, solid_capstyle="round")
        if right is None and not _is_log(panel, line.ref_id):
            target.fill_between(times, line.values, alpha=0.06, color=colour, linewidth=0)
    _dress(axes, panel, panel.targets[0].ref_id)
    if right is not None:
        first = next(t for t in panel.targets if panel.setting("custom.axisPlacement", t.ref_id) == "right")
        _dress(right, panel, first.ref_id)
        right.grid(visible=False)
    _thresholds(axes, panel)
    axes.set_xlim(_day(span.start), _day(span.end))
    locator = dates.AutoDateLocator(minticks=3, maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S" if span.end - span.start < 900 else "%H:%M"))
    axes.figure.legend(
        handles=lines[:_MOST_NAMED],
        loc="lower left",
        bbox_to_anchor=(0.01, 0.01),
        ncols=_legend_columns(panel),
        fontsize=6.8,
        frameon=False,
        labelcolor=_TEXT,
        handlelength=1.2,
        columnspacing=1.5,
        labelspacing=0.25,
        borderpad=0.1,
    )


def _right_axis(axes: Axes, panel: Panel) -> Axes:
    right = axes.twinx()
    for spine in right.spines.values():
        spine.set_visible(False)
    right.tick_params(colors=_FAINT, labelsize=7, length=0)
    right.grid(visible=False)
    return right


def _dress(axes: Axes, panel: Panel, ref_id: str) -> None:
    unit = panel.setting("unit", ref_id, "none")
    formatter = FuncFormatter(lambda value, _: written(value, unit))
    if _is_log(panel, ref_id):
        axes.set_yscale("log")
        axes.margins(y=0.15)
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0), numticks=6))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.tick_params(which="minor", length=0)
    else:
        axes.set_ylim(bottom=panel.setting("min", ref_id), top=panel.setting("max", ref_id))
        if axes.get_ylim()[1] < _SMALLEST_TOP.get(unit, 0):
            axes.set_ylim(top=_SMALLEST_TOP[unit])
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=panel.setting("decimals", ref_id) == 0))
    axes.yaxis.set_major_formatter(formatter)
    axes.set_ylabel(panel.setting("custom.axisLabel", ref_id, ""), color=_FAINT, fontsize=7)
    axes.grid(visible=True, color=_GRID, linewidth=0.6)
    axes.set_axisbelow(True)


def _is_log(panel: Panel, ref_id: str) -> bool:
    scale = panel.setting("custom.scaleDistribution", ref_id, {})
    return bool(scale.get("type") == "log")


def _thresholds(axes: Axes, panel: Panel) -> None:
    """Dashed lines, where the panel shows them and they are in sight: Grafana does not widen the axis for them."""
    if panel.defaults.get("custom", {}).get("thresholdsStyle", {}).get("mode") != "dashed":
        return
    low, high = axes.get_ylim()
    for step in panel.defaults["thresholds"]["steps"]:
        if step["value"] is not None and low <= step["value"] <= high:
            axes.axhline(step["value"], color=_NAMED[step["color"]], linewidth=1, linestyle=(0, (6, 4)))


# -- numbers, bars and states -----------------------------------------------------------------------------------


def _stat(axes: Axes, panel: Panel, series: Sequence[Series], _: Span) -> None:
    axes.axis("off")
    for position, line in enumerate(series[:3]):
        value = _last(line.values)
        text = written(value, panel.defaults.get("unit", "none"), panel.defaults.get("decimals"))
        x = (position + 0.5) / min(len(series), 3)
        axes.text(
            x, 0.45, text, color=_colour(panel, value), fontsize=24, ha="center", va="center", transform=axes.transAxes
        )


def _bars(axes: Axes, panel: Panel, series: Sequence[Series], _: Span) -> None:
    unit = panel.defaults.get("unit", "none")
    values = [_last(line.values) for line in series]
    top = panel.defaults.get("max") or max(1.0, *values) * 1.05
    for position, (line, value) in enumerate(zip(series, values, strict=True)):
        axes.barh(position, top, height=0.6, color=_GRID)
        axes.barh(position, value, height=0.6, color=_colour(panel, value))
        axes.text(top * 1.02, position, written(value, unit), color=_TEXT, fontsize=9, va="center")
        axes.text(0, position - 0.36, line.name, color=_TEXT, fontsize=7, va="bottom")
    axes.set_xlim(0, top * 1.2)
    axes.set_ylim(len(series) - 0.4, -0.8)
    axes.set_xticks([])
    axes.set_yticks([])


def _timeline(axes: Axes, panel: Panel, series: Sequence[Series], span: Span) -> None:
    names: dict[str, Any] = panel.defaults["mappings"][0]["options"]
    for position, line in enumerate(series):
        for start, end, value in _stretches(line, span):
            shown = names.get(f"{value:g}", {"text": f"{value:g}", "color": "blue"})
            left, right = _day(start), _day(end)
            axes.barh(position, right - left, left=left, height=0.7, color=_NAMED[shown["color"]], alpha=0.85)
            if end - start > 0.12 * (span.end - span.start):
                axes.text(
                    (left + right) / 2, position, shown["text"], fontsize=7, color="#111217", ha="center", va="center"
                )
    axes.set_yticks(range(len(series)), [line.name for line in series])
    axes.set_ylim(len(series) - 0.4, -0.6)
    axes.set_xlim(_day(span.start), _day(span.end))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=7))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M:%S" if span.end - span.start < 900 else "%H:%M"))


def _stretches(line: Series, span: Span) -> list[tuple[float, float, float]]:
    """(start, end, value) where the value stays the same."""
    found: list[tuple[float, float, float]] = []
    for time, value in zip(line.times, line.values, strict=True):
        if found and found[-1][2] == value and time - found[-1][1] <= 1.5 * span.step:
            found[-1] = (found[-1][0], time, value)
        else:
            found.append((time, time + span.step, value))
    return found


def _day(time: float) -> float:
    """matplotlib counts days."""
    return float(dates.date2num(datetime.fromtimestamp(time, UTC)))


def _last(values: Sequence[float]) -> float:
    return next((value for value in reversed(values) if math.isfinite(value)), math.nan)


def _colour(panel: Panel, value: float) -> str:
    steps = panel.defaults["thresholds"]["steps"]
    reached = [step for step in steps if step["value"] is None or value >= step["value"]]
    return _NAMED[reached[-1]["color"]]
