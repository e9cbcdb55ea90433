"""`resbm-node join`: one command, and this machine trains a stage."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from node.commands import options

if TYPE_CHECKING:
    from node.keeper import Ended


def join(
    ticket: Annotated[str, typer.Argument(help="The run's ticket, as its coordinator printed it.", metavar="TICKET")],
    *,
    stage: Annotated[
        str, typer.Option(help="Stage to serve: auto, a number from 0, or several with commas (a process each).")
    ] = "auto",
    max_stages: Annotated[
        int,
        typer.Option(min=0, help="Stages to serve at most while nobody else does (stage auto); 0: as many as fit."),
    ] = 0,
    cover_after: Annotated[
        float, typer.Option(min=0, help="Seconds that nobody must have served a stage before this machine does, too.")
    ] = 15.0,
    state_dir: Annotated[
        Path | None, typer.Option(help="Identity, checkpoints and log.", show_default="~/.local/state/resbm-node")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    announce: Annotated[str, typer.Option(help="Address that others dial, if it is another one.")] = "",
    port: Annotated[
        int,
        typer.Option(
            min=0, max=65535, help="Port to listen on; 0: any free one. For a further stage s: PORT + 10 (s + 1)."
        ),
    ] = 0,
    dht_port: Annotated[int, typer.Option(min=0, max=65535, help="Port of the directory; 0: any free one.")] = 0,
    metrics_port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Serve /metrics for Prometheus here; 0: any free port.")
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")] = "auto",
    threads: Annotated[int, typer.Option(min=0, help="Processor threads to compute with; 0: all cores.")] = 0,
    activation_budget_mb: Annotated[
        int, typer.Option(min=0, help="Keep activations up to this many MB; recompute them beyond it.")
    ] = 1024,
    state_rate: Annotated[
        float,
        typer.Option(min=0, help="Mbit/s that peers who join may take of this machine's link for state; 0: all of it."),
    ] = 20.0,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time to leave in good order after Ctrl+C.")] = 20.0,
    json_lines: options.JsonLines = False,
) -> None:
    """Join a run: take a stage, train it, survive crashes. Ctrl+C once leaves in good order, twice at once.

    Example: resbm-node join resbm1...
    """
    from datetime import timedelta

    from node import folders, identity
    from node.events import WorkerSpec
    from node.supervisor import Supervisor
    from node.ui import join_display

    folder = (state_dir or folders.state_folder()).absolute()
    identity_file = folder / "identity.key"
    identity.load_or_create(identity_file)
    first, also = _stage_numbers(stage)
    spec = WorkerSpec(
        ticket=ticket,
        state_folder=folder,
        identity_file=identity_file,
        stage=first,
        also=also,
        max_stages=max_stages if first is None else 1,
        cover_after_seconds=cover_after,
        host=host,
        announce=announce,
        port=port,
        dht_port=dht_port,
        metrics_port=metrics_port,
        state_rate_mbit=state_rate,
        device=device,
        threads=threads,
        activation_budget_bytes=activation_budget_mb << 20,
    )
    display = join_display(json_lines=json_lines)
    drain_timeout = timedelta(seconds=drain_seconds)
    supervisor = Supervisor(spec, display.show, on_beside=display.show_beside, drain_timeout=drain_timeout)
    try:
        ended = asyncio.run(supervisor.run())
    finally:
        display.close()
    _leave(ended, supervisor.log.path)


def _stage_numbers(text: str) -> tuple[int | None, tuple[int, ...]]:
    """The first worker's stage, None for auto, and those of the workers beside it."""
    if text == "auto":
        return None, ()
    numbers = [part.strip() for part in text.split(",")]
    if not all(number.isascii() and number.isdigit() for number in numbers):
        raise typer.BadParameter(f"{text!r} is neither auto nor stage numbers", param_hint="--stage")
    first, *also = dict.fromkeys(map(int, numbers))
    return first, tuple(also)


def _leave(ended: Ended, log: Path) -> None:
    """The exit status: 0 done or drained, 1 killed, 2 refused (the display has said why)."""
    from node.keeper import Outcome

    if ended.outcome is Outcome.REFUSED:
        typer.echo(f"  log: {log}", err=True)
        raise typer.Exit(2)
    if ended.outcome is Outcome.KILLED:
        raise typer.Exit(1)
