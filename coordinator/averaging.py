"""Sums over the replicas of one stage, through hivemind's averager in a process of its own.

    averaging = await ReplicaAveraging.start(num_values=n, listen_host="0.0.0.0", announce_host="203.0.113.7")
    ...                                              # tell the other replicas averaging.address, hear theirs
    averaging.values[:] = gradient_sum               # float32 [n]
    done = await averaging.sum(key, addresses, count=microbatches, within=timedelta(seconds=30))
    gradient_sum[:] = averaging.total                # the same bits at every member; done.digest says which

A round takes place among exactly the members named, or fails at those that notice; some may have the sum and others
not, so compare digests before using it. Every part of the sum was compared with what the members said they put in
(`averaging_contribution`). `values` is never written here: a failed round can be repeated without computing it again.

The process may be killed at any time. It is started anew, with the same peer id, before the next round.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import secrets
import sys
import tempfile
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np

from coordinator.averaging_child import START_TIMEOUT, Child, Start
from coordinator.averaging_contribution import Values, Wire
from coordinator.averaging_failure import AveragingFailed, Reason
from coordinator.averaging_launch import END_TIMEOUT, FreshInterpreter, Launcher

__all__ = ["AveragingFailed", "Reason", "ReplicaAveraging", "StageSum", "Wire"]

GRACE = END_TIMEOUT + timedelta(seconds=3)
"""How much later than a round's own end its process may answer, before it is given up."""
SECOND_LOOK = timedelta(seconds=1)
"""And again after that: where the whole machine slept, the time is over before the answer could be read."""


@dataclass(frozen=True, slots=True)
class StageSum:
    """A round that took effect here; the vector is in `ReplicaAveraging.total`."""

    num_microbatches: int  # of all members together
    digest: str  # of the sum's bytes
    seconds: float
    bytes_sent: int  # of values, as encoded
    bytes_received: int


