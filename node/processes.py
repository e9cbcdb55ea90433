"""Child processes that never outlive their parent.

Three nets, because any process may be killed at any moment:
- a child dies with its parent (PR_SET_PDEATHSIG, Linux);
- orphans of a dead child come to us instead of to init (PR_SET_CHILD_SUBREAPER, Linux): we end and reap them;
- whoever ends a child ends its whole tree.
Elsewhere than on Linux the first two do nothing, and only the third holds.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import psutil

from coordinator.children import be_killed_with_parent, descendants_of, kill_all

_PR_SET_CHILD_SUBREAPER = 36

# Loaded before any fork: a forked child must not import or dlopen.
_prctl: Callable[..., int] | None = ctypes.CDLL(None, use_errno=True).prctl if sys.platform == "linux" else None


def become_subreaper() -> bool:
    """Adopts orphaned descendants from now on. False where the system cannot."""
    return _prctl is not None and _prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0


class BoundedLog:
    """A log file that children append to directly, so that nothing is lost with whoever would copy it.

    Kept within twice `limit_bytes` whenever it is trimmed: what is beyond it moves to `<name>.1`, which is overwritten.
    """

    def __init__(self, path: Path, limit_bytes: int = 4 << 20) -> None:
        self.path = path
        self._limit_bytes = limit_bytes

    def open(self) -> int:
        """A descriptor to append with; the caller closes it. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.trim()
        return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def write(self, text: str) -> None:
        """Appends one line."""
        fd = self.open()
        try:
            os.write(fd, text.encode("utf-8", "replace") + b"\n")
        finally:
            os.close(fd)

    def trim(self) -> None:
        """Moves the newest part aside and empties the file, once it is too long. Appenders go on at its new end."""
        try:
            size_bytes = self.path.stat().st_size
        except FileNotFoundError:
            return
        if size_bytes <= self._limit_bytes:
            return
        with contextlib.suppress(OSError), self.path.open("rb") as source:  # a full disk costs the copy, no more
            source.seek(size_bytes - self._limit_bytes)
            self.path.with_name(self.path.name + ".1").write_bytes(source.read(self._limit_bytes))
        os.truncate(self.path, 0)

    def tail(self, num_lines: int) -> list[str]:
        """The last lines."""
        try:
            with self.path.open("rb") as file:
                file.seek(max(0, self.path.stat().st_size - (64 << 10)))
                return file.read().decode("utf-8", "replace").splitlines()[-num_lines:]
        except FileNotFoundError:
            return []


def start_child(
    command: Sequence[str],
    *,
    log: BoundedLog,
    environment: Mapping[str, str] | None = None,
    death_signal: int = signal.SIGKILL,
    stdin: bool = False,
) -> subprocess.Popen[bytes]:
    """Starts a child in a session of its own (a Ctrl+C at the terminal is ours alone to pass on) that dies with us.

    Its stdout is a pipe, its stderr goes to the log; stdin is a pipe when asked for, else empty. Raises OSError.
    """
    parent_pid = os.getpid()
    fd = log.open()
    try:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=fd,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
            preexec_fn=lambda: be_killed_with_parent(parent_pid, death_signal),  # noqa: PLW1509 - one prctl, nothing else
        )
    finally:
        os.close(fd)


def describe_exit(return_code: int) -> str:
    """'exit code 3' or 'killed by SIGKILL'."""
    if return_code >= 0:
        return f"exit code {return_code}"
    try:
        return f"killed by {signal.Signals(-return_code).name}"
    except ValueError:
        return f"killed by signal {-return_code}"


def kill_tree(pid: int) -> None:
    """SIGKILL to a process and all its descendants. The caller reaps its own children."""
    family = descendants_of(pid)
    with contextlib.suppress(psutil.NoSuchProcess):
        family.insert(0, psutil.Process(pid))
    kill_all(family)


def terminate_then_kill(child: subprocess.Popen[bytes], timeout: timedelta) -> int:
    """SIGTERM, time to leave, then SIGKILL to whatever of its tree remains. Returns its return code."""
    family = descendants_of(child.pid)
    if child.poll() is None:
        child.terminate()
    try:
        return child.wait(timeout.total_seconds())
    except subprocess.TimeoutExpired:
        kill_tree(child.pid)
        return child.wait()
    finally:
        kill_all(family)


def sweep_orphans(keep: Iterable[int] = (), grace: timedelta = timedelta(seconds=2)) -> list[str]:
    """Ends and reaps every child of ours but those in `keep` and their descendants. Returns the names of those ended.

    After a worker died, what it had started (DHT peer, p2pd, torch_shm_manager) is ours: we are the subreaper. Each
    gets SIGTERM and some time before SIGKILL; the sockets it leaves in the file system are removed. One orphan's death
    may bring its children to us, hence the loop.
    """
    kept = set(keep)
    ended: dict[int, str] = {}
    sockets: set[Path] = set()
    started = time.monotonic()
    while orphans := [child for child in psutil.Process().children() if child.pid not in kept]:
        waited = timedelta(seconds=time.monotonic() - started)
        if waited > 2 * grace:
            break  # not even SIGKILL helps: stuck in the kernel
        for orphan in orphans:
            if not _reaped(orphan):
                sockets |= _sockets_of(orphan) if orphan.pid not in ended else set()
                _end_orphan(orphan, ended, by_force=waited > grace)
        time.sleep(0.01)
    for socket in sockets:
        _remove_socket(socket)
    return list(ended.values())


def _reaped(orphan: psutil.Process) -> bool:
    """True when it was dead, and now is gone."""
    try:
        if orphan.status() != psutil.STATUS_ZOMBIE:
            return False
        os.waitpid(orphan.pid, os.WNOHANG)
    except (psutil.NoSuchProcess, ChildProcessError):
        pass
    return True


def _end_orphan(orphan: psutil.Process, ended: dict[int, str], *, by_force: bool) -> None:
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        if by_force:
            kill_tree(orphan.pid)
        elif orphan.pid not in ended:
            ended[orphan.pid] = orphan.name()
            orphan.terminate()


def _sockets_of(process: psutil.Process) -> set[Path]:
    """Unix sockets that it listens on, in the file system."""
    try:
        connections = process.net_connections(kind="unix")
    except psutil.Error:
        return set()
    return {Path(str(connection.laddr)) for connection in connections if str(connection.laddr).startswith("/")}


def _remove_socket(path: Path) -> None:
    """With the folder made for it, if that is its only use."""
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
        if path.parent.name.startswith("torch-shm-dir-"):
            path.parent.rmdir()
