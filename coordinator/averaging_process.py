"""The process that averages: `python -m coordinator.averaging_process "{settings}"`, or `serve` in a forked one.

It takes requests from its parent, one JSON object a line, on the socket whose descriptor it was given, and answers each
once:

    {"id": 1, "do": "sum", "key": ..., "members": [...], "count": 3, "timeout_seconds": 30}   begin a round
    {"id": 1, "do": "cancel"}                                                                give it up

A round that is under way ends before the next begins. When the parent dies or closes the socket, the process ends, with
its network daemon, its sockets and its folder.
"""

from __future__ import annotations

import os

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before anything imports grpc

import asyncio
import contextlib
import json
import logging
import mmap
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

import numpy as np
import torch
import uvloop

from coordinator import children
from coordinator.averaging_contribution import Values, Wire
from coordinator.averaging_failure import AveragingFailed, Reason
from coordinator.averaging_group import Member, Sum, SumAverager
from coordinator.averaging_hivemind import P2P, require_known_hivemind
from coordinator.averaging_launch import END_TIMEOUT, Settings
from coordinator.identity import write_key_file
from coordinator.listening import Listen, multiaddress, with_checked_port

MAX_LINE_BYTES = 1 << 20


def map_memory(fd: int, num_values: int) -> tuple[Values, Values]:
    """What goes in and what comes out, both float32 [num_values], in the memory shared with the parent."""
    memory = mmap.mmap(fd, 2 * 4 * num_values)
    both = np.frombuffer(memory, np.float32)
    return both[:num_values], both[num_values:]


