"""Figures of `resbm-node bench wan`: speed against bandwidth and round trip, with what physics allows drawn in."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.ticker import NullFormatter

BLUE, GREY, RED, AMBER = "#2563eb", "#94a3b8", "#dc2626", "#d97706"
STYLES = {
    "ours": (BLUE, "ours"),
    "dense": (RED, "our pipeline, dense bf16"),
    "torch": (AMBER, "torch 1F1B, dense bf16"),
}
REFERENCE_MBIT = 80.0
LATENCY_MS = 100.0

Measurement = dict[str, Any]


def bandwidth(source: Path, target: Path) -> None:
    """Tokens/s against the rate of every up-link and down-link, without delay and at 100 ms.

    Hollow points are told from bytes, which is too much: a link is not full all through a step.
    """
    result = json.loads(source.read_text())["measurements"]
    measured: list[Measurement] = result["measurements"]
    whole = [m for m in measured if not m["estimated"]]
    told = [m for m in measured if m["estimated"]]
    figure, (near, far) = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    for axes, delay in ((near, 0.0), (far, LATENCY_MS)):
        for system, (color, label) in STYLES.items():
            _line(axes, _points(whole, system, "rate_mbit", _is_swept(delay)), color, label)
            _hollow(axes, _points(told, system, "rate_mbit", _is_swept(delay)), color)
        _limits(axes, measured)
        axes.set(xscale="log", yscale="log", xlabel="Mbit/s, each up-link and down-link")
        axes.set_title(f"{delay:g} ms round trip between two peers")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,g}")
            axis.set_minor_formatter(NullFormatter())
        axes.spines[["top", "right"]].set_visible(False)
    if rate := result["equivalent_mbit"]:
        near.axvline(rate, color=GREY, linestyle=":", linewidth=1)
        near.annotate("equivalent of\nthe paper's setting", (rate, near.get_ylim()[0] * 1.3), color=GREY, fontsize=8)
    near.set_ylabel("tokens/s")
    far.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, target)


def round_trip(source: Path, target: Path) -> None:
    """Tokens/s against the round trip at the paper's bandwidth."""
    measured: list[Measurement] = json.loads(source.read_text())["measurements"]["measurements"]
    figure, axes = plt.subplots(figsize=(6.4, 4))

    def at_reference(point: dict[str, float]) -> bool:
        return point["rate_mbit"] == REFERENCE_MBIT and not point["loss"]

    for system, (color, label) in STYLES.items():
        _line(axes, _points(measured, system, "round_trip_ms", at_reference), color, label)
    axes.set(xlabel="round trip between two peers, ms", ylabel="tokens/s", title=f"{REFERENCE_MBIT:g} Mbit/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, target)


def _points(
    measured: list[Measurement],
    system: str,
    key: str,
    wanted: Callable[[dict[str, float]], bool],
) -> tuple[list[float], list[float]]:
    """(x, tokens/s), ascending; the newest of several measurements of one point."""
    found = {
        m["point"][key]: _speed(m)
        for m in measured
        if m["system"] == system and m["point"][key] is not None and wanted(m["point"])
    }
    return sorted(found), [found[x] for x in sorted(found)]


def _is_swept(delay: float) -> Callable[[dict[str, float]], bool]:
    return lambda point: point["round_trip_ms"] == delay and not point["loss"]


def _speed(m: Measurement) -> float:
    return float(m["tokens"] / m["seconds"])


def _limits(axes: Any, measured: list[Measurement]) -> None:
    """What the cores compute, and what a link carries of each kind of frame."""
    rates = [m["point"]["rate_mbit"] for m in measured if m["point"]["rate_mbit"]]
    calm = {m["system"]: m for m in measured if m["point"] == {"rate_mbit": None, "round_trip_ms": 0.0, "loss": 0.0}}
    if not rates or not calm:
        return
    ends = [min(rates), max(rates)]
    axes.axhline(max(map(_speed, calm.values())), color=GREY, linestyle="--", linewidth=1, label="compute limit")
    for system, (color, label) in STYLES.items():
        if (m := calm.get(system)) is not None:
            busiest = max(max(stage["up_bytes"], stage["down_bytes"]) for stage in m["stages"]) / m["tokens"]
            carried = [rate * 1e6 / 8 / busiest for rate in ends]
            axes.plot(ends, carried, color=color, linestyle=":", linewidth=1, label=f"link limit, {label}")
    axes.set_ylim(min(map(_speed, measured)) / 2, 2 * max(map(_speed, calm.values())))


def _line(axes: Any, points: tuple[list[float], list[float]], color: str, label: str) -> None:
    axes.plot(*points, color=color, marker="o", markersize=4, linewidth=1.4, label=label)


def _hollow(axes: Any, points: tuple[list[float], list[float]], color: str) -> None:
    axes.plot(*points, color=color, marker="o", markersize=4, markerfacecolor="white", linestyle="")


def _save(figure: Any, target: Path) -> None:
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
