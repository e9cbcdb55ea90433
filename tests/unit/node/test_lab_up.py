"""`make lab` on a machine that cannot have one: one clear line with a remedy, before anything is started."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from node.errors import ConfigInvalid
from node.lab import up
from node.lab.host_network import undoing_docker
from node.lab.up import port_of

METRICS = Path(__file__).parents[3] / "docs" / "metrics.md"


def refusal(*arguments: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "node.lab.up", *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == "", "nothing was started"
    cause, remedy = done.stderr.splitlines()
    assert remedy.startswith("  remedy: ")
    return [cause, remedy.removeprefix("  remedy: ")]


def test_what_it_asks_prometheus_for_is_exported() -> None:
    """It says how far the run is; a metric with another name would only make it silent."""
    asked = set(re.findall(r"resbm_node_\w+", Path(up.__file__).read_text()))
    documented = set(re.findall(r"resbm_node_\w+", METRICS.read_text()))  # a test holds that page to what is exported
    assert asked
    assert asked <= documented


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        cause, remedy = refusal(RESBM_PROMETHEUS_PORT=free_port(), RESBM_GRAFANA_PORT=str(port))
    assert cause.startswith(f"error E105: port {port} of this machine, for grafana: Address already in use")
    assert "RESBM_GRAFANA_PORT=" in remedy


def test_one_port_for_both() -> None:
    port = free_port()
    cause, remedy = refusal(RESBM_PROMETHEUS_PORT=port, RESBM_GRAFANA_PORT=port)
    assert cause == f"error E102: prometheus and grafana are both to be at port {port}"
    assert "RESBM_PROMETHEUS_PORT=" in remedy


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_a_port_that_is_none(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("RESBM_PROMETHEUS_PORT", port)
    with pytest.raises(ConfigInvalid, match=f"RESBM_PROMETHEUS_PORT = '{port}' is no port"):
        port_of("prometheus")


def test_no_engine_and_no_way_to_install_one(tmp_path: Path) -> None:
    ports = {"RESBM_PROMETHEUS_PORT": free_port(), "RESBM_GRAFANA_PORT": free_port()}
    cause, remedy = refusal(PATH=str(tmp_path), **ports)
    assert cause.startswith("error E114: ")
    assert "docs.docker.com" in remedy


def test_nothing_to_remove_without_an_engine(tmp_path: Path) -> None:
    assert refusal("--down", PATH=str(tmp_path))[0].startswith("error E114: no container engine answers")


BEFORE = """\
*filter
:INPUT ACCEPT [0:0]
:FORWARD ACCEPT [7:1]
:OUTPUT ACCEPT [0:0]
COMMIT
"""
AFTER = """\
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 10.78.0.0/24 ! -o br-0123456789ab -j MASQUERADE
COMMIT
*filter
:INPUT ACCEPT [0:0]
:FORWARD DROP [0:0]
:OUTPUT ACCEPT [0:0]
:DOCKER - [0:0]
:DOCKER-USER - [0:0]
-A INPUT -p tcp --dport 22 -j ACCEPT
-A FORWARD -j DOCKER-USER
-A FORWARD -o docker0 -j DOCKER
-A DOCKER-USER -j RETURN
COMMIT
"""
UNDONE = """\
*nat
-D PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-D POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-D POSTROUTING -s 10.78.0.0/24 ! -o br-0123456789ab -j MASQUERADE
-F DOCKER
-X DOCKER
COMMIT
*filter
{policy}-D FORWARD -j DOCKER-USER
-D FORWARD -o docker0 -j DOCKER
-F DOCKER
-F DOCKER-USER
-X DOCKER
-X DOCKER-USER
COMMIT
"""


def test_what_docker_did_to_the_packet_filter_is_undone_and_nothing_else() -> None:
    accept = UNDONE.format(policy=":FORWARD ACCEPT [0:0]\n")
    assert undoing_docker(AFTER, BEFORE) == accept
    assert undoing_docker(AFTER, "") == accept
    dropping = "*mangle\n:FORWARD ACCEPT [0:0]\nCOMMIT\n" + BEFORE.replace("FORWARD ACCEPT", "FORWARD DROP")
    assert undoing_docker(AFTER, dropping) == UNDONE.format(policy="")
    assert undoing_docker(BEFORE, BEFORE) == ""
