"""A child's stdout as events, without threads."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
from collections.abc import AsyncIterator, Callable

from node.events import MAX_LINE_BYTES, Event, EventInvalid, parse_event


@contextlib.asynccontextmanager
async def reading_stdout(child: subprocess.Popen[bytes]) -> AsyncIterator[asyncio.StreamReader]:
    """The child's stdout; closed at the end, however much was read."""
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=MAX_LINE_BYTES)
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), child.stdout)
    try:
        yield reader
    finally:
        transport.close()


async def forward_events(
    reader: asyncio.StreamReader, on_event: Callable[[Event], None], on_garbage: Callable[[str], None]
) -> None:
    """Passes events on until the pipe ends; what is no event goes to `on_garbage` in words."""
    while True:
        try:
            line = await reader.readline()
        except ValueError:
            on_garbage(f"a line of more than {MAX_LINE_BYTES} bytes on stdout is left out")
            continue
        if not line:
            return
        try:
            event = parse_event(line)
        except EventInvalid as error:
            on_garbage(f"no event on stdout: {error}")
            continue
        on_event(event)
