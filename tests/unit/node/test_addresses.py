"""The address that a peer publishes."""

from __future__ import annotations

import ipaddress
import socket

import pytest

from node.addresses import ANY, announced_host, outward_address


def test_what_a_person_says_goes_first() -> None:
    for listen in (*ANY, "127.0.0.1", "10.0.0.7"):
        assert announced_host(listen, "peer.example.org") == "peer.example.org"


@pytest.mark.parametrize("listen", ["127.0.0.1", "10.0.0.7", "::1", "peer.example.org"])
def test_a_single_address_that_we_listen_on_is_announced(listen: str) -> None:
    assert announced_host(listen, "") == listen


@pytest.mark.parametrize("listen", ANY)
def test_listening_everywhere_announces_the_outward_address(listen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("node.addresses.outward_address", lambda: "198.51.100.7")
    assert announced_host(listen, "") == "198.51.100.7"


def test_the_outward_address_can_be_dialled_and_is_this_machines_own() -> None:
    address = outward_address()
    assert not ipaddress.ip_address(address).is_unspecified
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen()
        with socket.create_connection(listener.getsockname(), timeout=5):
            pass


def test_a_machine_without_a_network_is_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNetwork(socket.socket):
        def connect(self, address: object) -> None:
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("node.addresses.socket.socket", NoNetwork)
    assert outward_address() == "127.0.0.1"
