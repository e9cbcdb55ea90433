"""The worker process with everything real around it: what it refuses, how it ends, what it leaves behind.

A refusal is exit status 78 and exactly one error event with code, cause and remedy; stdout holds events and nothing
else; no process survives. Processes are found by a mark in their environment, which every descendant inherits.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from coordinator import identity
from coordinator.ticket import decode_ticket, encode_ticket
from node.config import RunConfig, dump_toml, preset
from node.events import EXIT_DONE, EXIT_REFUSED, Event, WorkerSpec, parse_event
from stage_server.checkpoint import CheckpointStore

pytestmark = [
    pytest.mark.processes,
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="needs /proc"),
]

ROOT = Path(__file__).parents[2]
PUBLISHER = Path(__file__).with_name("swarm_process.py")
FORKER = Path(__file__).with_name("worker_process.py")
MARK = "RESBM_TEST_MARK"
AT_ONCE = 3  # workers


class Publisher:
    """The swarm's first peer, in a process of its own."""

    def __init__(self, folder: Path, mark: str) -> None:
        settings = {"seed": os.urandom(32).hex(), "bootstrap": [], "folder": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, str(PUBLISHER), json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, MARK: mark},
            start_new_session=True,
        )
        self._answer()

    def publish(self, config: RunConfig) -> str:
        """Publishes a run; returns its ticket."""
        request = {
            "do": "publish_run",
            "config_toml": dump_toml(config),
            "run_id": config.run_id,
            "name": config.name,
            "num_stages": config.stages,
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return str(self._answer()["ok"])

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the publisher ended"
        return json.loads(line)

    def close(self) -> None:
        self.process.communicate(timeout=20)


@dataclass
class Scene:
    """What the workers of this file meet: a swarm with three runs, and a text cache that only the first one fills."""

    folder: Path
    ticket: str  # a run of two stages
    alone: str  # a run of one stage that never ends
    textless: str  # a run whose text is not there
    alone_config: RunConfig
    marks: list[str] = field(default_factory=list)

    def spec(self, name: str, ticket: str, **changes: Any) -> WorkerSpec:
        folder = self.folder / name
        folder.mkdir()
        values = {
            "ticket": ticket,
            "state_folder": folder,
            "identity_file": folder / "identity",
            "host": "127.0.0.1",
            "threads": 1,
            "device": "cpu",
        }
        return WorkerSpec(**(values | changes))

    def start_forker(self) -> tuple[subprocess.Popen[str], str]:
        """A process that forks workers, and its mark."""
        mark, environment = self._environment()
        command = [sys.executable, str(FORKER)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=ROOT, env=environment), mark

    def _environment(self) -> tuple[str, dict[str, str]]:
        mark = uuid.uuid4().hex
        self.marks.append(mark)
        return mark, {**os.environ, MARK: mark, "XDG_CACHE_HOME": str(self.folder / "cache")}

    def start(self, spec: WorkerSpec) -> tuple[subprocess.Popen[bytes], str]:
        """A worker and its mark."""
        mark, environment = self._environment()
        with (spec.state_folder / "log").open("wb") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "node.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env=environment,
                start_new_session=True,
            )
        assert worker.stdin is not None
        worker.stdin.write(spec.model_dump_json().encode() + b"\n")
        worker.stdin.flush()
        return worker, mark


def marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def left_after(mark: str, seconds: float = 6.0, but: int | None = None) -> list[psutil.Process]:
    """Who is still there, but for one process; those that are about to end get a moment."""
    deadline = time.monotonic() + seconds
    while (left := [p for p in marked(mark) if p.pid != but]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    publisher_mark = uuid.uuid4().hex
    publisher = Publisher(folder / "publisher", publisher_mark)
    tiny = preset("tiny").with_overrides(stages=2)
    endless = preset("tiny").with_overrides(stages=1, steps=1_000_000).model_dump()
    endless["plan"] |= {"checkpoint_every": 1_000_000, "evaluation_microbatches": 0}
    alone = RunConfig.model_validate(endless)
    data = {"source": "files", "paths": [str(folder / "missing")]}
    textless = RunConfig.model_validate(tiny.model_dump() | {"data": data})
    scene = Scene(folder, *(publisher.publish(config) for config in (tiny, alone, textless)), alone_config=alone)
    yield scene
    publisher.close()
    for mark in [*scene.marks, publisher_mark]:
        for process in marked(mark):
            process.kill()


# -- refusals ---------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """A worker that has ended by itself."""

    status: int
    stdout: bytes
    log: str
    left: list[psutil.Process]


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def unreachable(scene: Scene) -> str:
    true = decode_ticket(scene.ticket)
    stranger = identity.peer_id_of(identity.public_key_of(os.urandom(32)))
    return encode_ticket(true.run_id, [f"/ip4/127.0.0.1/tcp/{closed_port()}/p2p/{stranger}"], true.publisher)


def garbage(scene: Scene) -> str:
    last = scene.ticket[-1]
    return scene.ticket[:-1] + ("1" if last != "1" else "2")


def unpublished(scene: Scene) -> str:
    true = decode_ticket(scene.ticket)
    return encode_ticket("f" * 16, true.bootstrap, true.publisher)


def spoiled_identity(scene: Scene) -> Path:
    path = scene.folder / "spoiled"
    path.write_bytes(b"junk")
    path.chmod(0o400)
    return path


@dataclass(frozen=True)
class Refusal:
    """A way to be refused: the code, the step that fails, and the spec that leads there."""

    code: int
    step: str
    said: str  # a part of the cause
    spec: Callable[[Scene, int], dict[str, Any]]  # of the scene and a taken port


REFUSALS = {
    "unreachable ticket": Refusal(302, "network", "", lambda scene, _: {"ticket": unreachable(scene)}),
    "garbage ticket": Refusal(301, "network", "checksum", lambda scene, _: {"ticket": garbage(scene)}),
    "run not published": Refusal(306, "", "f" * 16, lambda scene, _: {"ticket": unpublished(scene)}),
    "stage out of range": Refusal(310, "stage", "stage 2", lambda scene, _: {"ticket": scene.ticket, "stage": 2}),
    "port taken": Refusal(105, "reach", "127.0.0.1:", lambda scene, port: {"ticket": scene.ticket, "port": port}),
    "metrics port taken": Refusal(
        105, "", "metrics", lambda scene, port: {"ticket": scene.ticket, "stage": 1, "metrics_port": port}
    ),
    "no CUDA": Refusal(106, "machine", "CUDA", lambda scene, _: {"ticket": scene.ticket, "device": "cuda"}),
    "no text": Refusal(104, "state", "missing", lambda scene, _: {"ticket": scene.textless, "stage": 0}),
    "spoiled identity": Refusal(
        107, "identity", "", lambda scene, _: {"ticket": scene.ticket, "identity_file": spoiled_identity(scene)}
    ),
}


@pytest.fixture(scope="module")
def refusals(scene: Scene) -> dict[str, Ended]:
    """All refused workers, a few at a time: they wait more than they compute."""
    forker, mark = scene.start_forker()

    def end(names: Sequence[str]) -> dict[str, Ended]:
        specs = [scene.spec(name.replace(" ", "-"), **REFUSALS[name].spec(scene, port)) for name in names]
        files = [(spec.state_folder / "stdout", spec.state_folder / "log") for spec in specs]
        requests = [
            {"spec": spec.model_dump_json(), "stdout": str(out), "log": str(log)}
            for spec, (out, log) in zip(specs, files, strict=True)
        ]
        assert forker.stdin is not None
        assert forker.stdout is not None
        print(json.dumps(requests), file=forker.stdin, flush=True)
        statuses = json.loads(forker.stdout.readline())
        left = left_after(mark, but=forker.pid)
        return {
            name: Ended(status, out.read_bytes(), log.read_text(), left)
            for name, status, (out, log) in zip(names, statuses, files, strict=True)
        }

    with socket.socket() as taken, forker:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = int(taken.getsockname()[1])
        names = list(REFUSALS)
        batches = [names[first : first + AT_ONCE] for first in range(0, len(names), AT_ONCE)]
        try:
            return {name: ended for batch in batches for name, ended in end(batch).items()}
        except BaseException:
            for process in marked(mark):  # one that is not refused works on, and the others are waited for with it
                process.kill()
            raise


@pytest.mark.parametrize("name", REFUSALS)
def test_a_worker_that_is_refused_says_why_and_leaves_nobody(refusals: dict[str, Ended], name: str) -> None:
    expected, ended = REFUSALS[name], refusals[name]
    if name == "no CUDA" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    assert ended.status == EXIT_REFUSED, ended.log
    events = events_of(ended.stdout)
    (error,) = [event for event in events if event.event == "error"]
    assert error is events[-1]
    assert error.code == expected.code
    assert expected.said in error.cause
    assert error.remedy
    failed = [event.name for event in events if event.event == "check" and event.verdict == "failed"]
    assert failed == ([expected.step] if expected.step else [])
    assert ended.left == []
    assert "Traceback" not in ended.log


def events_of(stdout: bytes) -> list[Event]:
    """Every line is an event: nothing else is on stdout."""
    return [parse_event(line) for line in stdout.splitlines()]


# -- leaving ----------------------------------------------------------------------------------------------------


def read_until(worker: subprocess.Popen[bytes], wanted: Callable[[Any], bool]) -> list[Event]:
    assert worker.stdout is not None
    events = []
    for line in worker.stdout:
        events.append(parse_event(line))
        if wanted(events[-1]):
            return events
    raise AssertionError(f"the worker ended with {worker.wait()} before: {events}")


def drained(worker: subprocess.Popen[bytes], mark: str) -> list[Event]:
    """The events after SIGTERM, the end being as it should be."""
    worker.send_signal(signal.SIGTERM)
    stdout, _ = worker.communicate(timeout=30)
    assert worker.returncode == EXIT_DONE
    events = events_of(stdout)
    assert not [event for event in events if event.event == "error"]
    assert left_after(mark) == []
    return events


@pytest.mark.parametrize("step", ["identity", "network", "speed"])
def test_a_worker_told_to_leave_while_it_joins_leaves(scene: Scene, step: str) -> None:
    """In the middle of what follows the step: starting the directory, listening, taking a place."""
    spec = scene.spec(f"leaves-{step}", scene.ticket)
    worker, mark = scene.start(spec)
    read_until(worker, lambda event: event.event == "check" and event.name == step)
    drained(worker, mark)


def test_a_worker_killed_while_it_joins_leaves_nobody(scene: Scene) -> None:
    worker, mark = scene.start(scene.spec("killed", scene.ticket))
    read_until(worker, lambda event: event.event == "check" and event.name == "network")
    assert len(marked(mark)) >= 4  # the worker, its zygote, the directory's process and its daemon
    worker.kill()
    worker.communicate(timeout=10)  # nobody else holds its stdout
    assert left_after(mark) == []


def test_a_worker_told_to_leave_while_it_trains_saves_what_is_committed(scene: Scene) -> None:
    spec = scene.spec("trains", scene.alone)
    worker, mark = scene.start(spec)
    read_until(worker, lambda event: event.event == "stage_step" and event.step == 3)
    assert len(marked(mark)) >= 3  # the worker, the directory's process and its daemon: nobody hides from the mark
    events = drained(worker, mark)
    committed = max([3, *(event.step for event in events if event.event == "stage_step")])
    saved = [event.step for event in events if event.event == "checkpoint"]
    assert saved == [committed]

    run_id = scene.alone_config.run_id
    store = CheckpointStore(spec.state_folder / run_id / "stage-0", run_id, 0)
    assert store.steps() == [0, committed]
    assert store.load(committed)
