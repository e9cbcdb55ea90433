"""Writes the table of docs/metrics.md from the metrics that a node registers."""

from __future__ import annotations

from pathlib import Path

from node.metrics import Described, NodeInfo, WorkerMetrics

PAGE = Path(__file__).parent / "metrics.md"
BEGIN, END = "<!-- metrics: made by docs/metrics_table.py -->\n", "<!-- metrics: end -->\n"


def described() -> list[Described]:
    """All metrics, as a stage in the middle has them."""
    return WorkerMetrics(NodeInfo("run", "name", stage=1, num_stages=3, version="1", device="cpu")).described


def table(metrics: list[Described]) -> str:
    """One row a metric."""
    rows = [
        f"| `{m.name}` | {m.kind} | {' '.join(f'`{label}`' for label in m.labels) or '-'} | {m.text} |" for m in metrics
    ]
    return "\n".join(["| metric | kind | labels | meaning |", "|---|---|---|---|", *rows]) + "\n"


def with_table(page: str) -> str:
    """The page with a fresh table."""
    head, _, rest = page.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{table(described())}{END}{tail}"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
