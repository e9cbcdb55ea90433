"""The WAN lab's pure parts: shapes, the file of links, and the commands that a shape becomes."""

from __future__ import annotations

import struct
import tomllib
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from node.errors import ConfigInvalid, ConfigUnreadable, ToolMissing
from node.lab import delayer, shaping, up
from node.lab.links import Links, parse_links, read_links
from node.lab.namespaces import NamespaceLab
from node.lab.shapes import UNSHAPED, InterfaceCounters, LinkShape
from node.lab.tools import require

DOCKER = Path(__file__).parents[3] / "docker"
PRESETS = Path(__file__).parents[3] / "node" / "presets"


@pytest.mark.parametrize(
    "values",
    [
        {"rate_mbit": 0},
        {"rate_mbit": -1},
        {"rate_mbit": float("nan")},
        {"rate_mbit": 1e9},
        {"delay_ms": -1},
        {"delay_ms": 60_000},
        {"loss": 1},
        {"loss": -0.1},
        {"jitter_ms": 3},
        {"rate_mbit": "fast"},
    ],
)
def test_links_that_cannot_be_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LinkShape.model_validate(values)


def test_a_round_trip_is_shared_by_both_ends() -> None:
    assert LinkShape.of_round_trip(10, 50) == LinkShape(rate_mbit=10, delay_ms=25)
    assert str(LinkShape.of_round_trip(10, 50, 0.01)) == "10 Mbit/s, 25 ms one way, 1 % loss"


def test_counters_tell_what_crossed_since() -> None:
    earlier = InterfaceCounters(rx_bytes=1, tx_bytes=2, rx_packets=3, tx_packets=4)
    later = InterfaceCounters(rx_bytes=11, tx_bytes=22, rx_packets=33, tx_packets=44)
    assert later.since(earlier) == InterfaceCounters(rx_bytes=10, tx_bytes=20, rx_packets=30, tx_packets=40)


def test_a_peer_has_the_default_link_but_for_what_its_own_table_says() -> None:
    links = parse_links(
        {"default": {"rate_mbit": 80, "delay_ms": 50}, "peers": {"peer2": {"rate_mbit": 20}}}, "lab.toml"
    )
    assert links.of("peer1") == LinkShape(rate_mbit=80, delay_ms=50)
    assert links.of("peer2") == LinkShape(rate_mbit=20, delay_ms=50)
    assert Links().of("anyone") == UNSHAPED


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"default": {"rate": 80}}, "default.rate"),
        ({"peers": {"peer2": {"loss": 2}}}, "peers.peer2.loss"),
        ({"peers": {"peer2": 7}}, "peers.peer2"),
        ({"peers": 7}, "peers"),
        ({"default": 7}, "default"),
        ({"peer": {}}, "peer"),
    ],
)
def test_a_mistake_in_the_file_of_links_is_named(values: dict[str, object], named: str) -> None:
    with pytest.raises(ConfigInvalid, match=rf"lab\.toml: .*{named}\b"):
        parse_links(values, "lab.toml")


@pytest.mark.parametrize("content", [b"rate = = 80", b"\xff\xfe", None])
def test_an_unreadable_file_of_links_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "lab.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigUnreadable, match=r"lab\.toml"):
        read_links(path)


def test_the_shipped_links_are_80_mbit_and_100_ms() -> None:
    links = read_links(DOCKER / "lab.toml")
    assert {links.of(name) for name in up.NODES} == {LinkShape.of_round_trip(80, 100)}


def test_the_lab_trains_the_demos_model() -> None:
    """And sends as little: what the dashboards show there is the project's promise."""
    lab = tomllib.loads((DOCKER / "run.toml").read_text())
    demo = tomllib.loads((PRESETS / "demo.toml").read_text())
    assert (lab["stages"], lab["model"], lab["bottleneck"]) == (demo["stages"], demo["model"], demo["bottleneck"])


def test_the_compose_file_has_the_services_that_make_lab_starts() -> None:
    compose = yaml.safe_load((DOCKER / "compose.yaml").read_text())
    assert set(compose["services"]) == {*up.NODES, *up.PORTS}
    assert compose["services"]["prometheus"]["image"] == up.PROMETHEUS
    assert compose["services"]["grafana"]["image"] == up.GRAFANA
    assert f"FROM {up.PYTHON}\n" in (DOCKER / "Dockerfile").read_text()
    for name in up.NODES:
        service = compose["services"][name]
        assert service["cap_drop"] == ["ALL"]
        assert service["hostname"] == name, "a peer finds its link in lab.toml by its host name"


