"""What the kernel says of real connections, and which of them is which link."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from node.tcp_links import (
    LOOKS_AT_ALL,
    Connection,
    ConnectionFinder,
    LinkQuality,
    LinkWatch,
    link_qualities,
    parse_tcp_info,
)
from stage_server.work import Side

QUALITY = LinkQuality(0.1, 0.05, 1e6, 2.0, 0, num_bytes=100)
NUM_BYTES = 1 << 20


def connection(local: int, host: str, port: int, num_bytes: int = 100) -> Connection:
    return Connection(local, host, port, replace(QUALITY, num_bytes=num_bytes))


@contextmanager
def joined(family: socket.AddressFamily, address: str) -> Iterator[tuple[socket.socket, socket.socket]]:
    """(the end that dialled, the end that answered) of a connection that has carried NUM_BYTES."""
    with socket.create_server((address, 0), family=family) as listener:
        dialled = socket.create_connection(listener.getsockname()[:2])
        answered, _ = listener.accept()
    with dialled, answered:
        sender = threading.Thread(target=dialled.sendall, args=(b"x" * NUM_BYTES,))
        sender.start()
        left = NUM_BYTES
        while left:
            left -= len(answered.recv(65536))
        answered.sendall(b"thanks")
        assert dialled.recv(6)
        sender.join()
        yield dialled, answered


@pytest.mark.parametrize(
    ("family", "address"), [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")], ids=["ipv4", "ipv6"]
)
def test_both_ends_of_a_connection_are_measured(family: socket.AddressFamily, address: str) -> None:
    try:
        socket.create_server((address, 0), family=family).close()
    except OSError as error:
        pytest.skip(f"no {address} here: {error}")
    with joined(family, address) as (dialled, answered):
        port = answered.getsockname()[1]
        watch = LinkWatch(service_port=port)  # one process at both ends: it is its own neighbour
        found = watch.look(f"[{address}]:{port}" if family is socket.AF_INET6 else f"{address}:{port}")
        assert set(found) == set(Side)
        assert watch.newest == found
        sending = found[Side.DOWNSTREAM]
        assert sending.num_bytes == NUM_BYTES + len("thanks") + 1  # TCP counts the handshake as one
        assert 0 < sending.least_round_trip_seconds <= 1
        assert sending.bytes_per_second > 0
        assert dialled.fileno() >= 0  # looking closed nothing
    assert not LinkWatch(port).look(f"{address}:{port}")


def test_looking_leaves_no_file_open() -> None:
    with joined(socket.AF_INET, "127.0.0.1"):
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - one name too many either way
        finder = ConnectionFinder()
        for _ in range(3):
            assert finder.look()
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_connections_that_come_and_go_are_noticed() -> None:
    finder = ConnectionFinder()
    assert not finder.look()
    with joined(socket.AF_INET, "127.0.0.1") as (dialled, answered):
        ports = {dialled.getsockname()[1], answered.getsockname()[1]}
        assert {found.local_port for found in finder.look()} == ports
        assert {found.local_port for found in finder.look()} == ports
    assert not finder.look()


def test_a_number_that_became_a_connection_is_noticed_in_time() -> None:
    finder = ConnectionFinder()
    with joined(socket.AF_INET, "127.0.0.1") as (dialled, _):
        reader, writer = os.pipe()  # no socket, where a connection will be
        finder.look()
        os.dup2(dialled.fileno(), reader)
        looks = [len(finder.look()) for _ in range(LOOKS_AT_ALL)]
        assert looks == [2] * (LOOKS_AT_ALL - 1) + [3]
        os.close(reader)
        os.close(writer)


def test_links_are_told_by_port_and_address() -> None:
    links = link_qualities(
        [
            connection(4000, "198.51.100.1", 50000, num_bytes=10),  # somebody asked who is here
            connection(4000, "198.51.100.1", 50001, num_bytes=9000),
            connection(51000, "203.0.113.7", 4000, num_bytes=70),
            connection(51001, "203.0.113.8", 4000, num_bytes=9000),  # another peer with that port
            connection(51002, "203.0.113.7", 9100, num_bytes=9000),
        ],
        4000,
        "203.0.113.7:4000",
    )
    assert {side: link.num_bytes for side, link in links.items()} == {Side.UPSTREAM: 9000, Side.DOWNSTREAM: 70}


def test_gateways_write_ipv4_in_two_ways_and_names_may_be_any_address() -> None:
    mapped = [connection(51000, "::ffff:203.0.113.7", 4000)]
    assert Side.DOWNSTREAM in link_qualities(mapped, 1, "203.0.113.7:4000")
    assert Side.DOWNSTREAM in link_qualities(mapped, 1, "peer1:4000")
    assert not link_qualities(mapped, 1, None)


@pytest.mark.parametrize("info", [b"", b"\x01" * 100, b"\x08" + b"\0" * 255], ids=["none", "old kernel", "closing"])
def test_a_kernel_that_does_not_tell_is_not_believed(info: bytes) -> None:
    assert parse_tcp_info(info) is None


def test_a_connection_without_a_measurement_is_passed_over() -> None:
    info = bytearray(256)
    info[0] = 1
    info[148:152] = b"\xff" * 4
    assert parse_tcp_info(bytes(info)) is None
