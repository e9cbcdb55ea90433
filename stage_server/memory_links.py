"""Links within one process: the in-memory twin of grpc_links, held to the same conformance tests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from stage_server.errors import LinkLost, StageError, refusal
from stage_server.links import Frame, FrameStream

CAPACITY = 64  # frames; a full queue makes the sender wait, as a full socket does

LinkHandler = Callable[[FrameStream], Awaitable[None]]


class MemoryStream:
    """One end of a pair of bounded queues. Frames are copied through their bytes, as a network would."""

    def __init__(self, inbox: asyncio.Queue[Frame | None], outbox: asyncio.Queue[Frame | None]) -> None:
        self._inbox = inbox
        self._outbox = outbox
        self._closed = asyncio.Event()
        self._twin: MemoryStream | None = None
        self._reason: Exception | None = None

    @classmethod
    def pair(cls) -> tuple[MemoryStream, MemoryStream]:
        """(the caller's end, the answering end)."""
        there: asyncio.Queue[Frame | None] = asyncio.Queue(CAPACITY)
        back: asyncio.Queue[Frame | None] = asyncio.Queue(CAPACITY)
        caller, answerer = cls(back, there), cls(there, back)
        caller._twin, answerer._twin = answerer, caller
        return caller, answerer

    async def send(self, frame: Frame) -> None:
        copy = type(frame).FromString(frame.SerializeToString())
        if not await self._unless_closed(self._outbox.put(copy)):
            raise self._over()

    async def receive(self) -> Frame:
        if not self._inbox.empty() and not self._closed.is_set():
            frame = self._inbox.get_nowait()
        else:
            get = asyncio.ensure_future(self._inbox.get())
            if not await self._unless_closed(get):
                raise self._over()
            frame = get.result()
        if frame is None:
            raise self._over()
        return frame

    async def close(self, reason: Exception | None = None) -> None:
        for end in (self, self._twin):
            if end is not None and not end._closed.is_set():
                end._reason = reason
                end._closed.set()

    async def _unless_closed(self, operation: Awaitable[object]) -> bool:
        """Awaits the operation; False when the stream is closed first."""
        task = asyncio.ensure_future(operation)
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait({task, closed}, return_when=asyncio.FIRST_COMPLETED)
            return task.done() and not self._closed.is_set()
        finally:
            task.cancel()
            closed.cancel()

    def _over(self) -> StageError:
        if isinstance(self._reason, StageError):
            return refusal(int(self._reason.code), str(self._reason))
        return LinkLost("the stream is closed")


class MemoryNetwork:
    """Endpoints by name within one process; it is its own dialer."""

    def __init__(self) -> None:
        self._handlers: dict[str, LinkHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, endpoint: str, handler: LinkHandler) -> None:
        """From now on, streams dialled to `endpoint` are given to `handler`."""
        self._handlers[endpoint] = handler

    async def dial(self, endpoint: str) -> FrameStream:
        handler = self._handlers.get(endpoint)
        if handler is None:
            raise LinkLost(f"nobody answers at {endpoint}")
        caller, answerer = MemoryStream.pair()
        task = asyncio.ensure_future(self._answer(handler, answerer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return caller

    async def close(self) -> None:
        """Ends every handler still running."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    @staticmethod
    async def _answer(handler: LinkHandler, stream: MemoryStream) -> None:
        try:
            await handler(stream)
        finally:
            await stream.close()
