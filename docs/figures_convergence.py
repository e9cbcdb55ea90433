"""Figures of `resbm-node bench convergence`: loss against tokens, and against wire compression; every seed is drawn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from node.bench.convergence import read_grid, read_points
from node.bench.convergence_results import Result, results_of

BLUE, GREY, RED, AMBER, GREEN, PURPLE = "#2563eb", "#94a3b8", "#dc2626", "#d97706", "#059669", "#7c3aed"
COLORS = {"ours_128x": BLUE, "fair": RED, "uncompressed": AMBER, "control": GREY, "ours_512x": PURPLE}
"""By role: the variants whose curves are drawn."""

NEAR = math.log(1.3)
"""Points whose compression differs by less would write over each other's names."""
COMPRESSED = 2.0
"""Wire compression from which on a variant is a point; the others are lines, since they stand for no wire at all."""


def losses(points_file: Path, grid: str, target: Path) -> None:
    """Left: validation loss while training, by role. Right: the last one against what the wire is compressed by."""
    figure, (curves, wire) = plt.subplots(1, 2, figsize=(12.5, 5))
    results = results_of(read_grid(grid), read_points(points_file))
    for result in results:
        if result.variant.role:
            _while_training(curves, result)
    _at_the_end(wire, results)
    curves.set(xlabel="million tokens", ylabel="validation loss, nats per token", title="while training")
    curves.legend(frameon=False, fontsize=8)
    wire.set(xscale="log", xlim=(10, 300), xlabel="wire compression, everything counted", title="at the end")
    wire.set_xticks([10, 30, 100, 300])
    wire.xaxis.set_major_formatter("{x:,g}")
    wire.xaxis.set_minor_formatter("")
    for axes in (curves, wire):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def _color(result: Result) -> str:
    return COLORS.get(result.variant.role or "", GREEN)


def _while_training(axes: Any, result: Result) -> None:
    for number, points in enumerate(result.cells):
        late = [point for point in points if point.step]
        label = result.variant.title if number == 0 else None
        tokens = [point.tokens / 1e6 for point in late]
        axes.plot(tokens, [point.val_loss for point in late], color=_color(result), linewidth=1.3, label=label)


def _at_the_end(axes: Any, results: Sequence[Result]) -> None:
    """Every seed's end: a point, or a line where there is no wire to speak of; what is far above, by its name alone."""
    bottom, top = _range(results)
    axes.set_ylim(bottom, top)
    on_the_wire = {r.variant.name: r.wire_compression for r in results if (r.wire_compression or 0) >= COMPRESSED}
    first = {result.variant.name: result.losses[0] for result in results}
    for number, result in enumerate(results):
        name, color = result.variant.name, _color(result)
        label = {"fontsize": 7, "color": color, "textcoords": "offset points"}
        compression = on_the_wire.get(name)
        x = 10.5 * 1.25 ** (number % 6) if compression is None else compression
        if first[name] > top:
            place = {"xytext": (0, -9 - 9 * (number % 3)), "ha": "left" if compression is None else "center"}
            axes.annotate(f"{name}, {first[name]:.2f} ↑", (x, top), **label, **place)
        elif compression is None:
            for loss in result.losses:
                axes.axhline(loss, color=color, linewidth=1, linestyle=":")
            axes.annotate(name, (x, first[name]), **label, xytext=(0, 2))
        else:
            axes.plot([x] * len(result.losses), result.losses, "o", color=color, markersize=5)
            near = [first[other] for other, c in on_the_wire.items() if c and abs(math.log(c / x)) < NEAR]
            axes.annotate(name, (x, first[name]), **label, **_place(first[name], near))


def _place(loss: float, near: Sequence[float]) -> dict[str, Any]:
    """Of a point's name among its neighbours': below the lowest, above the highest, beside the others."""
    if loss == min(near):
        return {"xytext": (0, -11), "ha": "center"}
    return {"xytext": (0, 6), "ha": "center"} if loss == max(near) else {"xytext": (6, -2), "ha": "left"}


def _range(results: Sequence[Result]) -> tuple[float, float]:
    """Of the losses' axis: what is far above the rest must not flatten it."""
    ends = [loss for result in results for loss in result.losses]
    far = min(ends) + 3.0 * (statistics.median(ends) - min(ends))
    within = [loss for loss in ends if loss <= far]
    margin = 0.15 * (max(within) - min(within))
    return min(within) - margin, max(within) + margin