class Service:
    """Does what the parent asks.

    Args:
        averager: serving already.
        writer: to the parent.
    """

    def __init__(self, averager: SumAverager, writer: asyncio.StreamWriter) -> None:
        self._averager, self._writer = averager, writer
        self._round: asyncio.Task[None] | None = None
        self._round_id = 0

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Until the parent closes the socket."""
        while line := await reader.readline():
            request = json.loads(line)
            if request["do"] == "cancel":
                if request["id"] == self._round_id and self._round is not None:
                    self._round.cancel()
            elif request["do"] == "sum":
                await self.end_round()
                self._round_id = request["id"]
                self._round = asyncio.create_task(self._answer(request))

    async def end_round(self) -> None:
        """Gives up the round under way, if there is one, and waits until it touches nothing any more."""
        if self._round is None:
            return
        self._round.cancel()
        _, stuck = await asyncio.wait({self._round}, timeout=END_TIMEOUT.total_seconds())
        if stuck:
            raise RuntimeError("a round does not end")

    async def _answer(self, request: dict[str, Any]) -> None:
        started = time.monotonic()
        answer: dict[str, Any]
        try:
            done = await self._sum(request)
            answer = {"num_microbatches": done.num_microbatches, "digest": done.digest}
            answer |= {"bytes_sent": done.bytes_sent, "bytes_received": done.bytes_received}
        except AveragingFailed as failure:
            answer = {"reason": failure.reason.value, "cause": failure.cause}
        except asyncio.CancelledError:
            answer = {"reason": Reason.TIMED_OUT.value, "cause": "given up"}
        except Exception as error:  # noqa: BLE001 - whatever hivemind raises, the round is void and the parent is told
            answer = {"reason": Reason.EXCHANGE_FAILED.value, "cause": f"{type(error).__name__}: {error}"}
        answer |= {"id": request["id"], "seconds": time.monotonic() - started}
        self._writer.write(json.dumps(answer).encode() + b"\n")

    async def _sum(self, request: dict[str, Any]) -> Sum:
        members = [Member.parse(text) for text in request["members"]]
        work = asyncio.create_task(self._averager.sum(request["key"], members, request["count"]))
        work.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # of a round given up: seen
        try:
            # Not asyncio.timeout: hivemind turns a cancellation inside it into errors of its own.
            await asyncio.wait({work}, timeout=request["timeout_seconds"])
        finally:
            in_time = work.done()
            if not in_time:
                work.cancel()
                await asyncio.wait({work}, timeout=END_TIMEOUT.total_seconds())
        if in_time:
            return work.result()
        awaited = sorted(self._averager.awaited.items())
        missing = ", ".join(f"{peer} ({how})" for peer, how in awaited) or "nobody, but the exchange did not end"
        raise AveragingFailed(Reason.TIMED_OUT, f"{request['timeout_seconds']:.3g} s; missing: {missing}")


async def start_p2p(settings: Settings) -> Any:
    """hivemind's network daemon, with its sockets in our folder; the kernel ends it with us.

    It knows no other peer: members are called at the addresses given with each round.
    """
    listen = with_checked_port(Listen(settings.host, settings.announce, settings.port))
    announced = None if listen.announce == listen.host else [multiaddress(listen.announce, listen.port)]
    key_file = Path(settings.folder) / "identity.key"
    write_key_file(key_file, bytes.fromhex(settings.seed))
    P2P._UNIX_SOCKET_PREFIX = f"/unix{settings.folder}/"
    try:
        with _children_die_with_us():
            return await P2P.create(
                host_maddrs=[multiaddress(listen.host, listen.port)],
                announce_maddrs=announced,
                identity_path=str(key_file),
                check_if_identity_free=False,
                dht_mode="client",
                startup_timeout=60,
                use_relay=False,
                use_auto_relay=False,
                auto_nat=False,
                nat_port_map=False,
            )
    finally:
        key_file.unlink(missing_ok=True)


@contextlib.contextmanager
def _children_die_with_us() -> Iterator[None]:
    """hivemind starts its daemon without a word to the kernel: this adds it, in this process of a single purpose."""
    start = asyncio.subprocess.create_subprocess_exec
    bind = partial(children.be_killed_with_parent, os.getpid())

    async def start_bound(*command: str, **options: Any) -> asyncio.subprocess.Process:
        return await start(*command, **options, preexec_fn=bind)

    with mock.patch.object(asyncio.subprocess, "create_subprocess_exec", start_bound):
        yield


async def run(settings: Settings) -> None:
    """Serves until the parent is gone; raises what keeps it from starting."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=settings.socket_fd), limit=MAX_LINE_BYTES)
    try:
        require_known_hivemind()
        p2p = await start_p2p(settings)
        values, total = map_memory(settings.memory_fd, settings.num_values)
        averager = SumAverager(p2p, values, total, Wire(settings.wire))
        await averager.serve()
        hello = {"peer_id": p2p.peer_id.to_base58(), "address": await averager.addresses()}
    except Exception as error:
        writer.write(json.dumps({"id": 0, "cause": f"{type(error).__name__}: {error}"}).encode() + b"\n")
        await writer.drain()
        raise
    writer.write(json.dumps({"id": 0, **hello}).encode() + b"\n")
    service = Service(averager, writer)
    with contextlib.suppress(ConnectionError):
        await service.serve(reader)
    await p2p.shutdown()


def serve(settings: Settings) -> NoReturn:
    """Makes this process the averaging process, until the parent is gone; it has no other life after that."""
    folder = Path(settings.folder)
    children.die_with_parent(settings.parent_pid, folder)
    for descriptor in settings.descriptors:
        os.set_inheritable(descriptor, False)  # not the daemon's
    torch.set_num_threads(1)
    torch.multiprocessing.set_sharing_strategy("file_descriptor")  # type: ignore[no-untyped-call]
    _keep_quiet()
    try:
        uvloop.run(run(settings))
    except Exception as error:  # noqa: BLE001 - told to the parent, and here to whoever reads the log
        print(f"averaging process: {type(error).__name__}: {error}", file=sys.stderr, flush=True)  # noqa: T201
    finally:
        children.kill_all(children.descendants_of(os.getpid()))
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(0)  # threads of a stuck round shall not keep it


def _keep_quiet() -> None:
    """This process runs hivemind's code alone: its warnings, and what it leaves unawaited, are not ours to heed."""
    warnings.simplefilter("ignore")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    if "HIVEMIND_LOGLEVEL" not in os.environ:  # failed rounds are told to the parent
        logging.getLogger("hivemind").setLevel(logging.CRITICAL)
        os.environ.setdefault("GOLOG_LOG_LEVEL", "FATAL")  # of its daemon


def main() -> None:
    serve(Settings.from_json(sys.argv[1]))


if __name__ == "__main__":
    main()
