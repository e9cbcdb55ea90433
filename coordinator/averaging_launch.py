"""How an averaging process comes to be: whoever wants one fills in `Settings`, a `Launcher` starts it.

A fresh interpreter works everywhere; `averaging_zygote` has a way that costs less, for who can fork early.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Protocol

COMMAND = (sys.executable, "-m", "coordinator.averaging_process")
END_TIMEOUT = timedelta(seconds=5)
"""For a given-up round to end in its process; one that cannot end it is of no use and leaves."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an averaging process is told, in JSON. A launcher may exchange the first four for what they are there."""

    parent_pid: int
    socket_fd: int
    memory_fd: int  # 2 * num_values float32: what goes in, then what comes out
    lock_fd: int  # of the folder: held, so that nobody takes it for a dead one's
    num_values: int
    wire: str
    seed: str  # of the identity, hexadecimal
    host: str
    announce: str
    port: int  # 0: any
    folder: str  # its own: it is removed in the end

    @classmethod
    def from_json(cls, text: str | bytes) -> Settings:
        return cls(**json.loads(text))

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def descriptors(self) -> tuple[int, int, int]:
        """Socket, memory, lock: all that the process needs of its parent's."""
        return self.socket_fd, self.memory_fd, self.lock_fd

    @property
    def environment(self) -> dict[str, str]:
        """What differs from the parent's: no GPU, one thread, its own place for sockets."""
        return {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "TMPDIR": self.folder}


class Process(Protocol):
    """A process that was started here, whoever is its parent."""

    @property
    def pid(self) -> int: ...

    def is_running(self) -> bool:
        """False also for a zombie."""

    def kill(self) -> None:
        """SIGKILL, if it still runs."""

    def wait(self, within: timedelta | None = None) -> bool:
        """Blocks until it has ended; False: it has not within that time."""


class Launcher(Protocol):
    """Starts averaging processes."""

    def launch(self, settings: Settings) -> Process:
        """A process that does as told and has copies of `settings.descriptors`. Raises OSError."""

    def close(self) -> None:
        """No more are wanted, and those that were started have ended. Safe to call twice."""


class FreshInterpreter:
    """A new Python process each time, which spends seconds of a core on the imports of torch and hivemind."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._command = command

    def launch(self, settings: Settings) -> Process:
        return _Started(
            subprocess.Popen(
                [*self._command, settings.to_json()],
                stdin=subprocess.DEVNULL,
                pass_fds=settings.descriptors,
                env={**os.environ, **settings.environment},
            )
        )

    def close(self) -> None:
        pass


class _Started:
    """A child of this process."""

    def __init__(self, child: subprocess.Popen[bytes]) -> None:
        self._child = child

    @property
    def pid(self) -> int:
        return self._child.pid

    def is_running(self) -> bool:
        return self._child.poll() is None

    def kill(self) -> None:
        self._child.kill()

    def wait(self, within: timedelta | None = None) -> bool:
        try:
            self._child.wait(within.total_seconds() if within is not None else None)
        except subprocess.TimeoutExpired:
            return False
        return True
