"""`resbm-node ticket`: what to send to somebody who wants to join."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from node.commands import options


def ticket(
    *,
    state_dir: Annotated[
        Path | None, typer.Option(help="Where to look.", show_default="~/.local/state/resbm-node")
    ] = None,
    json_lines: options.JsonLines = False,
) -> None:
    """Print the ticket of the run that this machine coordinates or takes part in.

    A peer's ticket names the peers that it saw last, so that others can join when the coordinator is gone.

    Example: resbm-node join "$(ssh a-friend resbm-node ticket)"
    """
    from coordinator.ticket import decode_ticket
    from node.events import TicketPrinted, emit

    text = options.kept_ticket(state_dir)
    run_id = decode_ticket(text).run_id
    if json_lines:
        emit(TicketPrinted(ticket=text, run_id=run_id))
    else:
        typer.echo(text)
