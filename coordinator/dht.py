"""hivemind's DHT behind one small seam: start it, store signed bytes, read them back, stop it, leave nothing behind.

The DHT is a forked child process with a network daemon (p2pd) below it. This process talks to it through one pipe that
hivemind does not lock, so every request is sent from one thread; answers come back on their own and in any order.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shutil
import signal
import socket
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from coordinator import children
from coordinator.errors import ClockSkew, DirectoryLost, PortTaken, SwarmError, TicketUnreachable
from coordinator.hivemind_parts import DHT, P2P, DHTNode
from coordinator.identity import write_key_file
from coordinator.validator import SignedRecordValidator

START_TIMEOUT = timedelta(seconds=60)
REQUEST_TIMEOUT = timedelta(seconds=15)
STOP_TIMEOUT = timedelta(seconds=3)
KILL_TIMEOUT = timedelta(seconds=1)
_KEY_FILE = "dht_identity.key"

Found = dict[str, dict[str, bytes]]
"""By key: by subkey: the stored bytes."""


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


class _DhtProcess(DHT):  # type: ignore[misc]  # hivemind has no types
    """hivemind's DHT process, which from its first moment on does not outlive its parent."""

    def __init__(self, scratch: Path, **settings: Any) -> None:
        super().__init__(start=False, **settings)
        self._scratch = scratch

    def run(self) -> None:
        children.die_with_parent(self._parent_pid, self._scratch)
        warnings.simplefilter("ignore")  # this process runs hivemind's code alone; its warnings are not ours to heed
        P2P._UNIX_SOCKET_PREFIX = f"/unix{self._scratch}/"  # so that leftovers have one known place
        try:
            super().run()
        finally:
            # hivemind forgets its daemon when joining fails after the daemon's start.
            children.kill_all(children.descendants_of(os.getpid()))

    def launch(self, timeout: timedelta) -> None:
        """Forks and waits until the DHT has joined; unlike hivemind's own wait, notices a dead process and the time."""
        self.start()
        self._inner_pipe.close()  # the child's end: with our copy open, writing to a dead child would block
        deadline = time.monotonic() + timeout.total_seconds()
        while True:
            try:
                self.wait_until_ready(timeout=0.2)
                return
            except TimeoutError as error:
                if not self.is_alive() or time.monotonic() > deadline:
                    raise DirectoryLost("the directory's process did not start") from error

    def stop(self) -> None:
        """Asks, then forces. Nothing of the process is left afterwards."""
        with contextlib.suppress(OSError):  # a broken pipe: it is gone already
            self.shutdown()
        self.join(KILL_TIMEOUT.total_seconds())
        if self.is_alive():
            self.kill()
            self.join(KILL_TIMEOUT.total_seconds())
        shutil.rmtree(self._scratch, ignore_errors=True)


