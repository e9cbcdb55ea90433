"""The coordinator is a way in, not a part of the run: training goes on without it, and resumes after all have left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coordinator.ticket import decode_ticket
from node.config import dump_toml, preset, validated
from node.data import load_corpus
from node.events import Complete, Event, Live, StageStep, TicketPrinted, Worker, parse_event
from node.unsplit import UnsplitModel

STEPS = 60


class Node:
    """One `resbm-node` process and what it has said."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        folder.mkdir(exist_ok=True)
        self.out = folder / "events.jsonl"
        with self.out.open("wb") as out, (folder / "errors.log").open("wb") as err:
            command = [sys.executable, "-m", "node.cli", *arguments, "--state-dir", str(folder), "--json"]
            self.process = subprocess.Popen(command, stdout=out, stderr=err)

    def events(self) -> list[Event]:
        lines = self.out.read_bytes().splitlines(keepends=True)
        return [parse_event(line) for line in lines if line.endswith(b"\n")]

    def wait_for(self, kind: type, seconds: float = 60) -> Event:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for event in self.events():
                if isinstance(event, kind):
                    return event
            assert self.process.poll() is None, f"left early: {self.events()[-3:]}"
            time.sleep(0.1)
        pytest.fail(f"no {kind.__name__} within {seconds} s: {self.events()[-3:]}")

    def leave(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait(30)


@pytest.mark.timeout(180)
def test_a_worker_killed_after_the_coordinator_comes_back_and_the_run_ends(tmp_path: Path) -> None:
    config = preset("tiny").with_overrides(stages=2, steps=STEPS)
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(config))
    nodes: list[Node] = []

    def start(name: str, *arguments: str) -> Node:
        nodes.append(Node(tmp_path / name, *arguments))
        return nodes[-1]

    try:
        coordinator = start("coordinator", "coordinator", "--run", str(run_file), "--host", "127.0.0.1")
        ticket = coordinator.wait_for(TicketPrinted)
        assert isinstance(ticket, TicketPrinted)
        peers = [start(name, "join", ticket.ticket, "--host", "127.0.0.1", "--threads", "1") for name in ("a", "b")]
        for peer in peers:
            peer.wait_for(StageStep)
        os.kill(coordinator.process.pid, signal.SIGKILL)
        coordinator.process.wait(10)
        worker = [event for event in peers[0].events() if isinstance(event, Worker) and event.state == "started"][-1]
        os.kill(worker.pid, signal.SIGKILL)
        for peer in peers:
            complete = peer.wait_for(Complete, 120)
            assert isinstance(complete, Complete)
            assert complete.step == STEPS
        assert len([event for event in peers[0].events() if isinstance(event, Live)]) >= 2
    finally:
        for node in reversed(nodes):
            node.leave()


@pytest.mark.timeout(180)
def test_a_newcomer_joins_with_a_peers_ticket_when_the_coordinator_is_gone(tmp_path: Path) -> None:
    values = preset("tiny").with_overrides(stages=2, steps=100_000).model_dump()
    values["replicas"]["averaging"] = "sync"
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(validated(values, "test")))
    nodes: list[Node] = []

    def start(name: str, *arguments: str) -> Node:
        nodes.append(Node(tmp_path / name, *arguments))
        return nodes[-1]

    try:
        coordinator = start("coordinator", "coordinator", "--run", str(run_file), "--host", "127.0.0.1")
        ticket = coordinator.wait_for(TicketPrinted)
        assert isinstance(ticket, TicketPrinted)
        place = ("--host", "127.0.0.1", "--threads", "1")
        start("a", "join", ticket.ticket, "--stage", "0,1", *place).wait_for(StageStep)
        os.kill(coordinator.process.pid, signal.SIGKILL)
        coordinator.process.wait(10)
        command = [sys.executable, "-m", "node.cli", "ticket", "--state-dir", str(tmp_path / "a")]
        fresh = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout.strip()
        assert decode_ticket(fresh).bootstrap[:-1]  # a's own address, and the coordinator's after it
        assert decode_ticket(fresh).bootstrap[-1:] == decode_ticket(ticket.ticket).bootstrap
        start("b", "join", fresh, *place).wait_for(StageStep)
    finally:
        for node in reversed(nodes):
            node.leave()


@pytest.mark.timeout(240)
def test_after_everyone_has_left_the_run_is_resumed_and_ends_as_if_nobody_had(tmp_path: Path) -> None:
    values = preset("tiny").with_overrides(stages=2, steps=STEPS).model_dump()
    values["replicas"]["averaging"] = "sync"
    config = validated(values, "test")
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(config))
    nodes: list[Node] = []
    losses: dict[int, set[float]] = {}

    def start(name: str, *arguments: str) -> Node:
        nodes.append(Node(tmp_path / name, *arguments))
        return nodes[-1]

    def join(ticket: str) -> list[Node]:
        address = ("--host", "127.0.0.1", "--threads", "1", "--max-stages", "1")
        return [start(name, "join", ticket, *address) for name in ("a", "b")]

    def leave_all() -> None:
        for node in reversed(nodes):
            node.leave()
            for event in node.events():
                if isinstance(event, StageStep) and event.loss is not None:
                    losses.setdefault(event.step, set()).add(event.loss)
        nodes.clear()

    try:
        ticket = start("coordinator", "coordinator", "--run", str(run_file), "--host", "127.0.0.1").wait_for(
            TicketPrinted
        )
        assert isinstance(ticket, TicketPrinted)
        for peer in join(ticket.ticket):
            peer.wait_for(StageStep)
        leave_all()
        assert max(losses) < STEPS
        again = start("coordinator", "coordinator", "--resume").wait_for(TicketPrinted)
        assert isinstance(again, TicketPrinted)
        assert again.ticket == ticket.ticket
        for peer in join(ticket.ticket):
            peer.wait_for(Complete, 120)
        leave_all()
    finally:
        for node in reversed(nodes):
            node.leave()
    model, corpus = UnsplitModel(config, config.run_id), load_corpus(config)
    undisturbed = {step: {model.train_step(step, corpus.microbatch)} for step in range(1, STEPS + 1)}
    assert {step: {round(loss, 5) for loss in told} for step, told in losses.items()} == {
        step: {round(loss, 5) for loss in told} for step, told in undisturbed.items()
    }
