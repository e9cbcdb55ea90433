"""`resbm-node coordinator`: publish a run, print its ticket, be the swarm's first address."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.commands import options
from node.tasks import first_of

if TYPE_CHECKING:
    from coordinator.swarm import Swarm
    from node.config import RunConfig
    from node.events import Event, PeerSeen

    Say = Callable[[Event], None]

REPUBLISH_SECONDS = 600.0
RETRY_SECONDS = 10.0


def coordinator(
    *,
    run: options.RunFile = None,
    preset: options.PresetName = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Publish the run of last time again, at the same address: its tickets stay good, and peers that join "
            "go on from their checkpoints.",
            rich_help_panel="The run",
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "0.0.0.0",
    announce: Annotated[str, typer.Option(help="Address that peers dial, if it is another one.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")] = 0,
    state_dir: Annotated[
        Path | None, typer.Option(help="Identity and ticket.", show_default="~/.local/state/resbm-node/coordinator")
    ] = None,
    json_lines: options.JsonLines = False,
) -> None:
    """Publish a run and print the ticket that others join with. It is not in the data path: peers outlive it.

    Example: resbm-node coordinator --preset demo
    """
    from coordinator.directory import port_of
    from node import folders, identity, publication
    from node.config import dump_toml
    from node.events import emit
    from node.supervisor import locked_folder

    folder = (state_dir or folders.state_folder() / "coordinator").absolute()
    say: Say = emit if json_lines else _say_plainly
    if resume:
        if run is not None or preset is not None or port or announce:
            raise typer.BadParameter("--resume takes the run and the address of last time: give it alone")
        last = publication.recall(folder)
        config, host, announce, port = last.config, last.host, last.announce, last.port
    else:
        config = options.chosen_run(run, preset)
    with locked_folder(folder):
        key = identity.load_or_create(folder / "identity.key")
        swarm = _start_swarm(key.seed, host=host, announce=announce, port=port, folder=folder)
        try:
            port = next(filter(None, map(port_of, swarm.addresses())), port)
            published = publication.Publication(config_toml=dump_toml(config), host=host, announce=announce, port=port)
            publication.remember(folder, published)
            asyncio.run(_serve(swarm, config, folder, say))
        finally:
            swarm.close()


def _start_swarm(seed: bytes, *, host: str, announce: str, port: int, folder: Path) -> Swarm:
    """In the main thread and before any other thread: the directory forks."""
    from coordinator.swarm import Swarm
    from node.processes import become_subreaper

    become_subreaper()
    return Swarm.start(
        identity_seed=seed,
        listen_host=host,
        announce_host=announce,
        port=port,
        bootstrap=[],
        folder=folder / "dht",
    )


async def _serve(swarm: Swarm, config: RunConfig, folder: Path, say: Say) -> None:
    """Until SIGINT, SIGTERM or the directory's death (DirectoryLost)."""
    from node import invitation
    from node.config import dump_toml
    from node.events import TicketPrinted
    from node.supervisor import stop_on_signals

    stopping = asyncio.Event()
    publish = functools.partial(
        swarm.publish_run,
        config_toml=dump_toml(config),
        run_id=config.run_id,
        name=config.name,
        num_stages=config.stages,
        created_at=_created_at(folder, config.run_id),
    )
    with stop_on_signals(stopping.set):
        await publish()
        ticket = swarm.ticket(config.run_id)
        invitation.write(folder, ticket)
        say(TicketPrinted(ticket=ticket, run_id=config.run_id))
        await first_of(stopping.wait(), _republish(swarm, publish), _tell_peers(swarm, config, say))


async def _republish(swarm: Swarm, publish: Callable[[], Awaitable[bytes]]) -> None:
    """Keeps the run known. A failed try is repeated soon; raises DirectoryLost when the directory is gone."""
    from coordinator.errors import DirectoryLost

    wait_seconds = REPUBLISH_SECONDS
    while True:
        await asyncio.sleep(wait_seconds)
        try:
            await publish()
            wait_seconds = REPUBLISH_SECONDS
        except DirectoryLost:
            if not swarm.is_alive():
                raise
            wait_seconds = RETRY_SECONDS


async def _tell_peers(swarm: Swarm, config: RunConfig, say: Say) -> None:
    """Says who comes and goes."""
    known: dict[str, int] = {}
    async for snapshot in swarm.watch(config.run_id, config.stages):
        present = {entry.peer_id: entry.stage for entry in snapshot.all_peers()}
        for event in changes(known, present):
            say(event)
        known = present


def changes(before: dict[str, int], now: dict[str, int]) -> list[PeerSeen]:
    """Who left and who joined between two views of peer id -> stage; a move is both."""
    from node.events import PeerSeen

    left = sorted(before.items() - now.items())
    joined = sorted(now.items() - before.items())
    return [PeerSeen(state="left", stage=stage, peer_id=peer_id) for peer_id, stage in left] + [
        PeerSeen(state="joined", stage=stage, peer_id=peer_id) for peer_id, stage in joined
    ]


def _say_plainly(event: Event) -> None:
    from node.events import PeerSeen, TicketPrinted

    if isinstance(event, TicketPrinted):
        typer.echo(f"run {event.run_id} is published. To join it, on any machine that reaches this one:")
        typer.echo(f"\n  resbm-node join {event.ticket}\n")
        typer.echo("Ctrl+C stops the coordinator; peers that have joined go on without it.")
    elif isinstance(event, PeerSeen):
        typer.echo(f"stage {event.stage}: {event.peer_id} {event.state}")


def _created_at(folder: Path, run_id: str) -> float:
    """Unix time of the run's first publication from this folder."""
    path = folder / f"run-{run_id}.json"
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError):
        return float(json.loads(path.read_text())["created_at"])
    now = time.time()
    path.write_text(json.dumps({"created_at": now}))
    return now