async def _read(_dht: DHT, node: DHTNode, *, keys: Collection[str]) -> Found:
    """Runs in the DHT's process: one search for all keys, for the newest of every subkey."""
    found = await node.get_many(keys, sufficient_expiration_time=float("inf"))
    return {
        key: {subkey: item.value for subkey, item in entry.value.items() if isinstance(item.value, bytes)}
        for key, entry in found.items()
        if entry is not None and isinstance(entry.value, dict)
    }


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the DHT listens and what it tells others. Port 0 means any free one."""

    host: str
    announce: str
    port: int


class Directory:
    """A running DHT peer. `start` in the main thread, before gRPC, CUDA and threads; the methods are asynchronous."""

    def __init__(self, dht: _DhtProcess, addresses: tuple[str, ...]) -> None:
        self._dht = dht
        self._request_timeout = REQUEST_TIMEOUT
        self._addresses = addresses
        self._daemons = children.descendants_of(dht.pid)
        self._sender = ThreadPoolExecutor(1, thread_name_prefix="dht-sender")
        self._stats: dict[str, RequestStats] = {}
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
        listen = _with_checked_port(listen)
        folder.mkdir(parents=True, exist_ok=True)
        key_file = folder / _KEY_FILE
        write_key_file(key_file, identity_seed)
        try:
            with _undisturbed_main_thread():
                dht = _start_process(key_file, listen, bootstrap, timeout)
                return cls(dht, _addresses_of(dht, timeout))
        finally:
            key_file.unlink(missing_ok=True)  # the daemon has read it

    @property
    def addresses(self) -> tuple[str, ...]:
        """Full multiaddresses, with peer id, at which others can join."""
        return self._addresses

    @property
    def request_stats(self) -> dict[str, RequestStats]:
        """By kind of request ("store", "get"): how many and how long."""
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

    def _send(self, call: Callable[..., Any]) -> Future[Any]:
        if not self.is_alive():
            raise DirectoryLost("the directory's process has stopped")
        answer: Future[Any] = call(return_future=True)
        return answer


def _start_process(key_file: Path, listen: Listen, bootstrap: Sequence[str], timeout: timedelta) -> _DhtProcess:
    announce = None if listen.announce == listen.host else [_multiaddress(listen.announce, listen.port)]
    dht = _DhtProcess(
        initial_peers=list(bootstrap),
        scratch=_make_scratch(),
        record_validators=[SignedRecordValidator()],
        shutdown_timeout=STOP_TIMEOUT.total_seconds(),
        host_maddrs=[_multiaddress(listen.host, listen.port)],
        announce_maddrs=announce,
        identity_path=str(key_file),
        check_if_identity_free=False,  # the check cannot read Ed25519 keys
        startup_timeout=timeout.total_seconds(),
        # A private swarm: nothing is dialled but the given addresses and the peers known there.
        use_ipfs=False,
        use_relay=False,
        use_auto_relay=False,
        auto_nat=False,
        nat_port_map=False,
    )
    try:
        dht.launch(timeout)
    except BaseException as error:  # Ctrl+C too must not leave the process behind
        dht.stop()
        if not isinstance(error, Exception):
            raise
        raise _start_error(error, listen, bootstrap) from error
    return dht


def _make_scratch() -> Path:
    """A folder for the daemon's sockets; a Unix socket's path may not be longer than 107 characters."""
    folder = Path(tempfile.mkdtemp(prefix="resbm-dht-"))
    if len(str(folder)) <= 60:
        return folder
    folder.rmdir()
    return Path(tempfile.mkdtemp(prefix="resbm-dht-", dir="/tmp"))


def _start_error(error: Exception, listen: Listen, bootstrap: Sequence[str]) -> SwarmError:
    """What a failed start means, from hivemind's words for it: it has no types for them."""
    words = str(error)
    if isinstance(error, SwarmError):
        return error
    if "local time must be within" in words:
        return ClockSkew("this machine's clock differs from the swarm's by more than 3 s")
    if "failed to listen" in words or "address already in use" in words:
        return PortTaken(f"cannot listen on {listen.host} port {listen.port}: {words[:200]}")
    if bootstrap:
        return TicketUnreachable(f"nobody answers at {', '.join(bootstrap)} ({words[:200]})")
    return DirectoryLost(f"the directory's process did not start: {words[:200]}")


def _addresses_of(dht: _DhtProcess, timeout: timedelta) -> tuple[str, ...]:
    answer = dht.run_coroutine(partial(DHT._get_visible_maddrs, latest=True), return_future=True)
    addresses = [str(address) for address in answer.result(timeout.total_seconds())]
    reachable = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return tuple(reachable or addresses)


def _with_checked_port(listen: Listen) -> Listen:
    """Tries the port before the daemon does, for an error that says why; picks one where others must be told it."""
    family, address = _resolved(listen.host, listen.port)
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise PortTaken(f"cannot listen on {listen.host} port {listen.port}: {error.strerror}") from error
        free_port = int(probe.getsockname()[1])
    host = str(address[0])
    announce = host if listen.announce in ("", listen.host) else listen.announce
    listen = replace(listen, host=host, announce=announce)
    return listen if listen.announce == listen.host else replace(listen, port=free_port)


def _resolved(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise PortTaken(f"{host!r} is no address of this machine: {error.strerror}") from error
    return family, address


def _multiaddress(host: str, port: int) -> str:
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns4"
    return f"/{kind}/{host}/tcp/{port}"


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
