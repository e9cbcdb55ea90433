"""What the kernel knows of this process's own TCP connections: round trips and rates, measured on every packet.

gRPC hides its sockets, but they are file descriptors of this process: each is duplicated for a moment and asked for
TCP_INFO (Linux). That costs microseconds, sends nothing and needs no right. Elsewhere there is nothing to tell.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from stage_server.work import Side

_INFO_BYTES = 192  # linux/tcp.h up to and with tcpi_sndbuf_limited (Linux 4.10)
_ESTABLISHED = 1
LOOKS_AT_ALL = 10  # every file of this process is asked what it is in one look of so many
_MICRO = 1e-6


@dataclass(frozen=True, slots=True)
class LinkQuality:
    """One TCP connection, as its sending side sees it."""

    round_trip_seconds: float  # smoothed, queues on the way included (tcpi_rtt)
    least_round_trip_seconds: float  # of the last five minutes (tcpi_min_rtt): queues were empty then
    bytes_per_second: float  # delivered (tcpi_delivery_rate): a lower bound unless the link was full; 0: none yet
    busy_seconds: float  # in which bytes were on the way or waited to be sent, since the connection opened
    retransmits: int  # segments, since the connection opened
    num_bytes: int  # acknowledged and received, since the connection opened


@dataclass(frozen=True, slots=True)
class Connection:
    """An open TCP connection of this process."""

    local_port: int
    remote_host: str
    remote_port: int
    quality: LinkQuality


class LinkWatch:
    """Finds the connections behind a peer's two links and tells their quality."""

    def __init__(self, service_port: int) -> None:
        """`service_port`: where this peer's own stage service listens."""
        self._service_port = service_port
        self._connections = ConnectionFinder()
        self.newest: Mapping[Side, LinkQuality] = {}

    def look(self, next_hop: str | None) -> Mapping[Side, LinkQuality]:
        """The quality of each link that is there. `next_hop`: "host:port" of the downstream peer, if it has one."""
        self.newest = link_qualities(self._connections.look(), self._service_port, next_hop)
        return self.newest


def link_qualities(
    connections: Iterable[Connection], service_port: int, next_hop: str | None
) -> dict[Side, LinkQuality]:
    """Which connection is which link. Where several fit, the one that has carried most: the others are short visits."""
    fitting: dict[Side, list[LinkQuality]] = {side: [] for side in Side}
    host, _, port = (next_hop or "").rpartition(":")
    for connection in connections:
        if connection.local_port == service_port:
            fitting[Side.UPSTREAM].append(connection.quality)
        elif port == str(connection.remote_port) and _may_be(host, connection.remote_host):
            fitting[Side.DOWNSTREAM].append(connection.quality)
    return {side: max(found, key=lambda link: link.num_bytes) for side, found in fitting.items() if found}


class ConnectionFinder:
    """Established TCP connections of this process; none where the system has no TCP_INFO or no /proc.

    Most files of a worker are no sockets and stay that for ever, and asking each of them every second costs more than
    the links' own status frames. So only those are asked that are new or were TCP the last time, and all of them now
    and then: a number may have been closed and given to a connection between two looks.
    """

    def __init__(self) -> None:
        self._known: frozenset[str] = frozenset()  # files at the last look, by number
        self._tcp: frozenset[str] = frozenset()  # those of them that were TCP sockets
        self._looks = 0

    def look(self) -> list[Connection]:
        """Those that there are now."""
        if not hasattr(socket, "TCP_INFO"):
            return []
        try:
            files = frozenset(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path of each is most of the cost
        except OSError:
            return []
        asked = files if self._looks % LOOKS_AT_ALL == 0 else (files - self._known) | (files & self._tcp)
        self._looks += 1
        found: list[Connection] = []
        tcp: list[str] = []
        for name in asked:
            with contextlib.suppress(OSError), _tcp_socket(int(name)) as sock:
                if sock is not None:
                    tcp.append(name)
                    found += _established(sock)
        self._known, self._tcp = files, frozenset(tcp)
        return found


def parse_tcp_info(info: bytes) -> LinkQuality | None:
    """Reads linux/tcp.h's struct tcp_info; None unless the connection is established and the kernel tells enough."""
    if len(info) < _INFO_BYTES or info[0] != _ESTABLISHED:
        return None
    (round_trip,) = struct.unpack_from("=I", info, 68)
    (retransmits,) = struct.unpack_from("=I", info, 100)
    acknowledged, received = struct.unpack_from("=QQ", info, 120)
    (least_round_trip,) = struct.unpack_from("=I", info, 148)
    delivery_rate, busy = struct.unpack_from("=QQ", info, 160)
    if least_round_trip == 0xFFFFFFFF:  # nothing measured yet
        return None
    return LinkQuality(
        round_trip_seconds=round_trip * _MICRO,
        least_round_trip_seconds=least_round_trip * _MICRO,
        bytes_per_second=float(delivery_rate),
        busy_seconds=busy * _MICRO,
        retransmits=retransmits,
        num_bytes=acknowledged + received,
    )


@contextlib.contextmanager
def _tcp_socket(fd: int) -> Iterator[socket.socket | None]:
    """What a file descriptor is, duplicated; None for anything but TCP. Raises OSError.

    It belongs to gRPC and may be closed or become another file at any moment.
    """
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        yield None
        return
    with socket.socket(fileno=os.dup(fd)) as sock:
        is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM
        yield sock if is_tcp else None


def _established(sock: socket.socket) -> list[Connection]:
    """The connection, if it is one that the kernel tells of. Raises OSError where it is not connected."""
    remote_host, remote_port = sock.getpeername()[:2]
    quality = parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    return [] if quality is None else [Connection(sock.getsockname()[1], remote_host, remote_port, quality)]


@functools.lru_cache(maxsize=64)
def _may_be(host: str, address: str) -> bool:
    """Whether an endpoint's host may have that address. A name may have any."""
    try:
        return _plain(host.strip("[]")) == _plain(address)
    except ValueError:
        return True


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    return (parsed.version == 6 and parsed.ipv4_mapped) or parsed
