"""hivemind's DHT behind one small seam: start it, store signed bytes, read them back, stop it, leave nothing behind.

The DHT is a forked child process with a network daemon (p2pd) below it. This process talks to it through one pipe that
hivemind does not lock, so every request is sent from one thread; answers come back on their own and in any order.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from coordinator import children
from coordinator.dht_process import DhtProcess, addresses_of, start_process
from coordinator.errors import DirectoryLost, SwarmError
from coordinator.hivemind_parts import DHT, DHTNode, split_address
from coordinator.identity import peer_id_of, public_key_of, write_key_file
from coordinator.listening import Listen, with_checked_port

START_TIMEOUT = timedelta(seconds=60)
REQUEST_TIMEOUT = timedelta(seconds=15)
CALL_TIMEOUT = timedelta(seconds=5)  # for one peer to answer a call
_KEY_FILE = "dht_identity.key"

Found = dict[str, dict[str, bytes]]
"""By key: by subkey: the stored bytes."""

RequestListener = Callable[[str, float, bool], None]
"""Told of a request that has ended: its kind ("store", "get", "call"), the seconds it took, whether it failed."""


@dataclass(frozen=True, slots=True)
class RequestStats:
    """Requests of one kind to the directory, since the start."""

    count: int = 0
    failures: int = 0
    seconds_total: float = 0.0
    seconds_max: float = 0.0

    def with_request(self, seconds: float, *, failed: bool) -> RequestStats:
        """The same, with one request more."""
        return RequestStats(
            self.count + 1, self.failures + failed, self.seconds_total + seconds, max(self.seconds_max, seconds)
        )


async def _read(_dht: DHT, node: DHTNode, *, keys: Collection[str]) -> Found:
    """Runs in the DHT's process: one search for all keys, for the newest of every subkey."""
    found = await node.get_many(keys, sufficient_expiration_time=float("inf"))
    return {
        key: {subkey: item.value for subkey, item in entry.value.items() if isinstance(item.value, bytes)}
        for key, entry in found.items()
        if entry is not None and isinstance(entry.value, dict)
    }


async def _call(_dht: DHT, node: DHTNode, *, addresses: Collection[str]) -> int:
    """Runs in the DHT's process: afterwards this node and those who answer are in each other's routing tables."""
    return sum(await asyncio.gather(*(_answers(node, address) for address in addresses)))


async def _answers(node: DHTNode, address: str) -> bool:
    try:
        peer, where = split_address(address)
        async with asyncio.timeout(CALL_TIMEOUT.total_seconds()):
            await node.p2p._client.connect(peer, [where])
            return await node.protocol.call_ping(peer) is not None
    except Exception:  # noqa: BLE001 - an address that is none, nobody there, somebody else there: all the same here
        return False


