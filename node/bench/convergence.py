"""`resbm-node bench convergence`: does a compressed pipeline learn as well, at equal tokens and equal tuning?

Every variant is trained with the stages, codec and optimizer that a swarm runs, on the same text in the same order;
wire compression is counted on the frames that a swarm would send. The fair control has the same parameters and the
same norms as ours and sends everything; the last control is the last stage alone, which receives nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, watching

if TYPE_CHECKING:
    from node.bench.convergence_grid import Grid
    from node.bench.convergence_point import Point

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
    points: Annotated[
        Path | None,
        typer.Option(help="Also write all evaluations as JSON lines; with --report-only: read them.", metavar="FILE"),
    ] = None,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Train the variants of a grid with equal tokens and compare their losses. Stopped, it goes on where it was.

    Example: resbm-node bench convergence --quick
    """
    from node.bench.convergence_pool import CellFiles, Pool
    from node.bench.convergence_results import results_of, summary_of, table_of, table_of_run

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
        if points is not None and report_only:
            done = read_points(points)
        else:
            done = files.all_points(chosen)
            if points is not None:
                write_points(points, done)
        results = results_of(chosen, done)
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


def write_points(path: Path, points: Sequence[Point]) -> None:
    """One JSON line an evaluation. Raises MachineUnfit when the disk refuses."""
    from node.errors import MachineUnfit

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(point.model_dump_json() + "\n" for point in points))
    except OSError as error:
        raise MachineUnfit(f"{path} cannot be written: {error.strerror}", remedy="choose another --points") from error


def read_points(path: Path) -> list[Point]:
    """What `write_points` has written. Raises ConfigUnreadable."""
    from node.bench.convergence_point import Point
    from node.errors import ConfigUnreadable

    try:
        return [Point.model_validate_json(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigUnreadable(f"{path} holds no evaluations: {error}", remedy="name a file of --points") from error
