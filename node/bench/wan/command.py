"""`resbm-node bench wan`: training speed against bandwidth, round trip and loss, on links that the kernel shapes.

Ours, our own pipeline without a bottleneck, and PyTorch's pipeline run one after another in the same network
namespaces. Each is started once; links are reshaped while it trains, the step into which the change fell is left out,
and whole steps are measured. Needs root.
"""

from __future__ import annotations

from typing import Annotated

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, watching
from node.bench.wan import plan

PRESET = "demo"
BATCH, QUICK_BATCH = 8, 2
MICROBATCHES = 8
"""Of 2048 tokens at the preset's length. Small ones cost more to handle than to send; and in steps of many, filling and
draining the pipeline hides behind other stages' work where stages share cores."""


def wan(
    *,
    preset: Annotated[str, typer.Option(help="Run to train.")] = PRESET,
    system: Annotated[list[str] | None, typer.Option(help="Who trains.", show_default="dense, ours, torch")] = None,
    bandwidth: Annotated[
        list[str] | None,
        typer.Option(help="Mbit/s of each up-link and down-link, or 'unshaped'.", show_default="unshaped, 1000 to 1"),
    ] = None,
    round_trip: Annotated[
        list[float] | None, typer.Option(help="Milliseconds between two peers.", show_default="0, 50, 100, 200")
    ] = None,
    loss: Annotated[list[float] | None, typer.Option(help="Percent of packets lost.", show_default="0, 1")] = None,
    microbatches: Annotated[int, typer.Option(min=2, help="Microbatches in a step.")] = MICROBATCHES,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences in a microbatch.", show_default="8; --quick: 2")
    ] = None,
    stages: Annotated[int | None, typer.Option(min=2, help="Stages.", show_default="the preset's")] = None,
    precision: Annotated[
        str | None, typer.Option(help="What all three compute in: fp32 or bf16.", show_default="the preset's")
    ] = None,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Measure training over shaped links against two dense pipelines in the same network namespaces. Needs root.

    Example: resbm-node bench wan --quick
    """
    systems = plan.systems_of(system or list(plan.System))
    rates = plan.rates_of(bandwidth or (plan.QUICK_BANDWIDTHS if quick else plan.BANDWIDTHS))
    round_trips = plan.require_round_trips(round_trip or (plan.QUICK_ROUND_TRIPS_MS if quick else plan.ROUND_TRIPS_MS))
    losses = plan.losses_of(loss or ((0.0, 1.0) if not quick else (0.0,)))
    from node.lab.tools import require_root

    require_root()  # before what a user without rights may not even be able to import
    from node.bench.wan.run import Task, run
    from node.config import preset as preset_named
    from node.config import validated

    values = preset_named(preset).model_dump()
    batch = batch or (QUICK_BATCH if quick else BATCH)
    values["plan"] |= {"microbatches_per_step": microbatches, "batch": batch}
    values["stages"] = stages or values["stages"]
    values["compute"]["precision"] = precision or values["compute"]["precision"]
    config = validated(values, "command line")
    flush_at = plan.flush_point(rates, round_trips)
    task = Task(
        config=config,
        systems=systems,
        sweep=plan.sweep(rates, round_trips, losses),
        effort=plan.QUICK if quick else plan.FULL,
        flush_plans=tuple(plan.flush_plans(microbatches, quick=quick)) if flush_at else (),
        flush_at=flush_at,
    )
    with watching(json_lines=json_lines) as watcher:
        report = Report("wan", watcher, quick=quick, out=out)
        findings = run(task, watcher)
        from node.bench.wan.tables import summary_of, tables_of

        measurements = {"run": task.config.model_dump(mode="json"), "run_id": task.config.run_id, **findings.told()}
        report.finish(measurements, tables_of(findings, task.config), summary_of(findings))
