"""The demo's own part: it starts, listens, notices who leaves early, cleans up. Stand-ins play the other processes."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from rich.console import Console

import node.demo
from node.config import RunConfig, preset
from node.demo import Demo, DemoOptions, Fault, Interrupted
from node.demo_folder import demo_folder
from node.demo_peers import PeerFailed, PeerView
from node.demo_view import ConsoleView
from node.events import Evaluation, Step, Summary
from node.progress import StepAggregator

STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
from node.events import *

def option(name): return sys.argv[sys.argv.index(name) + 1]
state = Path(option("--state-dir")); state.mkdir(parents=True)
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
stage = int(state.name[-1]) - 1 if sys.argv[1] == "join" else None
def step(number):
    link = None if stage == 1 else LinkTraffic(dense_bytes=1000, wire_bytes_forward=6, wire_bytes_backward=4)
    emit(StageStep(stage=stage, step=number, loss=1.0 / number, tokens=64, seconds=0.1, microbatches=4,
                   compute_seconds=0.05, wait_seconds=0.02, gradient_norm=1.0, link=link))
def live():
    emit(Worker(state="started", pid=os.getpid(), detail=""))
    emit(Assigned(stage=stage, num_stages=2, reason="needed"))
    emit(Live(stage=stage, peer_id="p", endpoint="127.0.0.1:1", metrics_endpoint=None, committed_step=0, run="r",
              steps=4))
if stage is None:
    print("not an event")
    emit(TicketPrinted(ticket="resbm1ticket", run_id="r"))
    {coordinator}
else:
    assert sys.argv[2] == "resbm1ticket"
    live()
    {join}
time.sleep(60)
"""
TRAINS = """
    emit(Evaluation(stage=stage, step=0, loss=2.0))
    for number in range(1, 5): step(number)
    emit(Evaluation(stage=stage, step=4, loss=1.0))
    emit(Complete(stage=stage, step=4))
"""


class RecordingView:
    """Keeps what it is told."""

    wants_sample = False

    def __init__(self) -> None:
        self.stepped = threading.Event()
        self.steps: list[Step] = []
        self.evaluations: list[Evaluation] = []
        self.notes: list[str] = []

    def preparing(self, text: str, fraction: float) -> None: ...
    def begin(self, corpus: object) -> None: ...
    def peers(self, peers: Sequence[PeerView]) -> None: ...
    def tick(self, now: float) -> None: ...
    def summary(self, summary: Summary, totals: StepAggregator, sample: str) -> None: ...
    def close(self) -> None: ...

    def evaluation(self, evaluation: Evaluation) -> None:
        self.evaluations.append(evaluation)

    def step(self, step: Step, totals: StepAggregator) -> None:
        self.steps.append(step)
        self.stepped.set()

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def config() -> RunConfig:
    return preset("tiny").with_overrides(stages=2)


def play(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    config: RunConfig,
    *,
    join: str = TRAINS,
    coordinator: str = "pass",
    options: DemoOptions | None = None,
    view: RecordingView | None = None,
) -> tuple[Demo, RecordingView]:
    """A demo of stand-ins until it is complete or fails; then nobody may be left."""
    code = STAND_IN.replace("{coordinator}", coordinator).replace("{join}", join)
    monkeypatch.setattr(node.demo, "COMMAND", (sys.executable, "-c", code))
    view = view or RecordingView()
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    async def run() -> Demo:
        demo = Demo(config, folder, options or DemoOptions(), view)
        with node.demo.stop_on_signals(demo.stop):
            try:
                await demo.until_complete()
                return demo
            finally:
                await demo.stop_children()

    try:
        return asyncio.run(asyncio.wait_for(run(), 30)), view
    finally:
        assert {child.pid for child in psutil.Process().children(recursive=True)} <= before


def test_a_swarm_that_trains_is_told_step_by_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig
) -> None:
    demo, view = play(monkeypatch, tmp_path, config)
    assert [step.step for step in view.steps] == [1, 2, 3, 4]
    assert [step.wire_bytes for step in view.steps] == [10] * 4
    assert demo.evaluations == {0: 2.0, 4: 1.0}
    assert len(view.evaluations) == 2  # each stage tells it; it is shown once
    assert [peer.stage for peer in demo.peers_by_stage()] == [0, 1]


