"""Running things beside each other until one of them ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine
from typing import Any

from stage_server.concurrency import cancelled, until_first_ends


async def first_of(*awaitables: Awaitable[Any]) -> None:
    """Waits for the first to end, cancels the others and waits for them, then raises what the first one raised."""
    for error in await until_first_ends(*awaitables):
        raise error


class Background:
    """Work that goes on beside its owner and ends with it. Make it on an event loop."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """What the first task that failed has raised: for the owner to raise."""

    def start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Begins something; cancel the task to give it up."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    async def close(self) -> None:
        """Gives up all that is under way, and waits until it has ended."""
        await cancelled(*self._tasks)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.failure.done():
            self.failure.set_exception(error)
