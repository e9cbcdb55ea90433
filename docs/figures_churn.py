"""Figures of `resbm-node bench churn`: steps a second while machines come and go, and whether peers grow."""

from __future__ import annotations

import json
from collections.abc import Sequence
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


def rates(sources: Sequence[Path], target: Path) -> None:
    """Throughput against how often a machine is hit; grey, the minute before it in each of the runs."""
    figure, axes = plt.subplots(figsize=(6, 3.6))
    for source in sources:
        found = json.loads(source.read_text())["measurements"]
        times, plan, began = found["steps"].values(), found["plan"], found["churn_began_seconds"]
        end = began + plan["churn_seconds"]
        undisturbed = sum(0 <= at < began for at in times) / began
        churned = sum(began <= at < end for at in times) / (end - began)
        hits = 60 * len(found["struck"]) / plan["churn_seconds"]
        axes.plot(0.0, undisturbed, "o", color=GREY, clip_on=False)
        axes.plot(hits, churned, "o", color=BLUE)
    axes.set(xlabel="machines hit a minute, of 8, each replaced", ylabel="steps/s, whole swarm", ylim=(0, None))
    axes.set_xlim(0, None)
    axes.grid(axis="y", color=GREY, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


def growth(source: Path, target: Path) -> None:
    """What peers that lived long held, all their processes together; blue, those to whom nothing happened."""
    found = json.loads(source.read_text())["measurements"]
    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4))
    for peer, samples in sorted(found["survivors"].items()):
        is_spared = int(peer.rpartition("-")[2]) <= found["plan"]["num_spared"]
        minutes = [sample["at"] / 60 for sample in samples]
        held = ([sample["memory_bytes"] / 2**20 for sample in samples], [sample["open_files"] for sample in samples])
        for axes, values in zip(panels, held, strict=True):
            axes.plot(minutes, values, color=BLUE if is_spared else GREY, linewidth=1.6 if is_spared else 0.8)
    for axes, label in zip(panels, ("memory of a peer (PSS), MiB", "open files of a peer"), strict=True):
        axes.set(xlabel="minutes", ylabel=label, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)