@pytest.mark.parametrize(
    ("join", "words"),
    [
        (
            'if stage == 1: emit(Error(code=310, cause="stage is served", remedy="choose another")); sys.exit(2)',
            r"E310 peer-2 \(stage 1\): stage is served",
        ),
        (
            'if stage == 1: sys.exit("out of luck")',
            r"E405 peer-2 \(stage 1\) ended early \(exit code 1\): out of luck",
        ),
        ("if stage == 1: os.kill(os.getpid(), signal.SIGKILL)", "E405 .*killed by SIGKILL"),
    ],
)
def test_a_peer_that_gives_up_ends_the_demo_with_its_reason_and_its_log(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig, join: str, words: str
) -> None:
    with pytest.raises(PeerFailed, match=words) as caught:
        play(monkeypatch, tmp_path, config, join=join)
    assert str(tmp_path / "peer-2.log") in caught.value.cause
    assert caught.value.remedy


def test_a_coordinator_that_dies_ends_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig
) -> None:
    with pytest.raises(PeerFailed, match="coordinator ended early"):
        play(monkeypatch, tmp_path, config, coordinator="sys.exit(3)", join="pass")


@contextlib.contextmanager
def signalled_at_the_first_step(view: RecordingView, *numbers: int) -> Iterator[list[float]]:
    """Sends this process signals, half a second apart, and notes when. One that comes too late does no harm."""
    before = {number: signal.signal(number, lambda *_: None) for number in set(numbers)}
    sent: list[float] = []

    def send() -> None:
        view.stepped.wait(20)
        for number in numbers:
            sent.append(time.monotonic())
            os.kill(os.getpid(), number)
            time.sleep(0.5)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        view.stepped.set()
        thread.join()
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_demo_in_good_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig, number: int
) -> None:
    view = RecordingView()
    with signalled_at_the_first_step(view, number), pytest.raises(Interrupted):
        play(monkeypatch, tmp_path, config, join="step(1)", view=view)


def test_a_second_signal_does_not_wait_for_those_who_will_not_leave(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig
) -> None:
    view = RecordingView()
    join = "signal.signal(signal.SIGTERM, signal.SIG_IGN); step(1)"
    with signalled_at_the_first_step(view, signal.SIGINT, signal.SIGINT) as sent:
        with pytest.raises(Interrupted):
            play(monkeypatch, tmp_path, config, join=join, view=view)
        assert time.monotonic() - sent[0] < node.demo.LEAVING.total_seconds()


def test_the_planned_fault_kills_the_worker_in_its_step_and_only_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: RunConfig
) -> None:
    """The stand-in is its own worker: killing it ends the demo, which shows who was killed and when."""
    trains = "step(1); time.sleep(0.5); step(2); time.sleep(20)"
    with pytest.raises(PeerFailed, match=r"peer-1 \(stage 0\) ended early \(killed by SIGKILL\)"):
        play(monkeypatch, tmp_path, config, join=trains, options=DemoOptions(faults=(Fault(stage=0, step=3),)))


def test_the_folder_goes_but_after_a_failure_the_logs_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with demo_folder(keep=False) as folder:
        (folder / "weights").mkdir()
    assert not folder.exists()
    with pytest.raises(PeerFailed), demo_folder(keep=False) as folder:
        (folder / "peer-1").mkdir()
        (folder / "peer-1" / "worker.log").write_text("why")
        (folder / "peer-1" / "state.safetensors").write_text("much")
        raise PeerFailed(405, "cause", "remedy")
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["keep", "worker.log"]


def test_folders_of_killed_demos_are_removed_and_kept_ones_are_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for name, kept in (("killed", False), ("kept", True)):
        old = tmp_path / f"resbm-node-demo-{name}"
        old.mkdir()
        if kept:
            (old / "keep").touch()
        os.utime(old, (0, 0))
    with demo_folder(keep=True) as mine, demo_folder(keep=False):
        os.utime(mine, (0, 0))  # long-running, but alive: its lock is held
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["resbm-node-demo-kept", mine.name])


def test_the_end_is_told_with_tables_losses_and_a_sample(config: RunConfig) -> None:
    out = io.StringIO()
    view = ConsoleView(config, Console(file=out, width=120))
    summary = Summary(
        val_loss_before=7.6,
        val_loss=3.5,
        wire_compression=113.2,
        tokens_per_second=5120.0,
        weights_digest="ab" * 32,
        unigram_entropy=6.1,
        steps=4,
        stages=2,
        restarts=0,
    )
    view.summary(summary, StepAggregator(2), "def f(x): [return] x")
    text = out.getvalue()
    for words in ("7.600 -> 3.500", "6.100", "5,120 tokens/s", "113x", "ab" * 32, "def f(x): [return] x", "0 and 1"):
        assert words in text
