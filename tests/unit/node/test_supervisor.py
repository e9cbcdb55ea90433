"""The supervisor restarts, gives up, drains and kills, and always says so."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import textwrap
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.errors import StateFolderBusy, WorkerCrashed
from node.events import Beside, Complete, Error, Event, Worker, WorkerSpec
from node.keeper import BackOff, Ended, Outcome
from node.supervisor import Supervisor, locked_folder

QUICK = BackOff(first=timedelta(milliseconds=10), give_up_after=4)
PREAMBLE = """
import json, os, signal, sys, time
from pathlib import Path
from node.events import *
spec = read_spec(sys.stdin.buffer)
lives = spec.state_folder / "lives"
life = int(lives.read_text()) + 1 if lives.exists() else 1
lives.write_text(str(life))
"""


def supervisor(folder: Path, code: str, events: list[Event], **options: object) -> Supervisor:
    """With a stand-in worker that runs `code`, `life` being the number of its life."""
    spec = WorkerSpec(ticket="t", state_folder=folder, identity_file=folder / "identity")
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(code)]
    settings: dict[str, object] = {"command": command, "back_off": QUICK, **options}
    return Supervisor(spec, events.append, **settings)  # type: ignore[arg-type]


def run(subject: Supervisor) -> Ended:
    return asyncio.run(asyncio.wait_for(subject.run(), 30))


def test_a_worker_that_finishes_ends_the_supervisor(tmp_path: Path) -> None:
    events: list[Event] = []
    ended = run(supervisor(tmp_path, "emit(Complete(stage=0, step=3))", events))
    assert ended == Ended(Outcome.COMPLETE)
    assert [event.event for event in events] == ["worker", "complete", "worker"]
    assert events[1] == Complete(stage=0, step=3)


def test_a_killed_worker_is_restarted_and_chooses_for_itself_again(tmp_path: Path) -> None:
    """It finds its old place by its checkpoints and its record; pinned to a stage it could never give way."""
    events: list[Event] = []
    code = """
        if life == 1:
            assert spec.stage is None
            emit(Assigned(stage=2, num_stages=4, reason="needed"))
            os.kill(os.getpid(), signal.SIGKILL)
        assert spec.stage is None
        emit(Complete(stage=2, step=1))
    """
    ended = run(supervisor(tmp_path, code, events))
    assert ended.outcome is Outcome.COMPLETE
    assert Complete(stage=2, step=1) in events
    states = [(event.state, event.detail) for event in events if isinstance(event, Worker) and event.state != "started"]
    assert states == [("exited", "killed by SIGKILL"), ("restarting", "killed by SIGKILL"), ("exited", "exit code 0")]


def test_exit_75_restarts_at_once(tmp_path: Path) -> None:
    events: list[Event] = []
    slow = BackOff(first=timedelta(seconds=60), jitter=0)
    ended = run(supervisor(tmp_path, "sys.exit(0 if life == 4 else 75)", events, back_off=slow))
    assert ended.outcome is Outcome.COMPLETE
    assert [event.in_seconds for event in events if isinstance(event, Worker) and event.state == "restarting"] == [
        0
    ] * 3


def test_a_refusal_is_passed_on_and_not_retried(tmp_path: Path) -> None:
    events: list[Event] = []
    error = Error(code=310, cause="stage 1 is served already", remedy="choose another")
    code = 'emit(Error(code=310, cause="stage 1 is served already", remedy="choose another")); sys.exit(78)'
    assert run(supervisor(tmp_path, code, events)) == Ended(Outcome.REFUSED, error)
    assert (tmp_path / "lives").read_text() == "1"


def test_a_worker_that_keeps_crashing_is_given_up_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(WorkerCrashed, match=r"died 4 times in a row \(exit code 1\).*ZeroDivisionError") as caught:
        run(supervisor(tmp_path, "1 / 0", []))
    assert caught.value.code == 405
    assert str(tmp_path / "worker.log") in caught.value.cause


def test_a_command_that_cannot_be_started_is_an_error_and_not_a_loop(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(supervisor(tmp_path, "", [], command=["/nowhere/at-all"]))


def test_garbage_on_stdout_costs_nothing_and_is_logged(tmp_path: Path) -> None:
    events: list[Event] = []
    code = """
        print("hello from a library"); print("x" * 3_000_000, flush=True)
        os.write(1, b'\\xff\\xfe{"event":"complete"\\n')
        emit(Complete(stage=0, step=1))
        os.write(1, b"no newline at the end")
    """
    assert run(supervisor(tmp_path, code, events)).outcome is Outcome.COMPLETE
    assert [event for event in events if not isinstance(event, Worker)] == [Complete(stage=0, step=1)]
    assert "hello from a library" in (tmp_path / "worker.log").read_text()


def test_a_second_supervisor_of_the_same_folder_is_refused(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(StateFolderBusy, match=str(os.getpid())) as caught:
        run(supervisor(tmp_path, "", []))
    assert caught.value.code == 108
    assert run(supervisor(tmp_path, "", [])).outcome is Outcome.COMPLETE  # free again


DRAINS = """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    emit(Complete(stage=0, step=0))
    time.sleep(30)
