"""Figures of `resbm-node bench convergence`: loss against tokens, and against wire compression; every seed is drawn."""

from __future__ import annotations

import json
import tomllib
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

GRIDS = Path(__file__).resolve().parent.parent / "node" / "bench" / "grids"
BLUE, GREY, RED, AMBER, GREEN, PURPLE = "#2563eb", "#94a3b8", "#dc2626", "#d97706", "#059669", "#7c3aed"
COLORS = {"ours_128x": BLUE, "fair": RED, "uncompressed": AMBER, "control": GREY, "ours_512x": PURPLE}
"""By role: the variants whose curves are drawn."""

Point = dict[str, Any]


def losses(points_file: Path, grid: str, target: Path) -> None:
    """Left: validation loss while training, by role. Right: the last one against what the wire is compressed by."""
    variants = tomllib.loads((GRIDS / f"{grid}.toml").read_text())["variants"]
    trainings = _chosen([json.loads(line) for line in points_file.read_text().splitlines()])
    figure, (curves, wire) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    for variant in variants:
        cells, role = trainings.get(variant["name"], []), variant.get("role", "")
        color = COLORS.get(role, GREEN)
        for number, points in enumerate(cells):
            if role:
                late = [point for point in points if point["step"]]
                label = variant["title"] if number == 0 else None
                tokens = [point["tokens"] / 1e6 for point in late]
                curves.plot(tokens, [point["val_loss"] for point in late], color=color, linewidth=1.3, label=label)
            _on_the_wire(wire, points, variant, color, labelled=number == 0)
    curves.set(xlabel="million tokens", ylabel="validation loss, nats per token", title="while training")
    curves.legend(frameon=False, fontsize=8)
    wire.set(xscale="log", xlabel="wire compression, everything counted", title="at the end")
    wire.xaxis.set_major_formatter("{x:,g}")
    for axes in (curves, wire):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _chosen(points: list[Point]) -> dict[str, list[list[Point]]]:
    """The trainings of each variant with its best learning rate, as the report chooses it: by the first seed's end."""
    cells: dict[str, dict[tuple[float, int], list[Point]]] = defaultdict(lambda: defaultdict(list))
    for point in points:
        cells[point["variant"]][point["rate"], point["seed"]].append(point)
    chosen = {}
    for name, trainings in cells.items():
        first = min(seed for _, seed in trainings)
        best = min((found[-1]["val_loss"], rate) for (rate, seed), found in trainings.items() if seed == first)[1]
        chosen[name] = [found for (rate, _), found in sorted(trainings.items()) if rate == best]
    return chosen


def _on_the_wire(axes: Any, points: list[Point], variant: Point, color: str, *, labelled: bool) -> None:
    """One training: a point, or a line where there is no wire."""
    last = points[-1]
    if last["wire_compression"] is None:
        axes.axhline(last["val_loss"], color=color, linewidth=1, linestyle=":")
        return
    axes.plot(last["wire_compression"], last["val_loss"], "o", color=color, markersize=5)
    if labelled:
        place = (last["wire_compression"], last["val_loss"])
        axes.annotate(variant["name"], place, fontsize=7, xytext=(4, 4), textcoords="offset points")
