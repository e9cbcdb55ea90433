"""The DHT's process: hivemind, forked, with every setting that a private swarm needs, and its end."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from coordinator import children
from coordinator.errors import ClockSkew, DirectoryLost, PortTaken, SwarmError, TicketUnreachable
from coordinator.hivemind_parts import DHT, DHTID, P2P
from coordinator.listening import Listen, multiaddress
from coordinator.validator import SignedRecordValidator

STOP_TIMEOUT = timedelta(seconds=3)
KILL_TIMEOUT = timedelta(seconds=1)


class DhtProcess(DHT):  # type: ignore[misc]  # hivemind has no types
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


def start_process(
    key_file: Path, peer_id: str, listen: Listen, bootstrap: Sequence[str], timeout: timedelta
) -> DhtProcess:
    """`peer_id`: that of the key. Whoever starts again is the node it was, instead of leaving a dead one behind.

    To the others it is not new then, so they hand nothing over: it holds what is stored from now on.
    """
    announce = None if listen.announce == listen.host else [multiaddress(listen.announce, listen.port)]
    dht = DhtProcess(
        initial_peers=list(bootstrap),
        node_id=DHTID.generate(source=peer_id),
        scratch=_make_scratch(),
        record_validators=[SignedRecordValidator()],
        shutdown_timeout=STOP_TIMEOUT.total_seconds(),
        host_maddrs=[multiaddress(listen.host, listen.port)],
        announce_maddrs=announce,
        identity_path=str(key_file),
        check_if_identity_free=False,  # the check cannot read Ed25519 keys
        startup_timeout=timeout.total_seconds(),
        # A private swarm: nothing is dialled but the given addresses and the peers known there.
        use_ipfs=False,
        # Entries change all the time and every read wants the newest of each, so a copy never spares a search: it would
        # only make other peers answer with it.
        cache_locally=False,
        cache_on_store=False,
        cache_nearest=0,
        cache_refresh_before_expiry=0,
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


def addresses_of(dht: DhtProcess, timeout: timedelta) -> tuple[str, ...]:
    answer = dht.run_coroutine(partial(DHT._get_visible_maddrs, latest=True), return_future=True)
    addresses = [str(address) for address in answer.result(timeout.total_seconds())]
    reachable = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return tuple(reachable or addresses)


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
