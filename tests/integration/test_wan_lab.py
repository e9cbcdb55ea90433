"""A real swarm on shaped links: every process in a network namespace of its own, 10 Mbit/s and 50 ms apart.

What crosses is counted twice, by us (serialised frames handed to gRPC) and by the kernel (the interfaces), between
two commits of the last stage. The run is one whose latents dominate: bf16 and as wide as the model, 131 KB a frame,
so that the links are busy most of the time. The kernel also counts what ours cannot: headers of HTTP/2, TCP and IP,
acknowledgements, and the directory's own traffic. The latter is measured on the same interfaces after training, when
nothing else crosses, and taken off at that rate. Nothing here asserts a speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.lab import needs_lab
from support.nodes import NodeProcess, leave_all

from node.config import RunConfig, dump_toml, preset
from node.events import Complete, Live, StageStep, Summary, TicketPrinted
from node.lab.namespaces import NamespaceLab
from node.lab.shapes import LinkShape

pytestmark = [pytest.mark.processes, pytest.mark.root, pytest.mark.slow, needs_lab]

PEERS = ("p0", "p1", "p2", "p3")
COORDINATOR = "c"
STEPS, FIRST = 5, 2  # bytes are counted from the commit of step FIRST to that of the last
IDLE_SECONDS = 3.0
REFERENCE = ("-m", "node.cli", "reference", "--threads", "1", "--json")


def run_config() -> RunConfig:
    values = preset("tiny").model_dump()
    values["name"] = "wan-smoke"
    values["bottleneck"]["width"] = values["model"]["hidden_size"]
    values["codec"] |= {"forward": "bf16", "backward": "bf16", "zstd_level": 0}
    values["plan"] |= {"steps": STEPS, "microbatches_per_step": 6, "batch": 8, "tokens": 128, "checkpoint_every": 2}
    return RunConfig.model_validate(values)


class Swarm:
    """A coordinator and four peers in a lab."""

    def __init__(self, lab: NamespaceLab, run_file: Path, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.peers: list[NodeProcess] = []
        self.coordinator = self._start(COORDINATOR, "coordinator", "--run", str(run_file))

    def join(self) -> None:
        ticket = self.coordinator.wait_for(TicketPrinted, 90).ticket
        self.peers += [self._start(name, "join", ticket, "--threads", "1") for name in PEERS]

    def _start(self, name: str, *arguments: str) -> NodeProcess:
        host = ("--host", self.lab.address(name))
        return NodeProcess(self.folder / name, *arguments, *host, wrap=lambda argv: self.lab.command(name, argv))

    def last_stage(self) -> NodeProcess:
        return next(peer for peer in self.peers if peer.wait_for(Live, 150).stage == len(PEERS) - 1)

    def sent_bytes(self) -> int:
        """By all peers, as the kernel counts."""
        return sum(self.lab.counters(name).tx_bytes for name in PEERS)

    def wire_bytes(self, first: int, last: int) -> int:
        """Over all links in steps first+1 to last, as we count."""
        steps = {(step.stage, step.step): step for peer in self.peers for step in peer.events(StageStep)}
        return sum(s.link.wire_bytes for (_, step), s in steps.items() if s.link and first < step <= last)

    def start_fetching(self, config: RunConfig) -> subprocess.Popen[str]:
        """Loads what it needs and then waits for `endpoints` on its stdin."""
        script = str(Path(__file__).with_name("weights_process.py"))
        argv = [sys.executable, script, config.run_id, str(self.folder / "weights")]
        return start(self.lab.command(COORDINATOR, argv))

    def endpoints(self) -> str:
        lives = sorted((peer.wait_for(Live, 1) for peer in self.peers), key=lambda live: live.stage)
        return " ".join(live.endpoint for live in lives)

    def leave(self) -> None:
        leave_all(self.peers)
        leave_all([self.coordinator])


def start(argv: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def lab() -> Iterator[NamespaceLab]:
    with NamespaceLab([COORDINATOR, *PEERS], LinkShape.of_round_trip(10, 50)) as built:
        yield built


@pytest.mark.timeout(300)  # usually a minute; other programs may have the processors
def test_a_swarm_on_slow_links_is_exact_and_its_bytes_are_what_we_count(lab: NamespaceLab, tmp_path: Path) -> None:
    config = run_config()
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(config))
    assert lab.shaping("p0").startswith("htb+")
    swarm = Swarm(lab, run_file, tmp_path)
    helpers: list[subprocess.Popen[str]] = []
    try:
        swarm.join()
        last = swarm.last_stage()
        helpers.append(start([sys.executable, *REFERENCE, "--run", str(run_file)]))  # while the swarm waits for links
        helpers.append(swarm.start_fetching(config))
        last.wait_for(StageStep, 150, lambda event: event.step == FIRST)
        sent, started = swarm.sent_bytes(), time.monotonic()
        last.wait_for(StageStep, 200, lambda event: event.step == STEPS)
        sent, seconds = swarm.sent_bytes() - sent, time.monotonic() - started
        for peer in swarm.peers:
            peer.wait_for(Complete, 90)
        idle = swarm.sent_bytes()
        time.sleep(IDLE_SECONDS)
        idle_rate = (swarm.sent_bytes() - idle) / IDLE_SECONDS
        reference, digest = helpers[0].communicate(timeout=150)[0], helpers[1].communicate(swarm.endpoints(), 150)[0]
    finally:
        for helper in helpers:
            with helper:  # closes its pipes
                helper.kill()
        swarm.leave()
    ours, directory = swarm.wire_bytes(FIRST, STEPS), idle_rate * seconds
    print(f"ours {ours}, interfaces {sent}, of which the directory about {directory:.0f}, in {seconds:.1f} s")
    assert directory < 0.05 * ours  # it is busier at the end of a run than within one: no more than an estimate
    assert ours < sent
    assert sent - directory < 1.15 * ours
    assert digest.strip() == Summary.model_validate(json.loads(reference.splitlines()[-1])).weights_digest