"""
IGNORES = DRAINS.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_signal_drains(tmp_path: Path, number: int) -> None:
    ended = _signalled(supervisor(tmp_path, DRAINS, []), number, times=1)
    assert ended.outcome is Outcome.DRAINED


def test_two_signals_kill_a_worker_that_will_not_leave(tmp_path: Path) -> None:
    ended = _signalled(supervisor(tmp_path, IGNORES, []), signal.SIGINT, times=2)
    assert ended.outcome is Outcome.KILLED


def test_draining_is_bounded_in_time(tmp_path: Path) -> None:
    subject = supervisor(tmp_path, IGNORES, [], drain_timeout=timedelta(seconds=0.3))
    ended = _signalled(subject, signal.SIGTERM, times=1)
    assert ended.outcome is Outcome.KILLED


def test_a_signal_during_the_wait_for_a_restart_ends_it(tmp_path: Path) -> None:
    subject = supervisor(tmp_path, "sys.exit(1)", [], back_off=BackOff(first=timedelta(minutes=5), jitter=0))
    ended = _signalled(subject, signal.SIGINT, times=1, when="restarting")
    assert ended.outcome is Outcome.DRAINED


def test_the_handlers_of_before_come_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(supervisor(tmp_path, "", []))
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# -- several workers --------------------------------------------------------------------------------------------

COVERS = """
    if spec.beside is None:
        emit(Cover(stage=1, reason="nobody serves it", beside=Beside(node_id="me", throughput=2.0, stand_in=True)))
