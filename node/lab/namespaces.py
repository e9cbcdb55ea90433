"""A hub and its peers in network namespaces of one machine.

    resbm-<pid>-hub   bridge
                        │ │ │      veth pairs
    resbm-<pid>-p0    eth0 …       10.77.0.1/16, shaped; one namespace per peer

The machine's own namespace has no part in it: no address, route, rule or device of it is touched, and nothing in the
lab reaches the world outside. A lab belongs to the process that made it. While that lives it holds a lock; namespaces
whose owner is dead, by whatever signal, are removed by the next lab that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil

from coordinator.children import kill_all
from node.errors import ConfigInvalid, LabFailed
from node.lab.shapes import InterfaceCounters, LinkShape
from node.lab.shaping import DelayBy, Shaper
from node.lab.signals import ending_on_signals
from node.lab.tools import Tools, require, require_root

_LOCKS = Path("/run/resbm-lab")
_NAMESPACE = re.compile(r"resbm-(\d+)-\S+")
_PEER_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")
_MAX_PEERS = 1000  # ports of one Linux bridge: 1023
_HUB = "hub"
INTERFACE = "eth0"


class NamespaceLab:
    """Peers by name, each with an address and a shaped link. A context manager; needs root.

    Call it in the main thread. Everything is removed at the end: after an exception too, and after SIGTERM or SIGHUP,
    which raise SystemExit inside unless the program handles them itself.
    """

    def __init__(
        self, names: Sequence[str], shape: LinkShape | Mapping[str, LinkShape], delay_by: DelayBy = "auto"
    ) -> None:
        """`shape`: of every peer, or by name. Raises ConfigInvalid."""
        shapes = dict.fromkeys(names, shape) if isinstance(shape, LinkShape) else dict(shape)
        _require_names(names, shapes)
        self._names = tuple(names)
        self._shapes = shapes
        self._delay_by: DelayBy = delay_by
        self._shapers: dict[str, Shaper] = {}
        self._cleanup = contextlib.ExitStack()

    def __enter__(self) -> NamespaceLab:
        """Builds the lab.

        Raises:
            PrivilegeMissing, ToolMissing, KernelLacks: this machine cannot have one. Nothing is left behind.
            LabFailed: the system refused something, or this process has a lab already. Likewise.
        """
        require_root()
        require("ip", "tc")
        with contextlib.ExitStack() as cleanup:
            cleanup.enter_context(ending_on_signals())
            _own(cleanup)
            remove_stale()
            _remove(os.getpid())  # of a dead process that had our number
            cleanup.callback(_remove, os.getpid())
            self._build()
            cleanup.callback(self._clear)
            self._shape()
            self._cleanup = cleanup.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cleanup.close()

    @property
    def names(self) -> tuple[str, ...]:
        return self._names

    def address(self, name: str) -> str:
        """The peer's IPv4 address, known to all peers."""
        number = self._names.index(name) + 1
        return f"10.77.{number // 250}.{number % 250}"

    def command(self, name: str, argv: Sequence[str]) -> list[str]:
        """The command line that runs `argv` as that peer. `argv` replaces it: process id and signals are the same."""
        return ["ip", "netns", "exec", self._namespace(name), *argv]

    def reshape(self, name: str, shape: LinkShape) -> None:
        """Changes a peer's link while it is used; connections stay. Raises as `__enter__` does."""
        self._shapers[name].apply(shape)

    def counters(self, name: str) -> InterfaceCounters:
        """The kernel's counters of the peer's interface, from the lab's beginning."""
        shown = json.loads(self.tools(name).run(f"ip -json -statistics link show dev {INTERFACE}"))
        received, sent = shown[0]["stats64"]["rx"], shown[0]["stats64"]["tx"]
        return InterfaceCounters(
            rx_bytes=received["bytes"],
            tx_bytes=sent["bytes"],
            rx_packets=received["packets"],
            tx_packets=sent["packets"],
        )

    def shaping(self, name: str) -> str:
        """What shapes the peer's link, such as 'htb+netem' or 'htb+nfqueue'."""
        return self._shapers[name].mechanism

    def _namespace(self, name: str) -> str:
        return _namespace(os.getpid(), name)

    def tools(self, name: str) -> Tools:
        """Runs the system's network tools as that peer."""
        return Tools(self._namespace(name))

    def _build(self) -> None:
        outside, hub = Tools(), self.tools(_HUB)
        outside.run(f"ip netns add {hub.namespace}")
        hub.run("ip link add bridge0 type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
        hub.run("ip link set bridge0 addrgenmode none up")
        for number, name in enumerate(self._names, start=1):
            peer, port = self.tools(name), f"port{number}"
            outside.run(f"ip netns add {peer.namespace}")
            hub.run(f"ip link add {port} type veth peer name {INTERFACE} netns {peer.namespace}")
            hub.run(f"ip link set {port} master bridge0 addrgenmode none up")
            peer.run("ip link set lo up")
            peer.run(f"ip address add {self.address(name)}/16 dev {INTERFACE}")
            peer.run(f"ip link set {INTERFACE} addrgenmode none up")

    def _shape(self) -> None:
        for name in self._names:
            self._shapers[name] = shaper = Shaper(INTERFACE, self.tools(name), self._delay_by)
            shaper.apply(self._shapes[name])

    def _clear(self) -> None:
        for shaper in self._shapers.values():
            shaper.stop()
        self._shapers.clear()


def _own(cleanup: contextlib.ExitStack) -> None:
    try:
        cleanup.enter_context(_owning(os.getpid()))
    except BlockingIOError:
        raise LabFailed("this process has a lab already", remedy="leave the first lab before the second") from None


def remove_stale() -> list[str]:
    """Removes the namespaces of labs whose owner is dead, with the processes in them. Returns their names."""
    removed: list[str] = []
    for pid in sorted({pid for _, pid in _namespaces()} - {os.getpid()}):
        with contextlib.suppress(BlockingIOError), _owning(pid):
            removed += _remove(pid)
    return removed


def _require_names(names: Sequence[str], shapes: Mapping[str, LinkShape]) -> None:
    wrong = [name for name in names if not _PEER_NAME.fullmatch(name) or name == _HUB]
    if wrong or not 0 < len(names) <= _MAX_PEERS or len(set(names)) < len(names):
        raise ConfigInvalid(
            f"a lab needs 1 to {_MAX_PEERS} different names of small letters, digits and hyphens, other than "
            f"{_HUB!r}: {', '.join(names) or 'none was given'}",
            remedy="name the peers p0, p1 and so on",
        )
    if shapes.keys() != set(names):
        raise ConfigInvalid(
            f"shapes are given for {', '.join(shapes)} and peers are {', '.join(names)}",
            remedy="give each peer one shape",
        )


def _namespace(pid: int, name: str) -> str:
    return f"resbm-{pid}-{name}"


def _namespaces() -> Iterator[tuple[str, int]]:
    """(name, owner's process id) of every namespace of a lab."""
    listed: list[dict[str, Any]] = json.loads(Tools().run("ip -json netns list") or "[]")
    for entry in listed:
        if found := _NAMESPACE.fullmatch(entry["name"]):
            yield entry["name"], int(found[1])


def _remove(pid: int) -> list[str]:
    """Ends what runs in an owner's namespaces and deletes them; devices, queues and rules go with a namespace."""
    mine = [name for name, owner in _namespaces() if owner == pid]
    for name in mine:
        processes = list(_processes_in(name))
        kill_all(processes)
        psutil.wait_procs(processes, timeout=5)
        Tools().run(f"ip netns delete {name}")
    return mine


def _processes_in(namespace: str) -> Iterator[psutil.Process]:
    for number in Tools().run(f"ip netns pids {namespace}").split():
        with contextlib.suppress(psutil.NoSuchProcess):
            yield psutil.Process(int(number))


@contextlib.contextmanager
def _owning(pid: int) -> Iterator[None]:
    """Holds the lock of the lab of process `pid`; who dies lets go of it. Raises BlockingIOError: its owner lives."""
    _LOCKS.mkdir(mode=0o700, exist_ok=True)
    path = _LOCKS / str(pid)
    while True:
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (path.exists() and path.stat().st_ino == os.fstat(file.fileno()).st_ino):
                continue  # its last holder has just removed the file: take the new one
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
