"""Where to listen: refused with a reason before any process is started."""

from __future__ import annotations

import socket

import pytest

from coordinator.errors import PortTaken
from coordinator.listening import Listen, multiaddress, with_checked_port


def test_a_taken_port_and_a_foreign_address_are_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(PortTaken, match="in use"):
        with_checked_port(Listen("127.0.0.1", "127.0.0.1", taken.getsockname()[1]))
    with pytest.raises(PortTaken):
        with_checked_port(Listen("203.0.113.7", "203.0.113.7", 0))


def test_a_port_is_picked_only_where_others_must_be_told_it() -> None:
    assert with_checked_port(Listen("127.0.0.1", "127.0.0.1", 0)).port == 0
    assert with_checked_port(Listen("127.0.0.1", "", 0)) == Listen("127.0.0.1", "127.0.0.1", 0)
    announced = with_checked_port(Listen("0.0.0.0", "peer.example", 0))
    assert (announced.host, announced.announce, announced.port > 0) == ("0.0.0.0", "peer.example", True)


@pytest.mark.parametrize(
    ("host", "text"),
    [
        ("203.0.113.7", "/ip4/203.0.113.7/tcp/4000"),
        ("2001:db8::1", "/ip6/2001:db8::1/tcp/4000"),
        ("peer.example", "/dns4/peer.example/tcp/4000"),
    ],
)
def test_multiaddresses(host: str, text: str) -> None:
    assert multiaddress(host, 4000) == text
