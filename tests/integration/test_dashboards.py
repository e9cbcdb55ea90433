"""A real Prometheus scrapes a real swarm, and every panel of every dashboard has something to show."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml
from drawing.panels import Board, Target
from drawing.queries import NoData, Prometheus, QueryFailed, Span
from support.nodes import NodeProcess, leave_all

from node.config import dump_toml, preset
from node.events import Live, TicketPrinted

ROOT = Path(__file__).parents[2]
GRAFANA = ROOT / "docker" / "grafana"
BOARDS = [Board.read(path) for path in sorted((GRAFANA / "dashboards").glob("*.json"))]

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.prometheus,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class TrainingSwarm:
    """A swarm of two stages at work."""

    ticket: str
    endpoints: list[str]  # of metrics


@pytest.fixture
def swarm(tmp_path: Path) -> Iterator[TrainingSwarm]:
    changes = {"steps": 100_000, "evaluate_every": 5, "checkpoint_every": 5}
    config = preset("tiny").with_overrides(stages=2)
    config = config.model_copy(update={"plan": config.plan.model_copy(update=changes)})
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(config))
    place = ("--host", "127.0.0.1")
    nodes = [NodeProcess(tmp_path / "coordinator", "coordinator", "--run", str(run_file), *place)]
    try:
        ticket = nodes[0].wait_for(TicketPrinted, 90).ticket
        for stage in range(2):
            join = ("join", ticket, "--stage", str(stage), "--metrics-port", "0", "--threads", "1")
            nodes.append(NodeProcess(tmp_path / f"peer{stage}", *join, *place))
        endpoints = [node.wait_for(Live, 90).metrics_endpoint for node in nodes[1:]]
        yield TrainingSwarm(ticket, [endpoint for endpoint in endpoints if endpoint])
    finally:
        leave_all(nodes[1:])
        leave_all(nodes[:1])


@pytest.fixture
def prometheus(swarm: TrainingSwarm, tmp_path: Path) -> Iterator[str]:
    """The lab's configuration with this swarm's addresses, in a hurry."""
    folder = tmp_path / "prometheus"
    shutil.copytree(ROOT / "docker" / "prometheus", folder)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(("scrape_interval", "scrape_timeout", "evaluation_interval"), "1s")
    config["scrape_configs"][0]["static_configs"][0]["targets"] = swarm.endpoints
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    options = ("--config.file=prometheus.yml", f"--web.listen-address={url}", "--log.level=warn")
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(["prometheus", *options], cwd=folder, stdout=log, stderr=log)
    try:
        yield f"http://{url}"
    finally:
        server.terminate()
        server.wait(20)


def failures(url: str) -> list[str]:
    """What panels have nothing to show now."""
    server = Prometheus(url, {}, rate_interval="20s")
    span = Span(time.time() - 10, time.time(), 1)
    found = []
    for board in BOARDS:
        for panel in board.panels:
            try:
                server.ask(panel, span)
            except (NoData, QueryFailed) as error:
                found.append(f"{board.name}: {error}")
    return found


@pytest.mark.timeout(300)
def test_every_panel_has_something_to_show(prometheus: str, swarm: TrainingSwarm, tmp_path: Path) -> None:
    deadline = time.monotonic() + 90
    while left := failures(prometheus):
        assert time.monotonic() < deadline, left
        time.sleep(1)

    panel, span, server = BOARDS[0].panels[0], Span(time.time() - 10, time.time(), 1), Prometheus(prometheus, {})
    for expr, error in (("sum(", QueryFailed), ("resbm_node_no_such_thing", NoData), ("resbm_node_step * NaN", NoData)):
        with pytest.raises(error, match=r"parse error|nothing for"):
            server.ask(replace(panel, targets=(Target("A", expr, "", instant=False),)), span)

    with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=10) as reply:
        rules = [rule for group in json.load(reply)["data"]["groups"] for rule in group["rules"]]
    assert {rule["name"]: rule["health"] for rule in rules if rule["health"] != "ok"} == {}
    assert [rule["name"] for rule in rules if rule.get("state") == "firing"] == []
    for endpoint in swarm.endpoints:
        with urllib.request.urlopen(f"http://{endpoint}/metrics", timeout=10) as reply:
            subprocess.run(["promtool", "check", "metrics"], input=reply.read(), check=True, timeout=30)

    out = tmp_path / "pictures"
    draw = [sys.executable, GRAFANA / "draw.py", out, "--url", prometheus, "--minutes", "1", "--rate-interval", "20s"]
    done = subprocess.run([*draw, "--boards-only"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in out.iterdir()} == {f"{board.name}.png" for board in BOARDS}

    assert_the_terminal_shows_the_same(swarm.ticket)


def assert_the_terminal_shows_the_same(ticket: str) -> None:
    """`status --watch --json`: a line a refresh until Ctrl+C, which is no error."""
    command = [sys.executable, "-m", "node.cli", "status", ticket, "--host", "127.0.0.1", "--watch", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as status:
        assert status.stdout is not None
        views = [json.loads(status.stdout.readline()) for _ in range(2)]
        status.send_signal(signal.SIGINT)
        _rest, errors = status.communicate(timeout=30)
    assert status.returncode == 0, errors
    assert not errors
    assert [view["event"] for view in views] == ["status", "status"]
    now = views[-1]["swarm"]
    assert now["replicas"] == [1, 1]
    for key in ("step", "loss", "tokens_per_second", "bottleneck_microbatches_per_second", "wire_compression"):
        assert now[key] > 0
    first, last = views[-1]["peers"]
    assert first["round_trip_seconds"] > 0
    assert first["link_bytes_per_second"] > 0
    assert last["round_trip_seconds"] is None


def test_drawing_says_what_is_missing(tmp_path: Path) -> None:
    draw = [sys.executable, GRAFANA / "draw.py", tmp_path / "out", "--url", f"http://127.0.0.1:{free_port()}"]
    done = subprocess.run([*draw, "--boards-only"], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.count("does not answer") == sum(len(board.panels) for board in BOARDS)
