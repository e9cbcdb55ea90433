"""Under which address this machine is to be dialled."""

from __future__ import annotations

import socket

ANY = ("0.0.0.0", "::", "")


def announced_host(listen_host: str, announce: str) -> str:
    """The address to publish: what the person said, else what we listen on, else this machine's outward address."""
    if announce:
        return announce
    return outward_address() if listen_host in ANY else listen_host


def outward_address() -> str:
    """The local address that packets to the internet leave from; loopback on a machine without a network.

    Connecting a UDP socket sends nothing: it only asks the routing table.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1: an address that is nobody's
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
