"""What the kernel knows of this process's own TCP connections: round trips and rates, measured on every packet.

gRPC hides its sockets, but they are file descriptors of this process: each is duplicated for a moment and asked for
TCP_INFO (Linux). That costs microseconds, sends nothing and needs no right. Elsewhere there is nothing to tell.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
import stat
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stage_server.ledger import Side

_INFO_BYTES = 192  # linux/tcp.h up to and with tcpi_sndbuf_limited (Linux 4.10)
_ESTABLISHED = 1
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
        self.newest: Mapping[Side, LinkQuality] = {}

    def look(self, next_hop: str | None) -> Mapping[Side, LinkQuality]:
        """The quality of each link that is there. `next_hop`: "host:port" of the downstream peer, if it has one."""
        self.newest = link_qualities(open_connections(), self._service_port, next_hop)
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


def open_connections() -> Iterator[Connection]:
    """Established TCP connections of this process; none where the system has no TCP_INFO or no /proc."""
    if not hasattr(socket, "TCP_INFO"):
        return
    with contextlib.suppress(OSError):
        for entry in Path("/proc/self/fd").iterdir():
            connection = _connection(int(entry.name))
            if connection is not None:
                yield connection


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


def _connection(fd: int) -> Connection | None:
    """What a file descriptor is. It belongs to gRPC and may be closed or become another file at any moment."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return None
        with socket.socket(fileno=os.dup(fd)) as sock:
            if sock.family not in (socket.AF_INET, socket.AF_INET6) or sock.type != socket.SOCK_STREAM:
                return None
            remote_host, remote_port = sock.getpeername()[:2]
            local_port: int = sock.getsockname()[1]
            quality = parse_tcp_info(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256))
    except OSError:
        return None
    return None if quality is None else Connection(local_port, remote_host, remote_port, quality)


def _may_be(host: str, address: str) -> bool:
    """Whether an endpoint's host may have that address. A name may have any."""
    try:
        return _plain(host.strip("[]")) == _plain(address)
    except ValueError:
        return True


def _plain(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    parsed = ipaddress.ip_address(address)
    return (parsed.version == 6 and parsed.ipv4_mapped) or parsed