class Directory:
    """A running DHT peer. `start` in the main thread, before gRPC, CUDA and threads; the methods are asynchronous."""

    def __init__(self, dht: DhtProcess, addresses: tuple[str, ...]) -> None:
        self._dht = dht
        self._request_timeout = REQUEST_TIMEOUT
        self._addresses = addresses
        self._daemons = children.descendants_of(dht.pid)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="dht-sender")
        self._stats: dict[str, RequestStats] = {}
        self._listener: RequestListener | None = None
        self._closed = False

    @classmethod
    def start(
        cls,
        *,
        identity_seed: bytes,
        listen: Listen,
        bootstrap: Sequence[str],
        folder: Path,
        timeout: timedelta = START_TIMEOUT,
    ) -> Directory:
        """Forks the DHT's process and waits until it has joined.

        Raises:
            TicketUnreachable: none of the bootstrap addresses answers.
            PortTaken: this machine cannot listen there.
            ClockSkew: this machine's clock is too far from the swarm's.
            DirectoryLost: the process does not start for another reason.
        """
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("the directory forks: start it in the main thread")
        listen = with_checked_port(listen)
        folder.mkdir(parents=True, exist_ok=True)
        key_file = folder / _KEY_FILE
        write_key_file(key_file, identity_seed)
        peer_id = peer_id_of(public_key_of(identity_seed))
        try:
            with _undisturbed_main_thread():
                dht = start_process(key_file, peer_id, listen, bootstrap, timeout)
                return cls(dht, addresses_of(dht, timeout))
        finally:
            key_file.unlink(missing_ok=True)  # the daemon has read it

    @property
    def addresses(self) -> tuple[str, ...]:
        """Full multiaddresses, with peer id, at which others can join."""
        return self._addresses

    def on_request(self, listener: RequestListener) -> None:
        """Who is told of each request from now on, on the event loop."""
        self._listener = listener

    @property
    def request_stats(self) -> dict[str, RequestStats]:
        """By kind of request ("store", "get", "call"): how many and how long."""
        return dict(self._stats)

    def is_alive(self) -> bool:
        """Whether the DHT's process and its network daemon run."""
        return not self._closed and bool(self._dht.is_alive()) and all(map(children.is_running, self._daemons))

    async def store(self, key: str, subkey: str, value: bytes, *, expires_at: float) -> bool:
        """Stores on the peers nearest to the key. False: some of them hold a newer value or refused this one.

        Raises:
            DirectoryLost: the DHT is gone or did not answer in time.
        """
        return bool(await self._request("store", partial(self._dht.store, key, value, expires_at, subkey=subkey)))

    async def get(self, keys: Collection[str]) -> Found:
        """The newest values of all subkeys of some keys; keys that nobody knows are absent.

        Raises:
            DirectoryLost: the DHT is gone or did not answer in time.
        """
        found: Found = await self._request("get", partial(self._dht.run_coroutine, partial(_read, keys=keys)))
        return found

    async def call(self, addresses: Collection[str]) -> int:
        """Looks for peers at their full multiaddresses; how many answer.

        hivemind forgets whoever does not answer for three seconds, and calls nobody of its own accord: a node whose
        network was away for a moment may know nobody afterwards, and be known to nobody.

        Raises:
            DirectoryLost: the DHT is gone or did not answer in time.
        """
        return int(await self._request("call", partial(self._dht.run_coroutine, partial(_call, addresses=addresses))))

    def close(self) -> None:
        """Stops the DHT and makes sure that none of its processes is left. Blocks up to seconds; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._dht.stop()
        children.kill_all(self._daemons)

    async def _request(self, kind: str, call: Callable[..., Any]) -> Any:
        started = time.monotonic()
        failed = True
        try:
            async with asyncio.timeout(self._request_timeout.total_seconds()):
                answer = await asyncio.get_running_loop().run_in_executor(self._sender, self._send, call)
                result = await asyncio.shield(asyncio.wrap_future(answer))
            failed = False
            return result
        except TimeoutError as error:
            raise DirectoryLost(
                f"the directory did not answer within {self._request_timeout.total_seconds():g} s"
            ) from error
        except SwarmError:
            raise
        except Exception as error:  # whatever hivemind raises, in its process or here, means the same to the caller
            raise DirectoryLost(f"the directory failed: {error}") from error
        finally:
            seconds = time.monotonic() - started
            self._stats[kind] = self._stats.get(kind, RequestStats()).with_request(seconds, failed=failed)
            if self._listener is not None:
                self._listener(kind, seconds, failed)

    def _send(self, call: Callable[..., Any]) -> Future[Any]:
        if not self.is_alive():
            raise DirectoryLost("the directory's process has stopped")
        answer: Future[Any] = call(return_future=True)
        return answer


@contextlib.contextmanager
def _undisturbed_main_thread() -> Iterator[None]:
    """Undoes and silences what starting hivemind does to the main thread beside forking."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.set_event_loop(None)  # hivemind's futures would make a loop of their own and never close it
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*fork", category=DeprecationWarning)
            yield
    finally:
        signal.signal(signal.SIGINT, handler)
