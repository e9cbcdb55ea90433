"""What the trainings of a convergence grid say: the claims as numbers, and tables. Pure."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from node.bench.common import Table
from node.bench.convergence_grid import Grid, Variant, config_of
from node.bench.convergence_point import Point


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one variant: the trainings with its best learning rate."""

    variant: Variant
    rate: float
    tried: Mapping[float, float]  # final validation loss of the first seed, by learning rate
    cells: Sequence[Sequence[Point]]  # by seed, in order of their steps

    @property
    def by_seed(self) -> dict[int, float]:
        """Final validation losses, nats per token; the grid's first seed is always there."""
        return {cell[-1].seed: cell[-1].val_loss for cell in self.cells}

    @property
    def losses(self) -> list[float]:
        return list(self.by_seed.values())

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)

    @property
    def wire_worth(self) -> float | None:
        """What latents say: how much worse the last stage does with those of another text, nats per token."""
        worths = [last.strange_loss - last.val_loss for *_, last in self.cells if last.strange_loss is not None]
        return statistics.mean(worths) if worths else None

    @property
    def wire_compression(self) -> float | None:
        """Over the training: dense bytes / wire bytes at all evaluations, all seeds."""
        points = [point for cell in self.cells for point in cell]
        factors = [point.wire_compression for point in points if point.wire_compression is not None]
        return statistics.harmonic_mean(factors) if factors else None


def results_of(grid: Grid, points: Iterable[Point]) -> list[Result]:
    """All variants with at least one training that was done to the grid's last step."""
    trainings: dict[tuple[str, float, int], list[Point]] = defaultdict(list)
    for point in points:
        trainings[point.variant, point.rate, point.seed].append(point)
    results = []
    for variant in grid.variants:
        steps = config_of(grid, variant, variant.rates[0], grid.seeds[0]).plan.steps
        done = {
            (rate, seed): cell
            for rate in variant.rates
            for seed in grid.seeds
            if (cell := trainings.get((variant.name, rate, seed))) and cell[-1].step == steps
        }
        tried = {rate: cell[-1].val_loss for (rate, seed), cell in done.items() if seed == grid.seeds[0]}
        if tried:
            best = min(tried, key=lambda rate: tried[rate])
            cells = [done[best, seed] for seed in grid.seeds if (best, seed) in done]
            results.append(Result(variant, best, tried, cells))
    return results


def on_equal_seeds(*results: Result) -> list[float]:
    """The mean loss of each over the seeds that all of them have: a lucky seed is lucky for all."""
    seeds = set.intersection(*(set(result.by_seed) for result in results))
    return [statistics.mean(result.by_seed[seed] for seed in seeds) for result in results]


def gap(result: Result, to: Result) -> float:
    """By how much the first one's loss is higher, on equal seeds, nats per token."""
    loss, other = on_equal_seeds(result, to)
    return loss - other


def by_roles(results: Sequence[Result]) -> dict[str, Result]:
    """The variants that have a role."""
    return {str(result.variant.role): result for result in results if result.variant.role}


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """The claims as numbers, nats per token: positive gaps are losses to the fair control, or wins over the last."""
    by_role = by_roles(results)
    summary: dict[str, Any] = {"loss": {result.variant.name: result.loss for result in results}}
    for key, role, against in (
        ("gap_128x", "ours_128x", "fair"),
        ("gap_512x", "ours_512x", "fair"),
        ("gap_128x_to_uncompressed", "ours_128x", "uncompressed"),
        ("control_gap", "control", "uncompressed"),
        ("control_gap_128x", "control", "ours_128x"),
    ):
        if role in by_role and against in by_role:
            summary[key] = gap(by_role[role], by_role[against])
    for role in ("ours_128x", "ours_512x"):
        if role in by_role:
            summary[f"wire_compression_{role.removeprefix('ours_')}"] = by_role[role].wire_compression
    if shares := {r.variant.name: share for r in results if (share := share_of_depth(r, by_role)) is not None}:
        summary["share_of_depth"] = shares
    summary["wire_worth"] = {r.variant.name: r.wire_worth for r in results if r.wire_worth is not None}
    if noise := seed_noise(results):
        summary["seed_noise"] = noise
    return summary


def share_of_depth(result: Result, by_role: Mapping[str, Result]) -> float | None:
    """Of what the fair control has over the last stage alone, the part that a compressed variant keeps.

    On equal seeds. None where there is no wire, or where depth is worth nothing.
    """
    if result.wire_compression is None or not {"fair", "control"} <= by_role.keys():
        return None
    loss, control, fair = on_equal_seeds(result, by_role["control"], by_role["fair"])
    return (control - loss) / (control - fair) if control > fair else None


def seed_noise(results: Sequence[Result]) -> float | None:
    """Standard deviation of the final loss over seeds, pooled over all variants with two or more, nats per token."""
    spreads = [statistics.variance(result.losses) for result in results if len(result.losses) > 1]
    return statistics.mean(spreads) ** 0.5 if spreads else None


def table_of(results: Sequence[Result]) -> Table:
    by_role = by_roles(results)
    fair = by_role.get("fair")
    rows = [
        [
            result.variant.title,
            f"{result.cells[0][-1].parameters / 1e6:.2f}",
            _factor(result.wire_compression),
            f"{result.rate:g} of {', '.join(f'{rate:g}' for rate in sorted(result.tried))}",
            str(len(result.losses)),
            f"{result.loss:.3f}",
            f"{min(result.losses):.3f} to {max(result.losses):.3f}",
            f"{gap(result, fair):+.3f}" if fair else "",
            _percent(share_of_depth(result, by_role)),
            "-" if result.wire_worth is None else f"{result.wire_worth:.3f}",
        ]
        for result in results
    ]
    columns = ["variant", "M parameters", "wire compression", "rate x", "seeds", "val loss", "over seeds", "- fair"]
    columns += ["of depth", "worth of the wire"]
    return Table("validation loss, nats per token, at equal tokens", columns, rows)


def table_of_run(grid: Grid) -> Table:
    """What all variants share."""
    config = config_of(grid, grid.variants[0], grid.variants[0].rates[0], grid.seeds[0])
    model, plan = config.model, config.plan
    per_step = plan.microbatches_per_step * plan.batch * plan.tokens
    layers = f"{model.num_hidden_layers} layers in {config.stages} stages"
    rows: Mapping[str, str] = {
        "model": f"{model.model_type}, H {model.hidden_size}, {layers}, {model.vocab_size} tokens",
        "training": f"{plan.steps} steps of {per_step:,} tokens ({plan.steps * per_step / 1e6:.2f} M), "
        f"T {plan.tokens}, {config.compute.precision} on the CPU",
        "validation": f"{plan.evaluation_microbatches * plan.batch * plan.tokens:,} tokens, held-out files",
        "text": config.data.source,
        "seeds": ", ".join(map(str, grid.seeds)),
    }
    return Table("the runs", ["", "all variants unless they say otherwise"], [list(row) for row in rows.items()])


def _factor(compression: float | None) -> str:
    return "-" if compression is None else f"{compression:.1f}" if compression < 10 else f"{compression:.0f}"


def _percent(share: float | None) -> str:
    """How far below nothing a share lies says nothing."""
    return "-" if share is None else "< 0 %" if share < 0 else f"{100 * share:.0f} %"
