"""`resbm-node bench convergence`: does a compressed pipeline learn as well, at equal tokens and equal tuning?

Every variant is trained with the stages, codec and optimizer that a swarm runs, on the same text in the same order;
wire compression is counted on the frames that a swarm would send. The fair control has the same parameters and the
same norms as ours and sends everything; the last control is the last stage alone, which receives nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, Table, watching

if TYPE_CHECKING:
    from node.bench.convergence_grid import Grid, Variant
    from node.bench.convergence_point import Point
    from node.bench.convergence_pool import CellFiles

DEFAULT_GRID = "main"
QUICK_GRID = "quick"


def convergence(
    *,
    grid: Annotated[
        str | None, typer.Option(help="A shipped grid, or a grid file (TOML).", show_default="main; --quick: quick")
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(help="Where trainings are kept, to go on from.", show_default="./runs/convergence/GRID"),
    ] = None,
    jobs: Annotated[int, typer.Option(min=0, help="Trainings at a time; 0: one for each core.")] = 0,
    report_only: Annotated[bool, typer.Option("--report-only", help="Train nothing; report what is done.")] = False,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Train the variants of a grid with equal tokens and compare their losses. Stopped, it goes on where it was.

    Example: resbm-node bench convergence --quick
    """
    from node.bench.convergence_pool import CellFiles, Pool

    chosen = read_grid(grid or (QUICK_GRID if quick else DEFAULT_GRID))
    folder = work or Path("runs", "convergence", chosen.name)
    with watching(json_lines=json_lines) as watcher:
        report = Report("convergence", watcher, quick=quick, out=out)
        files = CellFiles(folder)

        def on_point(point: Point) -> None:
            text = f"{point.variant}, seed {point.seed}, {point.tokens:,} tokens: {point.val_loss:.3f} nats"
            watcher.note(point.model_dump() | {"text": text})

        if not report_only:
            watcher.doing("reading text", 0.0)
            prepare_text(chosen)
            Pool(chosen, files, jobs or len(os.sched_getaffinity(0)), on_point, watcher.doing).run()
        results = results_of(chosen, files)
        facts = [table_of_run(chosen), table_of(results)]
        measurements = [point.model_dump() for result in results for cell in result.cells for point in cell]
        report.finish(measurements, facts, summary_of(results))


def read_grid(name: str) -> Grid:
    """A shipped grid by name, or a file. Raises ConfigUnreadable, ConfigInvalid."""
    from node.bench.convergence_grid import parse, shipped
    from node.errors import ConfigUnreadable

    if not name.endswith(".toml"):
        return shipped(name)
    try:
        return parse(Path(name).read_text(encoding="utf-8"), name)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigUnreadable(
            f"{name} cannot be read: {error}", remedy="name a grid file, or a shipped grid"
        ) from error


def prepare_text(grid: Grid) -> None:
    """Text and tokenizer, once: the cells' processes find them in the cache. Refuses a bad variant before any runs."""
    from node.bench.convergence_grid import config_of
    from node.data import load_corpus

    for config in {
        config.data.model_dump_json() + str(config.model.vocab_size): config
        for variant in grid.variants
        for rate in variant.rates
        if (config := config_of(grid, variant, rate, grid.seeds[0]))
    }.values():
        load_corpus(config)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one variant: the trainings with its best learning rate."""

    variant: Variant
    rate: float
    cells: Sequence[Sequence[Point]]  # by seed, in order of their steps

    @property
    def losses(self) -> list[float]:
        """Final validation losses, nats per token, by seed."""
        return [cell[-1].val_loss for cell in self.cells]

    @property
    def loss(self) -> float:
        return statistics.mean(self.losses)

    @property
    def wire_compression(self) -> float | None:
        """Over the training: dense bytes / wire bytes at all evaluations, all seeds."""
        points = [point for cell in self.cells for point in cell]
        factors = [point.wire_compression for point in points if point.wire_compression is not None]
        return statistics.harmonic_mean(factors) if factors else None


def results_of(grid: Grid, files: CellFiles) -> list[Result]:
    """All variants with at least one done training."""
    from node.bench.convergence_grid import chosen_cells

    losses = files.final_losses(grid)
    results = []
    for variant in grid.variants:
        cells = chosen_cells(grid, variant, losses)
        if cells:
            results.append(Result(variant, cells[0].rate, [files.points(cell.key) for cell in cells]))
    return results


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """The claims as numbers, nats per token: positive gaps are losses to the fair control, or wins over the last."""
    by_role = {result.variant.role: result for result in results if result.variant.role}
    summary: dict[str, Any] = {"loss": {result.variant.name: result.loss for result in results}}
    for key, role, against in (
        ("gap_128x", "ours_128x", "fair"),
        ("gap_512x", "ours_512x", "fair"),
        ("gap_128x_to_uncompressed", "ours_128x", "uncompressed"),
        ("control_gap", "control", "uncompressed"),
        ("control_gap_128x", "control", "ours_128x"),
    ):
        if role in by_role and against in by_role:
            summary[key] = by_role[role].loss - by_role[against].loss
    for role in ("ours_128x", "ours_512x"):
        if role in by_role:
            summary[f"wire_compression_{role.removeprefix('ours_')}"] = by_role[role].wire_compression
    if noise := seed_noise(results):
        summary["seed_noise"] = noise
    return summary


def seed_noise(results: Sequence[Result]) -> float | None:
    """Standard deviation of the final loss over seeds, pooled over all variants with two or more, nats per token."""
    spreads = [statistics.variance(result.losses) for result in results if len(result.losses) > 1]
    return statistics.mean(spreads) ** 0.5 if spreads else None


def table_of(results: Sequence[Result]) -> Table:
    by_role = {result.variant.role: result for result in results if result.variant.role}
    fair = by_role.get("fair")
    rows = [
        [
            result.variant.title,
            f"{result.cells[0][-1].parameters / 1e6:.2f}",
            _factor(result.wire_compression),
            f"{result.rate:g}",
            str(len(result.losses)),
            f"{result.loss:.3f}",
            f"{min(result.losses):.3f} to {max(result.losses):.3f}",
            f"{result.loss - fair.loss:+.3f}" if fair else "",
        ]
        for result in results
    ]
    columns = ["variant", "M parameters", "wire compression", "rate x", "seeds", "val loss", "over seeds", "- fair"]
    return Table("validation loss, nats per token, at equal tokens", columns, rows)


def table_of_run(grid: Grid) -> Table:
    """What all variants share."""
    from node.bench.convergence_grid import config_of

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
