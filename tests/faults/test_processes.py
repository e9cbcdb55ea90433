"""No process survives: not success, failure, Ctrl+C, SIGTERM or SIGKILL of whoever started it.

Processes are found by a mark in their environment, which every descendant inherits, so that none hides by leaving its
session or its parent.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.processes, pytest.mark.skipif(sys.platform != "linux", reason="needs prctl and /proc")]

MARK = "RESBM_TEST_MARK"

# As hivemind does it: a child in its own session that watches its parent, and a grandchild that watches nobody.
STAND_IN = """
import os, signal, subprocess, sys, time
from node.events import *
spec = read_spec(sys.stdin.buffer)
GRANDCHILD = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(300)"
CHILD = '''
import os, psutil, subprocess, sys, time
grandchild = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True)
print("ready", flush=True)
while os.getppid() == int(sys.argv[2]): time.sleep(0.1)
grandchild.kill()
'''
command = [sys.executable, "-c", CHILD, GRANDCHILD, str(os.getpid())]
child = subprocess.Popen(command, start_new_session=True, stdout=subprocess.PIPE)
child.stdout.readline()
"""
SUPERVISOR = """
import asyncio, sys
from datetime import timedelta
from pathlib import Path
from node.events import WorkerSpec, emit
from node.keeper import BackOff
from node.supervisor import Supervisor
folder = Path(sys.argv[1])
spec = WorkerSpec(ticket="t", state_folder=folder, identity_file=folder / "identity")
quick = BackOff(first=timedelta(milliseconds=10), give_up_after=2)
command = [sys.executable, "-c", sys.argv[2]]
subject = Supervisor(spec, emit, command=command, drain_timeout=timedelta(seconds=1), back_off=quick)
print(asyncio.run(subject.run()).outcome.name, file=sys.stderr)
"""
SERVES = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); emit(Complete(stage=0, step=0)); time.sleep(300)"
SERVES_TWO = (
    """
if spec.beside is None:
    emit(Cover(stage=1, reason="", beside=Beside(node_id="me", throughput=1.0, stand_in=True)))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); time.sleep(300)
"""
    + SERVES
)
IGNORES = SERVES.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")


def marked(mark: str) -> list[psutil.Process]:
    """Living processes with the mark in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def nobody_left(mark: str, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while marked(mark):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


@pytest.fixture
def mark() -> Iterator[str]:
    mark = uuid.uuid4().hex
    yield mark
    for process in marked(mark):
        process.kill()


def start(command: list[str], mark: str, **environment: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, MARK: mark, **environment},
        start_new_session=True,
    )


def start_supervisor(worker: str, folder: Path, mark: str) -> subprocess.Popen[bytes]:
    return start([sys.executable, "-c", SUPERVISOR, str(folder), STAND_IN + worker], mark)


def read_until(process: subprocess.Popen[bytes], event: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == event:
            return
    raise AssertionError(f"no {event} event before the end")


@pytest.mark.parametrize("worker", ["sys.exit(0)", "sys.exit(1)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_worker_that_ends_by_itself_leaves_nobody(tmp_path: Path, mark: str, worker: str) -> None:
    """Success and failure: what it started outlives it, and is ended by the supervisor before that ends."""
    supervisor = start_supervisor(worker, tmp_path, mark)
    _, stderr = supervisor.communicate(timeout=30)
    assert (supervisor.returncode == 0) == (worker == "sys.exit(0)"), stderr.decode()
    assert marked(mark) == []


@pytest.mark.parametrize("worker", [SERVES, IGNORES], ids=["drains", "ignores"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signalled_supervisor_leaves_nobody(tmp_path: Path, mark: str, worker: str, number: int) -> None:
    supervisor = start_supervisor(worker, tmp_path, mark)
    read_until(supervisor, "complete")
    assert len(marked(mark)) == 4  # supervisor, worker, child, grandchild
    supervisor.send_signal(number)
    _, stderr = supervisor.communicate(timeout=30)
    assert stderr.decode().split()[-1] == ("DRAINED" if worker is SERVES else "KILLED")
    assert marked(mark) == []


@pytest.mark.parametrize("worker", [SERVES, IGNORES], ids=["drains", "ignores"])
def test_a_killed_supervisor_leaves_nobody(tmp_path: Path, mark: str, worker: str) -> None:
    supervisor = start_supervisor(worker, tmp_path, mark)
    read_until(supervisor, "complete")
    supervisor.kill()
    supervisor.communicate(timeout=30)
    assert nobody_left(mark, seconds=10), marked(mark)


def test_a_killed_supervisor_of_several_workers_leaves_nobody(tmp_path: Path, mark: str) -> None:
    supervisor = start_supervisor(SERVES_TWO, tmp_path, mark)
    read_until(supervisor, "complete")
    assert len(marked(mark)) == 7  # supervisor, and two workers with child and grandchild
    supervisor.kill()
    supervisor.communicate(timeout=30)
    assert nobody_left(mark, seconds=10), marked(mark)


# -- the real thing ---------------------------------------------------------------------------------------------


def start_demo(folder: Path, mark: str, stages: int) -> subprocess.Popen[bytes]:
    """A real swarm in the midst of a run that is too long to end by itself."""
    options = ["--preset", "tiny", "--stages", str(stages), "--steps", "100000", "--threads", "1", "--json"]
    return start([sys.executable, "-m", "node.cli", "demo", *options], mark, TMPDIR=str(folder))


def kill_a_supervisor(demo: subprocess.Popen[bytes]) -> None:
    joins = [child for child in psutil.Process(demo.pid).children() if "join" in child.cmdline()]
    assert len(joins) == 2
    joins[0].kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strike", "stages", "status"),
    [
        (lambda demo: demo.send_signal(signal.SIGINT), 1, 130),
        (lambda demo: demo.kill(), 1, -signal.SIGKILL),
        (kill_a_supervisor, 2, 2),
    ],
    ids=["interrupted", "killed", "a peer killed"],
)
def test_a_demo_struck_in_the_middle_leaves_nobody(
    tmp_path: Path, mark: str, strike: Callable[[subprocess.Popen[bytes]], None], stages: int, status: int
) -> None:
    demo = start_demo(tmp_path, mark, stages)
    read_until(demo, "step")
    assert len(marked(mark)) >= 2 + 2 * stages  # demo, coordinator, supervisors and workers; and what hivemind started
    strike(demo)
    _, stderr = demo.communicate(timeout=40)
    assert demo.returncode == status, stderr.decode()
    assert nobody_left(mark, seconds=30), marked(mark)
    assert bool(list(tmp_path.glob("resbm-node-demo-*"))) == (status != 130)  # it is kept for whoever asks why
    if status == 2:
        error = stderr.decode()
        assert "E405" in error
        assert ".log" in error
