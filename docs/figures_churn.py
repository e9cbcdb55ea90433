"""Figure of `resbm-node bench churn`: steps a second while machines are killed, stopped, cut off and replaced."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt

BLUE, GREY = "#2563eb", "#94a3b8"
BLOWS = {"kill": ("#dc2626", "killed"), "stop": ("#d97706", "asleep"), "cut": ("#7c3aed", "cut off")}
BIN_SECONDS = 10.0


def churn(source: Path, target: Path) -> None:
    """Throughput over time, with every blow marked; dashed, the mean before the first and the mean after."""
    result = json.loads(source.read_text())
    found = result["measurements"]
    times = sorted(found["steps"].values())
    plan = found["plan"]
    began = found["churn_began_seconds"]
    end = max(began + plan["churn_seconds"], times[-1])
    edges = [index * BIN_SECONDS for index in range(int(end // BIN_SECONDS) + 1)]
    rates = [sum(edge <= at < edge + BIN_SECONDS for at in times) / BIN_SECONDS for edge in edges]
    figure, axes = plt.subplots(figsize=(10, 3.8))
    axes.step(edges, rates, where="post", color=BLUE, linewidth=1.4)
    for start, stop in ((0.0, began), (began, end)):
        inside = sum(start <= at < stop for at in times)
        axes.hlines(inside / (stop - start), start, stop, color=GREY, linestyle="--", linewidth=1.2)
    for blow, (color, label) in BLOWS.items():
        at = [struck["at"] for struck in found["struck"] if struck["blow"] == blow]
        axes.plot(at, [0.0] * len(at), "^", color=color, label=f"{label} ({len(at)})", clip_on=False)
    axes.set(xlabel="seconds", ylabel="steps/s, whole swarm", ylim=(0, None), xlim=(0, end))
    axes.set_title(f"{plan['peers']} peers, {found['run']['stages']} stages, a blow every {plan['every_seconds']:g} s")
    axes.legend(frameon=False, fontsize=8, loc="upper right", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