@pytest.mark.parametrize(
    "names", [[], ["p0", "p0"], ["P0"], ["hub"], ["p 0"], ["../p0"], ["p" * 40], [f"p{n}" for n in range(1001)]]
)
def test_names_that_no_namespace_can_have_are_refused(names: list[str]) -> None:
    with pytest.raises(ConfigInvalid, match="different names"):
        NamespaceLab(names, UNSHAPED)


def test_every_peer_of_a_lab_needs_a_shape() -> None:
    with pytest.raises(ConfigInvalid, match="shapes are given for p0 and peers are p0, p1"):
        NamespaceLab(["p0", "p1"], {"p0": UNSHAPED})


def test_addresses_are_valid_and_differ() -> None:
    names = [f"p{number}" for number in range(1000)]
    lab = NamespaceLab(names, UNSHAPED)
    addresses = [lab.address(name) for name in names]
    assert len(set(addresses)) == len(names)
    assert all(0 <= int(part) <= 255 for address in addresses for part in address.split("."))
    assert not [address for address in addresses if address in ("10.77.0.0", "10.77.255.255")]


def test_a_rate_is_set_once_and_then_changed_in_place() -> None:
    first = list(shaping.htb_commands("eth0", 2.5, "bfifo limit 1", present=False))
    assert first == [
        "tc qdisc add dev eth0 root handle 1: htb default 1",
        "tc class replace dev eth0 parent 1: classid 1:1 htb rate 2500000bit ceil 2500000bit quantum 15000",
        "tc qdisc replace dev eth0 parent 1:1 handle 10: bfifo limit 1",
    ]
    again = list(shaping.htb_commands("eth0", 2.5, "bfifo limit 1", present=True))
    assert again == [first[1].replace("add", "change"), first[2]]


def test_buffers_hold_a_fifth_of_a_second_and_never_less_than_a_batch_of_segments() -> None:
    assert shaping.buffer_bytes(80) == 80e6 / 8 / 5
    assert shaping.buffer_bytes(0.1) == 1 << 17


def test_netem_has_room_for_what_its_delay_keeps_under_way() -> None:
    assert shaping.netem(LinkShape(rate_mbit=12.112, delay_ms=800)) == "netem limit 2000 delay 800ms"
    assert shaping.netem(LinkShape(rate_mbit=12.112, delay_ms=800, loss=0.015)).endswith(" delay 800ms loss 1.5%")


def test_packets_are_lost_before_they_are_delayed() -> None:
    """A lost packet must not take room in the queue; and a link without loss or delay has no rule."""
    drop, delay = shaping.packet_rules("eth0", 0.01, 2).splitlines()[2:4]
    assert "--probability 0.010000000 -j DROP" in drop
    assert delay.endswith("-j NFQUEUE --queue-num 2 --queue-bypass")
    assert "-A" not in shaping.packet_rules("eth0", 0.0, None)


def test_one_verdict_lets_through_all_up_to_a_packet() -> None:
    length, kind, flags, _, _ = struct.unpack_from("=IHHII", verdict := delayer.release(7, 0x01020304))
    assert (length, kind, flags) == (len(verdict), 0x303, 1)
    assert verdict[16:20] == b"\0\0\0\x07"  # family, version, queue
    assert verdict[20:] == b"\x0c\0\x02\0" + b"\0\0\0\x01" + b"\x01\x02\x03\x04"  # accept, packet id


def test_only_packets_have_a_packet_id() -> None:
    packet = delayer.message(0x300, 1, delayer.attribute(1, struct.pack(">IHB", 77, 0x0800, 0)))
    assert delayer.packet_id_of(packet) == 77
    assert delayer.packet_id_of(struct.pack("=IHHIIi", 20, 2, 0, 0, 0, -2)) is None  # an error message


def test_a_missing_tool_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolMissing, match="the program tc is not on the PATH") as raised:
        require("tc")
    assert "apt-get install iproute2" in raised.value.remedy
