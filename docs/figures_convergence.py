"""Figures of `resbm-node bench convergence`: loss against tokens, and against wire compression; every seed is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from node.bench.convergence import read_grid, read_points
from node.bench.convergence_point import Point
from node.bench.convergence_results import results_of

BLUE, GREY, RED, AMBER, GREEN, PURPLE = "#2563eb", "#94a3b8", "#dc2626", "#d97706", "#059669", "#7c3aed"
COLORS = {"ours_128x": BLUE, "fair": RED, "uncompressed": AMBER, "control": GREY, "ours_512x": PURPLE}
"""By role: the variants whose curves are drawn."""


def losses(points_file: Path, grid: str, target: Path) -> None:
    """Left: validation loss while training, by role. Right: the last one against what the wire is compressed by."""
    figure, (curves, wire) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=(3, 2))
    for result in results_of(read_grid(grid), read_points(points_file)):
        variant = result.variant
        color = COLORS.get(variant.role or "", GREEN)
        for number, points in enumerate(result.cells):
            if variant.role:
                late = [point for point in points if point.step]
                label = variant.title if number == 0 else None
                tokens = [point.tokens / 1e6 for point in late]
                curves.plot(tokens, [point.val_loss for point in late], color=color, linewidth=1.3, label=label)
            _on_the_wire(wire, points[-1], color, name=variant.name if number == 0 else None)
    curves.set(xlabel="million tokens", ylabel="validation loss, nats per token", title="while training")
    curves.legend(frameon=False, fontsize=8)
    wire.set(xscale="log", xlabel="wire compression, everything counted", title="at the end")
    wire.xaxis.set_major_formatter("{x:,g}")
    for axes in (curves, wire):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _on_the_wire(axes: Any, last: Point, color: str, *, name: str | None) -> None:
    """The end of one training: a point, or a line where there is no wire."""
    if last.wire_compression is None:
        axes.axhline(last.val_loss, color=color, linewidth=1, linestyle=":")
        return
    place = (last.wire_compression, last.val_loss)
    axes.plot(*place, "o", color=color, markersize=5)
    if name is not None:
        axes.annotate(name, place, fontsize=7, xytext=(4, 4), textcoords="offset points")
