"""Running things side by side until one of them ends."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any


async def cancelled(*tasks: asyncio.Future[Any]) -> None:
    """Ends tasks whose results nobody needs, and waits until they have ended."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until_first_ends(*work: Awaitable[Any]) -> list[Exception]:
    """Runs all until one returns or raises, cancels the rest and waits for them. Returns what was raised, if anything.

    Unlike a TaskGroup it keeps a cancellation from outside apart from an error within: the former always propagates.
    (On Python 3.11 a TaskGroup whose child fails while it is itself being cancelled forgets the cancellation.)
    """
    tasks = [asyncio.ensure_future(awaitable) for awaitable in work]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await cancelled(*tasks)
    errors = [task.exception() for task in tasks if task in done]
    return [error for error in errors if isinstance(error, Exception)]
