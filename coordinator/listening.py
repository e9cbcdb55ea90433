"""Where a DHT peer listens and what it tells others."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, replace
from typing import Any

from coordinator.errors import PortTaken


@dataclass(frozen=True, slots=True)
class Listen:
    """Where the DHT listens and what it tells others. Port 0 means any free one."""

    host: str
    announce: str
    port: int


def with_checked_port(listen: Listen) -> Listen:
    """Tries the port before the daemon does, for an error that says why; picks one where others must be told it.

    Raises:
        PortTaken: the address is not this machine's, or the port is in use.
    """
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


def multiaddress(host: str, port: int) -> str:
    """The libp2p form of a host name or IP address and a TCP port."""
    try:
        kind = f"ip{ipaddress.ip_address(host).version}"
    except ValueError:
        kind = "dns4"
    return f"/{kind}/{host}/tcp/{port}"