class ReplicaAveraging:
    """One worker's part. `start` it when the stage has a second replica; all methods belong to one event loop."""

    def __init__(self, start: Start, memory: _Memory, child: Child) -> None:
        self._start, self._memory = start, memory
        self._child: Child | None = child
        self._restart: asyncio.Task[None] | None = None
        self._address, self._peer_id = child.address, child.peer_id
        self._turn = asyncio.Lock()
        self._closed = False

    @classmethod
    async def start(
        cls,
        *,
        num_values: int,
        listen_host: str = "0.0.0.0",
        announce_host: str = "",
        port: int = 0,
        seed: bytes | None = None,
        wire: Wire = Wire.FLOAT32,
        within: timedelta = START_TIMEOUT,
        launcher: Launcher | None = None,
    ) -> ReplicaAveraging:
        """Starts the process.

        Args:
            num_values: length of the vectors.
            listen_host: address to listen on; others must reach it, or `announce_host`.
            announce_host: what others are told, when it is another one.
            port: 0 means any free one, kept when the process is started anew.
            seed: 32 bytes of the averager's identity; none means a random one. Do not use the peer's own: two network
                daemons of one identity confuse each other.
            wire: how values travel.
            within: for the start.
            launcher: starts the process, now and after failures. None means a fresh interpreter each time, which takes
                seconds of one core for its imports: see `averaging_zygote`.

        Raises:
            AveragingFailed: the process does not start.
        """
        if num_values < 1:
            raise ValueError("nothing to average")
        memory = _Memory(num_values)
        start = Start(
            num_values=num_values,
            wire=wire.value,
            seed=seed or secrets.token_bytes(32),
            host=listen_host,
            announce=announce_host,
            port=port,
            memory_fd=memory.fd,
            launcher=launcher or FreshInterpreter(),
        )
        try:
            child = await Child.start(start, within)
        except BaseException:
            memory.close()
            raise
        # the port it has got, so that the address stays the same over restarts
        return cls(replace(start, port=_port_of(child.address)), memory, child)

    @property
    def address(self) -> str:
        """Who and where this averager is, for the other replicas. It hardly ever changes: look again after failures."""
        return self._address

    @property
    def peer_id(self) -> str:
        """hivemind's id of this averager; it stays."""
        return self._peer_id

    @property
    def pid(self) -> int | None:
        """Of the averaging process, while there is one."""
        return self._child.pid if self._child is not None else None

    @property
    def values(self) -> Values:
        """float32 [num_values], what this member puts in: write it while no round is under way."""
        return self._memory.values

    @property
    def total(self) -> Values:
        """float32 [num_values], the newest sum: valid from a successful round until the next begins."""
        return self._memory.total

    async def sum(self, key: str, members: Sequence[str], count: int, within: timedelta) -> StageSum:
        """One round. Cancel it to give it up: the others then fail too.

        Args:
            key: names the round, alike for all members and never used again, not even to repeat a failed round: run,
                stage, step, lineage, number, shares.
            members: addresses of exactly those who take part, this one among them, in any order.
            count: microbatches that `values` holds; may be 0, with `values` all zero.
            within: for the whole round, including the wait until the others come.

        Raises:
            AveragingFailed: it did not take effect here; `total` is undefined, `values` as it was, and the object
                ready for another round.
        """
        async with self._turn:
            child = await self._ready(within)
            request = {"key": key, "members": list(members), "count": count, "timeout_seconds": within.total_seconds()}
            try:
                answer = await _in_time(child.ask(do="sum", **request), (within + GRACE, SECOND_LOOK))
            except (TimeoutError, AveragingFailed) as error:
                self._replace_child()
                if isinstance(error, AveragingFailed):
                    raise
                raise AveragingFailed(Reason.PROCESS_LOST, "the averaging process does not answer") from error
            if "reason" in answer:
                raise AveragingFailed(Reason(answer["reason"]), answer["cause"])
            return StageSum(
                num_microbatches=answer["num_microbatches"],
                digest=answer["digest"],
                seconds=answer["seconds"],
                bytes_sent=answer["bytes_sent"],
                bytes_received=answer["bytes_received"],
            )

    async def close(self) -> None:
        """Ends the process; nothing of it is left. Safe to call twice, and while a round is under way."""
        if self._closed:
            return
        self._closed = True
        if self._restart is not None:
            self._restart.cancel()
            await asyncio.gather(self._restart, return_exceptions=True)
        if self._child is not None:
            await self._child.close()
            self._child = None
        self._memory.close()

    async def _ready(self, within: timedelta) -> Child:
        """A living child; if there is none, the one that is being started."""
        if self._closed:
            raise AveragingFailed(Reason.PROCESS_LOST, "closed")
        if self._restart is None and (self._child is None or not self._child.is_alive()):
            self._replace_child()
        if self._restart is not None:
            _, unfinished = await asyncio.wait({self._restart}, timeout=within.total_seconds())
            if unfinished:
                raise AveragingFailed(Reason.PROCESS_LOST, "the averaging process is being started anew")
            restarted, self._restart = self._restart, None
            restarted.result()
        if self._child is None:
            raise AveragingFailed(Reason.PROCESS_LOST, "closed")
        return self._child

    def _replace_child(self) -> None:
        """Begins to; the next round waits for it."""
        if self._restart is None and not self._closed:
            self._restart = asyncio.create_task(self._do_replace_child())

    async def _do_replace_child(self) -> None:
        old, self._child = self._child, None
        if old is not None:
            await old.close(within=timedelta(0))
        try:
            self._child = await Child.start(self._start)
        except AveragingFailed:  # perhaps somebody else has got the port meanwhile
            self._child = await Child.start(replace(self._start, port=0))
        self._address = self._child.address


class _Memory:
    """Two vectors shared with the averaging process, in memory that has no name and so leaves nothing behind."""

    def __init__(self, num_values: int) -> None:
        if sys.platform == "linux":
            self.fd = os.memfd_create("resbm-averaging")
        else:
            with tempfile.TemporaryFile() as file:
                self.fd = os.dup(file.fileno())
        os.ftruncate(self.fd, 2 * 4 * num_values)
        both = np.frombuffer(mmap.mmap(self.fd, 2 * 4 * num_values), np.float32)
        self.values: Values = both[:num_values]
        self.total: Values = both[num_values:]

    def close(self) -> None:
        """Ours; it is freed when the last array is."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _port_of(address: str) -> int:
    """The TCP port in the first of some multiaddresses."""
    words = address.split(maxsplit=1)[0].split("/")
    return int(words[words.index("tcp") + 1])


async def _in_time(answer: Coroutine[Any, Any, dict[str, Any]], patience: Sequence[timedelta]) -> dict[str, Any]:
    """What it gives within one of these times after another. Raises TimeoutError."""
    task = asyncio.create_task(answer)
    try:
        for time_left in patience:
            await asyncio.wait({task}, timeout=time_left.total_seconds())
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
