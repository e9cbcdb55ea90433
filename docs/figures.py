"""Redraws the documentation's figures from the committed result files: `make figures`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import figures_churn
import figures_convergence
import figures_wan
import matplotlib.pyplot as plt

DOCS = Path(__file__).resolve().parent
BLUE, GREY, RED = "#2563eb", "#94a3b8", "#dc2626"


def lines(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of a result file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def demo(source: Path, target: Path) -> None:
    """Loss over tokens, and what crossed the links against what bf16 activations would have cost."""
    events = lines(source)
    steps = [event for event in events if event["event"] == "step"]
    summary = events[-1]
    tokens = [step["tokens"] / 1e3 for step in steps]
    figure, (loss, wire) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    loss.plot(tokens, [step["loss"] for step in steps], color=BLUE, linewidth=1.4, label="training loss")
    loss.axhline(summary["unigram_entropy"], color=GREY, linestyle="--", label="best guess without context")
    ends = ([0, tokens[-1]], [summary["val_loss_before"], summary["val_loss"]])
    loss.plot(*ends, "o", color=RED, label="validation loss, before and after")
    loss.set(xlabel="thousand tokens", ylabel="nats per token", title="resbm-node demo: four processes, one model")
    loss.legend(frameon=False)
    dense, sent = (sum(step[key] for step in steps) / 1e6 for key in ("dense_bytes", "wire_bytes"))
    bars = wire.bar(["bf16 activations", "sent"], [dense, sent], color=[GREY, BLUE])
    wire.bar_label(bars, [f"{dense:,.0f} MB", f"{sent:,.1f} MB"])
    wire.set(yscale="log", ylabel="MB, all links, both ways", title=f"{summary['wire_compression']:.0f}x fewer bytes")
    for axes in (loss, wire):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(target, dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    demo(DOCS / "results" / "demo.jsonl", DOCS / "images" / "demo.png")
    if (wan := DOCS / "results" / "bench-wan.json").exists():
        figures_wan.bandwidth(wan, DOCS / "images" / "wan-bandwidth.png")
        figures_wan.round_trip(wan, DOCS / "images" / "wan-round-trip.png")
    for grid in sorted(path.stem for path in (DOCS / "results" / "convergence").glob("*.jsonl")):
        points = DOCS / "results" / "convergence" / f"{grid}.jsonl"
        figures_convergence.losses(points, grid, DOCS / "images" / f"convergence-{grid}.png")
    if (churn := DOCS / "results" / "bench-churn.json").exists():
        figures_churn.churn(churn, DOCS / "images" / "churn.png")
    if by_rate := sorted((DOCS / "results").glob("bench-churn-every-*.json")):
        figures_churn.rates(by_rate, DOCS / "images" / "churn-rates.png")
    if (soak := DOCS / "results" / "bench-churn-soak.json").exists():
        figures_churn.growth(soak, DOCS / "images" / "churn-soak.png")
