"""`resbm-node status`: who serves what, and how far the run is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.commands import options
from node.tasks import first_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from coordinator.directory import DirectorySnapshot, PeerEntry
    from coordinator.reading import PublishedRun
    from coordinator.swarm import Swarm
    from coordinator.ticket import Ticket


def status(
    ticket: Annotated[
        str | None, typer.Argument(help="The run's ticket; default: the one this machine's coordinator wrote.")
    ] = None,
    *,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where to look for a ticket.", show_default="~/.local/state/resbm-node")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl+C, a fresh view every 3 s.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on for answers.")] = "0.0.0.0",
    json_lines: options.JsonLines = False,
) -> None:
    """Show a run's stages and peers: step, loss, speed and compression, as the directory knows them.

    Example: resbm-node status --watch
    """
    from coordinator.ticket import decode_ticket
    from node import folders

    text = ticket or _last_ticket(state_dir or folders.state_folder())
    decoded = decode_ticket(text)
    with tempfile.TemporaryDirectory(prefix="resbm-node-status-") as folder:
        swarm = _start_swarm(decoded, host, Path(folder))
        try:
            asyncio.run(_show(swarm, decoded, watch=watch, json_lines=json_lines))
        finally:
            swarm.close()


def _last_ticket(folder: Path) -> str:
    """The ticket that a coordinator on this machine wrote down."""
    for path in (folder / "ticket", folder / "coordinator" / "ticket"):
        if path.is_file():
            return path.read_text().strip()
    raise typer.BadParameter(f"no coordinator has left a ticket in {folder}: give one", param_hint="TICKET")


def _start_swarm(ticket: Ticket, host: str, folder: Path) -> Swarm:
    """A passing visitor with a key of its own, in the main thread: the directory forks."""
    from coordinator.swarm import Swarm
    from node import identity
    from node.processes import become_subreaper

    become_subreaper()
    visitor = identity.load_or_create(folder / "identity.key")
    return Swarm.start(
        identity_seed=visitor.seed,
        listen_host=host,
        announce_host="",
        port=0,
        bootstrap=list(ticket.bootstrap),
        folder=folder / "dht",
    )


async def _show(swarm: Swarm, ticket: Ticket, *, watch: bool, json_lines: bool) -> None:
    from node.config import load_toml
    from node.supervisor import stop_on_signals

    stopping = asyncio.Event()
    with stop_on_signals(stopping.set):
        run = await swarm.fetch_run(ticket, lambda text: load_toml(text).run_id)
        steps = load_toml(run.config_toml).plan.steps
        views = _print_views(swarm, run, steps, json_lines=json_lines, watch=watch)
        await first_of(stopping.wait(), views)


async def _print_views(swarm: Swarm, run: PublishedRun, steps: int, *, json_lines: bool, watch: bool) -> None:
    with _printing(json_lines=json_lines, redraw=watch) as say:
        async for snapshot in swarm.watch(run.run_id, run.num_stages):
            say(snapshot, run.name, steps)
            if not watch:
                return


@contextlib.contextmanager
def _printing(*, json_lines: bool, redraw: bool) -> Iterator[Callable[[DirectorySnapshot, str, int], None]]:
    """What to do with a view: a JSON line, a table, or one table that is redrawn in place."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False)
    if json_lines:
        yield lambda *view: typer.echo(json.dumps(as_json(*view)))
    elif redraw and console.is_terminal:
        with Live("", console=console, auto_refresh=False) as live:
            yield lambda *view: live.update(as_table(*view), refresh=True)
    else:
        yield lambda *view: console.print(as_table(*view))


def as_json(snapshot: DirectorySnapshot, name: str, steps: int) -> dict[str, Any]:
    """One view, for scripts."""
    peers = [
        {
            "stage": entry.stage,
            "peer_id": entry.peer_id,
            "state": state_name(entry),
            "endpoints": list(entry.endpoints),
            "committed_step": entry.committed_step,
            "durable_step": entry.durable_step,
            "loss": entry.loss,
            "tokens_per_second": entry.tokens_per_second,
            "compute_share": entry.compute_share,
            "queue_depth": entry.queue_depth,
            "microbatches": entry.microbatches,
            "wire_compression": entry.wire_compression or None,
            "software_version": entry.software_version,
        }
        for entry in snapshot.all_peers()
    ]
    return {
        "event": "status",
        "run_id": snapshot.run_id,
        "name": name,
        "num_stages": snapshot.num_stages,
        "steps": steps,
        "unserved_stages": unserved(snapshot),
        "refused_records": snapshot.num_refused,
        "peers": peers,
    }


def as_table(snapshot: DirectorySnapshot, name: str, steps: int) -> RenderableType:
    """One view, for people."""
    from rich.table import Table

    missing = ", ".join(map(str, unserved(snapshot)))
    caption = f"nobody serves stage {missing}" if missing else "every stage is served"
    table = Table(title=f"run {name} ({snapshot.run_id})", caption=caption, title_justify="left")
    for column, justify in _COLUMNS:
        table.add_column(column, justify="right" if justify else "left", no_wrap=True)
    for stage in range(snapshot.num_stages):
        for entry in snapshot.at(stage):
            table.add_row(*_row(entry, steps))
        if not snapshot.at(stage):
            table.add_row(str(stage), "[yellow]nobody[/]")
    return table


_COLUMNS = (
    ("stage", True),
    ("peer", False),
    ("state", False),
    ("step", True),
    ("loss", True),
    ("tokens/s", True),
    ("computing", True),
    ("queue", True),
    ("wire", True),
)


def _row(entry: PeerEntry, steps: int) -> tuple[str, ...]:
    from node.ui import short_count

    return (
        str(entry.stage),
        f"{entry.peer_id[:8]}..{entry.peer_id[-6:]}",
        state_name(entry),
        f"{entry.committed_step}/{steps}",
        "-" if entry.loss is None else f"{entry.loss:.3f}",
        short_count(entry.tokens_per_second),
        f"{100 * entry.compute_share:.0f} %",
        str(entry.queue_depth),
        f"{entry.wire_compression:.0f}x" if entry.wire_compression else "-",
    )


def state_name(entry: PeerEntry) -> str:
    """'serving', from PEER_STATE_SERVING."""
    from resbm_pb import records_pb2

    return records_pb2.PeerState.Name(entry.state).removeprefix("PEER_STATE_").lower()


def unserved(snapshot: DirectorySnapshot) -> list[int]:
    """Stages without a peer."""
    return [stage for stage in range(snapshot.num_stages) if not snapshot.at(stage)]
