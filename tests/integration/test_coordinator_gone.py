"""The coordinator is a way in, not a part of the run: training goes on without it, and resumes after all have left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.nodes import NodeProcess, leave_all

from coordinator.ticket import decode_ticket
from node.config import RunConfig, dump_toml, preset, validated
from node.data import load_corpus
from node.events import Complete, Live, StageStep, TicketPrinted, Worker
from node.unsplit import UnsplitModel

pytestmark = [pytest.mark.processes, pytest.mark.slow]

STEPS = 60
WITHIN = 120.0  # seconds
PLACE = ("--host", "127.0.0.1", "--threads", "1")


def shared_run(steps: int) -> RunConfig:
    values = preset("tiny").with_overrides(stages=2, steps=steps).model_dump()
    values["replicas"]["averaging"] = "sync"
    return validated(values, "test")


class Nodes:
    """Those of one test: all are gone at its end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: list[NodeProcess] = []

    def start(self, name: str, *arguments: str) -> NodeProcess:
        self.running.append(NodeProcess(self.folder / name, *arguments))
        return self.running[-1]

    def publish(self, config: RunConfig) -> tuple[NodeProcess, str]:
        """A coordinator of the run, and its ticket."""
        run_file = self.folder / "run.toml"
        run_file.write_text(dump_toml(config))
        coordinator = self.start("coordinator", "coordinator", "--run", str(run_file), "--host", "127.0.0.1")
        return coordinator, ticket_of(coordinator)

    def leave(self) -> list[NodeProcess]:
        """Those that have left."""
        left = self.running[::-1]
        leave_all(left)
        self.running.clear()
        return left


def ticket_of(coordinator: NodeProcess) -> str:
    return coordinator.wait_for(TicketPrinted, WITHIN).ticket


def kill(node: NodeProcess) -> None:
    node.process.kill()
    node.process.wait(10)


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    started = Nodes(tmp_path)
    try:
        yield started
    finally:
        started.leave()


@pytest.mark.timeout(180)
def test_a_worker_killed_after_the_coordinator_comes_back_and_the_run_ends(nodes: Nodes) -> None:
    coordinator, ticket = nodes.publish(preset("tiny").with_overrides(stages=2, steps=STEPS))
    peers = [nodes.start(name, "join", ticket, *PLACE) for name in ("a", "b")]
    for peer in peers:
        peer.wait_for(StageStep, WITHIN)
    kill(coordinator)
    worker = [event for event in peers[0].events(Worker) if event.state == "started"][-1]
    os.kill(worker.pid, signal.SIGKILL)
    for peer in peers:
        assert peer.wait_for(Complete, WITHIN).step == STEPS
    assert len(peers[0].events(Live)) >= 2


@pytest.mark.timeout(180)
def test_a_newcomer_joins_with_a_peers_ticket_when_the_coordinator_is_gone(nodes: Nodes) -> None:
    coordinator, ticket = nodes.publish(shared_run(100_000))
    nodes.start("a", "join", ticket, "--stage", "0,1", *PLACE).wait_for(StageStep, WITHIN)
    kill(coordinator)
    command = [sys.executable, "-m", "node.cli", "ticket", "--state-dir", str(nodes.folder / "a")]
    fresh = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
    assert decode_ticket(fresh).bootstrap[:-1]  # a's own address, and the coordinator's after it
    assert decode_ticket(fresh).bootstrap[-1:] == decode_ticket(ticket).bootstrap
    nodes.start("b", "join", fresh, *PLACE).wait_for(StageStep, WITHIN)


@pytest.mark.timeout(240)
def test_after_everyone_has_left_the_run_is_resumed_and_ends_as_if_nobody_had(nodes: Nodes) -> None:
    config = shared_run(STEPS)
    losses: dict[int, set[float]] = {}

    def join() -> list[NodeProcess]:
        return [nodes.start(name, "join", ticket, *PLACE, "--max-stages", "1") for name in ("a", "b")]

    def leave_all() -> None:
        for node in nodes.leave():
            for event in node.events(StageStep):
                if event.loss is not None:
                    losses.setdefault(event.step, set()).add(event.loss)

    _, ticket = nodes.publish(config)
    for peer in join():
        peer.wait_for(StageStep, WITHIN)
    leave_all()
    assert max(losses) < STEPS
    assert ticket_of(nodes.start("coordinator", "coordinator", "--resume")) == ticket
    for peer in join():
        peer.wait_for(Complete, WITHIN)
    leave_all()
    model, corpus = UnsplitModel(config, config.run_id), load_corpus(config)
    undisturbed = {step: {model.train_step(step, corpus.microbatch)} for step in range(1, STEPS + 1)}
    assert {step: {round(loss, 5) for loss in told} for step, told in losses.items()} == {
        step: {round(loss, 5) for loss in told} for step, told in undisturbed.items()
    }