"""


def test_a_further_worker_has_a_folder_an_identity_and_ports_of_its_own(tmp_path: Path) -> None:
    told: list[tuple[int, Event]] = []
    code = (
        COVERS
        + """
        deadline = time.monotonic() + 20
        while not (spec.state_folder / "beside-1" / "over").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(2)  # until it has ended, on a busy machine
    else:
        print(spec.model_dump_json(), file=sys.stderr)
        emit(StageStep(stage=1, step=1, loss=None, tokens=1, seconds=1, microbatches=1, compute_seconds=1,
                       wait_seconds=0, gradient_norm=1, link=None))
        (spec.state_folder / "over").touch()
    """
    )
    subject = supervisor(tmp_path, code, [], on_beside=lambda stage, event: told.append((stage, event)))
    subject._spec = subject._spec.model_copy(
        update={"port": 4000, "metrics_port": 65530, "also": (1,), "max_stages": 0}
    )
    assert run(subject).outcome is Outcome.COMPLETE
    spec = WorkerSpec.model_validate_json((tmp_path / "beside-1" / "worker.log").read_text().splitlines()[0])
    assert spec.state_folder == tmp_path / "beside-1"
    assert spec.identity_file == tmp_path / "beside-1" / "identity.key"
    assert (spec.stage, spec.also, spec.max_stages) == (1, (), 1)
    assert (spec.port, spec.dht_port, spec.metrics_port) == (4020, 0, 0)  # far from the first one's, or any
    assert spec.beside == Beside(node_id="me", throughput=2.0, stand_in=True)
    assert {stage for stage, _ in told} == {1}
    workers = [event for _, event in told if isinstance(event, Worker)]
    assert [(event.state, event.stage) for event in workers] == [("started", 1), ("exited", 1)]


def test_a_further_worker_comes_and_dies_without_the_others_noticing(tmp_path: Path) -> None:
    """What the first one had started lives on when the tree of another one is swept."""
    events: list[Event] = []
    code = (
        COVERS
        + """
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
        deadline = time.monotonic() + 20
        while not (spec.state_folder / "beside-1" / "over").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.2)
        assert child.poll() is None and spec.num_beside == 0
        emit(Complete(stage=0, step=life))
    elif life < 3:
        subprocess = __import__("subprocess")
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"], start_new_session=True)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        (spec.state_folder / "over").touch()
    """
    )
    assert run(supervisor(tmp_path, code, events)).outcome is Outcome.COMPLETE
    assert Complete(stage=0, step=1) in events  # in its first life
    deaths = [event.stage for event in events if isinstance(event, Worker) and event.state == "restarting"]
    assert deaths == [1, 1]


@pytest.mark.parametrize("how", ['emit(Error(code=403, cause="c", remedy="r")); sys.exit(78)', "1 / 0"])
def test_a_further_worker_that_cannot_serve_is_not_asked_again_and_again(tmp_path: Path, how: str) -> None:
    events: list[Event] = []
    code = COVERS + (
        f"""
        deadline, more = time.monotonic() + 20, 20
        while more and time.monotonic() < deadline:
            time.sleep(0.1)
            emit(Cover(stage=1, reason="again", beside=Beside(node_id="me", throughput=2.0, stand_in=True)))
            more -= (spec.state_folder / "beside-1" / "lives").exists()  # two more seconds, on a busy machine
    else:
        {how}
    """
    )
    back_off = BackOff(first=timedelta(milliseconds=1), give_up_after=1)
    assert run(supervisor(tmp_path, code, events, back_off=back_off)).outcome is Outcome.COMPLETE
    assert [event.stage for event in events if isinstance(event, Error)] == [1]
    assert (tmp_path / "beside-1" / "lives").read_text() == "1"


@pytest.mark.parametrize(("worker", "outcome"), [(0, Outcome.DRAINED), (1, Outcome.KILLED), (2, Outcome.KILLED)])
def test_one_signal_drains_all_workers_and_two_kill_them(tmp_path: Path, worker: int, outcome: Outcome) -> None:
    """`worker`: who will not leave; 0: all do."""
    code = (
        COVERS
        + f"""
    number = 1 if spec.beside is None else 2
    signal.signal(signal.SIGTERM, signal.SIG_IGN if number == {worker} else lambda *_: sys.exit(0))
    emit(Complete(stage=number, step=0)) if number == 2 else None
    time.sleep(30)
    """
    )
    ended = _signalled(supervisor(tmp_path, code, []), signal.SIGINT, times=1 if worker == 0 else 2)
    assert ended.outcome is outcome


def test_when_the_first_worker_is_refused_the_others_leave(tmp_path: Path) -> None:
    events: list[Event] = []
    code = (
        COVERS
        + """
        while not (spec.state_folder / "beside-1" / "ready").exists(): time.sleep(0.02)
        sys.exit(78)
    signal.signal(signal.SIGTERM, lambda *_: (emit(Complete(stage=1, step=9)), sys.exit(0)))
    (spec.state_folder / "ready").touch()
    time.sleep(30)
    """
    )
    assert run(supervisor(tmp_path, code, events)).outcome is Outcome.REFUSED
    assert Complete(stage=1, step=9) in events


def _signalled(subject: Supervisor, number: int, times: int, when: str = "complete") -> Ended:
    """Runs it and sends signals to this process at the event `when`."""

    def send() -> None:
        for _ in range(times):
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # equal signals at once would be merged

    def on_event(event: Event) -> None:
        if when in (event.event, getattr(event, "state", None)):
            threading.Thread(target=send).start()

    subject._on_event = on_event
    return run(subject)


@given(lives=st.lists(st.floats(0, 59), max_size=20), chance=st.floats(0, 1))
def test_back_off_grows_within_its_bounds_and_then_gives_up(lives: list[float], chance: float) -> None:
    back_off = BackOff()
    for number, lived in enumerate(lives, start=1):
        back_off, wait = back_off.after(timedelta(seconds=lived), chance=lambda: chance)
        if number >= back_off.give_up_after:
            assert wait is None
            break
        assert wait is not None
        full = min(back_off.longest, back_off.first * 2 ** (number - 1))
        assert full * 0.5 <= wait <= full


def test_a_healthy_minute_is_forgiveness() -> None:
    back_off = BackOff(jitter=0)
    for _ in range(100):
        back_off, wait = back_off.after(timedelta(seconds=61))
        assert wait == timedelta(seconds=1)


def test_who_asks_for_a_restart_for_ever_is_treated_as_crashing() -> None:
    back_off = BackOff(jitter=0)
    waits = []
    while len(waits) < 100:
        back_off, wait = back_off.after(timedelta(seconds=1), asked=True)
        waits.append(wait)
        if wait is None:
            break
    assert waits[: back_off.free_restarts] == [timedelta(0)] * back_off.free_restarts
    assert waits[-1] is None
