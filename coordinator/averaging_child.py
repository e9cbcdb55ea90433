"""The averaging process as its parent sees it: started, asked, and ended without leaving anything behind."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import shutil
import socket
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from coordinator import children
from coordinator.averaging_failure import AveragingFailed, Reason
from coordinator.averaging_launch import Launcher, Process, Settings

START_TIMEOUT = timedelta(seconds=120)  # up to seconds of one core, which others may want too
CLOSE_TIMEOUT = timedelta(seconds=2)
_PREFIX = "resbm-averaging-"
_LOCK = "lock"
_MAX_LINE_BYTES = 1 << 20
_MAX_FOLDER_CHARACTERS = 60  # a Unix socket's path may not be longer than 107


@dataclass(frozen=True, slots=True)
class Start:
    """What a child is started with; the same again when it is started anew."""

    num_values: int
    wire: str
    seed: bytes  # of its identity: it keeps its peer id
    host: str
    announce: str
    port: int
    memory_fd: int
    launcher: Launcher


class Child:
    """A running averaging process.

    Args:
        process: it.
        folder: its sockets.
        lock: keeps others from clearing the folder away.
        reader: answers.
        writer: requests.
        hello: its first words.
    """

    def __init__(
        self,
        *,
        process: Process,
        folder: Path,
        lock: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hello: dict[str, Any],
    ) -> None:
        self._process, self._folder, self._lock = process, folder, lock
        self._writer = writer
        self.peer_id: str = hello["peer_id"]
        self.address: str = hello["address"]
        self._daemons = children.descendants_of(process.pid)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._last_id = 0
        self._lost = False
        self._listener = asyncio.create_task(self._listen(reader))

    @classmethod
    async def start(cls, start: Start, within: timedelta = START_TIMEOUT) -> Child:
        """Returns once it can be called by others.

        Raises:
            AveragingFailed: it does not start.
        """
        folder, lock = _make_folder()
        process, ours, writer = None, None, None
        try:
            process, ours = _spawn(start, folder, lock)
            reader, writer = await asyncio.open_connection(sock=ours, limit=_MAX_LINE_BYTES)
            async with asyncio.timeout(within.total_seconds()):
                hello = json.loads(await reader.readline() or "{}")
            if "address" not in hello:
                raise AveragingFailed(Reason.NOT_STARTED, hello.get("cause", "the process ended at once"))
            return cls(process=process, folder=folder, lock=lock, reader=reader, writer=writer, hello=hello)
        except BaseException as error:
            if writer is not None:
                writer.transport.abort()
            elif ours is not None:
                ours.close()
            _end(process, [], folder, lock)
            if isinstance(error, (TimeoutError, OSError, ValueError)):
                raise AveragingFailed(Reason.NOT_STARTED, f"{type(error).__name__}: {error}") from error
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        """Whether the process and its network daemon run."""
        return not self._lost and self._process.is_running() and all(map(children.is_running, self._daemons))

    async def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to a request. Cancelled, it gives up what was asked.

        Raises:
            AveragingFailed: the process is gone.
        """
        if not self.is_alive():
            raise AveragingFailed(Reason.PROCESS_LOST, "the averaging process is gone")
        self._last_id += 1
        number = self._last_id
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = answer
        try:
            self._write(request | {"id": number})
            return await answer
        except asyncio.CancelledError:
            self._write({"id": number, "do": "cancel"})
            raise
        finally:
            del self._answers[number]

    async def close(self, within: timedelta = CLOSE_TIMEOUT) -> None:
        """Ends it, gently if it reacts in time. Nothing of it is left afterwards, even if this is cancelled."""
        self._lost = True
        self._listener.cancel()
        self._writer.close()  # it leaves when it reads the end
        try:
            with contextlib.suppress(OSError):
                await self._writer.wait_closed()
            await asyncio.to_thread(self._process.wait, within)
        finally:
            _end(self._process, self._daemons, self._folder, self._lock)

    def _write(self, request: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, RuntimeError):
            self._writer.write(json.dumps(request).encode() + b"\n")

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                answer = json.loads(line)
                waiting = self._answers.get(answer["id"])
                if waiting is not None and not waiting.done():
                    waiting.set_result(answer)
        except (OSError, ValueError):
            pass  # as good as gone
        finally:
            self._lost = True
            for waiting in self._answers.values():
                if not waiting.done():
                    waiting.set_exception(AveragingFailed(Reason.PROCESS_LOST, "the averaging process died"))


def _spawn(start: Start, folder: Path, lock: int) -> tuple[Process, socket.socket]:
    """The process, and our end of the socket to it."""
    ours, theirs = socket.socketpair()
    with theirs:
        settings = Settings(
            parent_pid=os.getpid(),
            socket_fd=theirs.fileno(),
            memory_fd=start.memory_fd,
            lock_fd=lock,
            num_values=start.num_values,
            wire=start.wire,
            seed=start.seed.hex(),
            host=start.host,
            announce=start.announce,
            port=start.port,
            folder=str(folder),
        )
        try:
            return start.launcher.launch(settings), ours
        except BaseException:
            ours.close()
            raise


def _end(process: Process | None, daemons: list[Any], folder: Path, lock: int) -> None:
    """By force, which takes milliseconds, so that nothing can come between."""
    if process is not None:
        family = [*daemons, *children.descendants_of(process.pid)]
        process.kill()
        children.kill_all(family)
        process.wait()
    shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)


def _make_folder() -> tuple[Path, int]:
    """A locked folder for a child's sockets, and the lock, which both hold; clears away what dead ones have left."""
    root = Path(tempfile.gettempdir())
    if len(str(root)) > _MAX_FOLDER_CHARACTERS - len(_PREFIX) - 8:
        root = Path("/tmp")
    clear_leftovers(root)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
    lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return folder, lock


def clear_leftovers(root: Path, min_age: timedelta = timedelta(minutes=1)) -> None:
    """Removes folders of children that were killed together with their parents: nobody holds their locks."""
    for folder in root.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            stat = folder.stat()
            if stat.st_uid != os.getuid() or time.time() - stat.st_ctime < min_age.total_seconds():
                continue  # another user's, or just being made
            lock = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)
