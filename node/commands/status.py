"""`resbm-node status`: who serves what, and how far the run is."""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.commands import options
from node.tasks import first_of

if TYPE_CHECKING:
    from coordinator.directory import DirectorySnapshot
    from coordinator.reading import PublishedRun
    from coordinator.swarm import Swarm
    from coordinator.ticket import Ticket


def status(
    ticket: Annotated[
        str | None, typer.Argument(help="The run's ticket; default: that of this machine's coordinator or peer.")
    ] = None,
    *,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where to look for a ticket.", show_default="~/.local/state/resbm-node")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Go on until Ctrl+C, a fresh view every 3 s.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on for answers.")] = "0.0.0.0",
    json_lines: options.JsonLines = False,
) -> None:
    """Show a run's stages and peers: step, loss, speed, bottleneck, links and compression, as the directory knows them.

    Example: resbm-node status --watch
    """
    from coordinator.ticket import decode_ticket

    decoded = decode_ticket(ticket or options.kept_ticket(state_dir))
    with tempfile.TemporaryDirectory(prefix="resbm-node-status-") as folder:
        swarm = _start_swarm(decoded, host, Path(folder))
        try:
            asyncio.run(_show(swarm, decoded, watch=watch, json_lines=json_lines))
        finally:
            swarm.close()


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

    from node.status_view import as_json, as_table

    console = Console(highlight=False)
    if json_lines:
        yield lambda *view: typer.echo(json.dumps(as_json(*view)))
    elif redraw and console.is_terminal:
        with Live("", console=console, auto_refresh=False) as live:
            yield lambda *view: live.update(as_table(*view), refresh=True)
    else:
        yield lambda *view: console.print(as_table(*view))
