"""Children die with their parent, and ending a child ends its tree."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import psutil
import pytest

from coordinator.children import descendants_of
from node.processes import BoundedLog, describe_exit, kill_tree, start_child, terminate_then_kill

SLEEP = "import time; time.sleep(60)"
TREE = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {SLEEP!r}])
print("ready", flush=True)
child.wait()
"""
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + TREE
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")


def start(code: str, folder: Path) -> subprocess.Popen[bytes]:
    child = start_child([sys.executable, "-c", code], log=BoundedLog(folder / "log"))
    assert child.stdout is not None
    if "ready" in code:
        assert child.stdout.readline() == b"ready\n"
    return child


def gone(pids: list[int], seconds: float = 10) -> bool:
    """No such process, or only a zombie that somebody else has to reap."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not any(alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("code", [TREE, STUBBORN])
def test_terminate_then_kill_leaves_nobody_of_the_tree(tmp_path: Path, code: str) -> None:
    child = start(code, tmp_path)
    family = [child.pid, *(p.pid for p in descendants_of(child.pid))]
    assert len(family) == 2
    return_code = terminate_then_kill(child, timedelta(seconds=0.5))
    assert return_code == (-signal.SIGTERM if code is TREE else -signal.SIGKILL)
    assert gone(family)
    assert child.stdout is not None
    child.stdout.close()


def test_kill_tree_of_the_dead_does_nothing(tmp_path: Path) -> None:
    child = start("pass", tmp_path)
    child.wait(10)
    kill_tree(child.pid)
    assert child.stdout is not None
    child.stdout.close()


@linux
def test_a_child_dies_with_its_killed_parent(tmp_path: Path) -> None:
    parent_code = f"""
import sys, time
from pathlib import Path
from node.processes import BoundedLog, start_child
print(start_child([sys.executable, "-c", {SLEEP!r}], log=BoundedLog(Path({str(tmp_path / "log")!r}))).pid, flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", parent_code], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert alive(child_pid)
        parent.kill()
        assert gone([child_pid])


@linux
def test_a_child_whose_parent_died_before_it_could_ask_ends_itself() -> None:
    code = "import os, coordinator.children as c; c.be_killed_with_parent(os.getppid() + 1); print('alive')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=False)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == b""


def test_a_child_has_its_own_session_so_that_the_terminals_interrupt_is_ours(tmp_path: Path) -> None:
    child = start(TREE, tmp_path)
    try:
        assert os.getsid(child.pid) == child.pid
    finally:
        terminate_then_kill(child, timedelta(seconds=5))
        assert child.stdout is not None
        child.stdout.close()


def test_a_log_stays_within_its_bound_and_keeps_the_newest_lines(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "deep" / "log", limit_bytes=1000)
    for number in range(1000):
        log.write(f"line {number}")
        size_bytes = sum(path.stat().st_size for path in (tmp_path / "deep").iterdir())
        assert size_bytes <= 2000 + 20
    assert log.tail(2) == ["line 998", "line 999"]


def test_trimming_under_an_open_writer_loses_no_later_line(tmp_path: Path) -> None:
    log = BoundedLog(tmp_path / "log", limit_bytes=100)
    fd = log.open()
    os.write(fd, b"x" * 200 + b"\n")
    log.trim()
    os.write(fd, b"after\n")
    os.close(fd)
    assert log.path.read_bytes() == b"after\n"  # no hole of zeros before it
    assert (tmp_path / "log.1").stat().st_size == 100


@pytest.mark.parametrize(
    ("code", "text"), [(3, "exit code 3"), (-9, "killed by SIGKILL"), (-99, "killed by signal 99")]
)
def test_an_exit_is_described_in_words(code: int, text: str) -> None:
    assert describe_exit(code) == text
