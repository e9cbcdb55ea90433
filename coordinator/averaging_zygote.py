"""A process that waits, with everything imported, to become the averaging process: a fork instead of an interpreter.

    with launching() as launcher:                    # first thing: before gRPC, CUDA, torch's and other threads
        ...
        averaging = await ReplicaAveraging.start(num_values=n, launcher=launcher)

A worker that averages would import torch and hivemind twice, which is half of what its joining costs. It cannot fork
when it wants to average: it holds threads then, and a GPU. So it forks a *zygote* before, which sleeps at the other end
of a socket until it is sent settings and descriptors, and then forks the averaging process, once or again.

    worker ── zygote ── averaging process ── p2pd        each is killed by the kernel when the one before it dies

Of the worker the zygote keeps stderr and its end of the socket. It has a process group of its own: Ctrl+C at a terminal
is the worker's to heed, which may still want to average while it drains.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import select
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

from coordinator import averaging_process, children
from coordinator.averaging_launch import FreshInterpreter, Launcher, Process, Settings

log = logging.getLogger(__name__)

ANSWER_TIMEOUT = timedelta(seconds=5)
"""For the zygote to fork, which takes it milliseconds; the caller is blocked meanwhile."""
CLOSE_TIMEOUT = timedelta(seconds=1)
MAX_MESSAGE_BYTES = 1 << 16


@contextlib.contextmanager
def launching() -> Iterator[Launcher]:
    """A zygote forked now, in the main thread; where the system has no such thing, a fresh interpreter each time."""
    launcher: Launcher = FreshInterpreter()
    if sys.platform == "linux":
        try:
            launcher = Zygote.start()
        except OSError as error:
            log.warning("no averaging process forked ahead: %s", error)
    try:
        yield launcher
    finally:
        launcher.close()


class Zygote:
    """A Launcher. If its process is lost, it goes on with fresh interpreters.

    Args:
        process: the zygote, a child of this process.
        control: our end of the socket to it.
    """

    def __init__(self, process: Process, control: socket.socket) -> None:
        self._process, self._control = process, control
        self._otherwise = FreshInterpreter()
        self._closed = False

    @classmethod
    def start(cls) -> Zygote:
        """Forks. Raises OSError where that, or Linux's descriptors of processes, is not to be had."""
        os.close(os.pidfd_open(os.getpid()))  # an old kernel says so here
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        parent_pid = os.getpid()
        gc.freeze()  # a collection would write to, and so copy, every page of objects that the processes share
        signals = (signal.SIGINT, signal.SIGTERM)
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # the parent's handlers must not run in the child
        try:
            pid = os.fork()
            if pid == 0:
                _be_zygote(theirs, parent_pid)
        except BaseException:
            ours.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
        ours.settimeout(ANSWER_TIMEOUT.total_seconds())
        return cls(_ByDescriptor(pid, os.pidfd_open(pid)), ours)

    @property
    def pid(self) -> int:
        return self._process.pid

    def launch(self, settings: Settings) -> Process:
        if not self._closed:
            try:
                return self._ask(settings)
            except OSError as error:
                log.warning("the averaging process is started afresh: %s: %s", type(error).__name__, error)
                self.close()  # it may still answer: nothing of that shall live
        return self._otherwise.launch(settings)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)  # closing is not enough: later forks hold copies
        self._control.close()
        if not self._process.wait(CLOSE_TIMEOUT):
            self._process.kill()
            self._process.wait()
        os.waitpid(self._process.pid, 0)

    def _ask(self, settings: Settings) -> Process:
        socket.send_fds(self._control, [settings.to_json().encode()], settings.descriptors)
        answer, descriptors, _, _ = socket.recv_fds(self._control, MAX_MESSAGE_BYTES, 1)
        if not descriptors:
            raise ConnectionResetError("the zygote has died")
        os.set_inheritable(descriptors[0], False)
        return _ByDescriptor(json.loads(answer)["pid"], descriptors[0])


class _ByDescriptor:
    """A process known by a descriptor (pidfd), which works for any but one's own child too, and never means another."""

    def __init__(self, pid: int, descriptor: int) -> None:
        self.pid = pid
        self._descriptor = descriptor

    def is_running(self) -> bool:
        return not self.wait(timedelta(0))

    def kill(self) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    def wait(self, within: timedelta | None = None) -> bool:
        """Also lets go of the descriptor once it has ended."""
        if self._descriptor < 0:
            return True
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        if not poll.poll(None if within is None else within / timedelta(milliseconds=1)):
            return False
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)
        return True


def _be_zygote(control: socket.socket, parent_pid: int) -> NoReturn:
    """The forked process's whole life. It never returns into what it was forked from."""
    try:
        _let_go_of_the_parent(control, parent_pid)
        _fork_when_asked(control)
    except BaseException:  # noqa: BLE001 - whatever it is, the parent sees the end and goes on without us
        traceback.print_exc()
    finally:
        os._exit(0)


def _let_go_of_the_parent(control: socket.socket, parent_pid: int) -> None:
    """Its signals, descriptors and log; not its death."""
    os.setpgrp()
    children.be_killed_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(2, 1)
    for number in [int(path.name) for path in Path("/proc/self/fd").iterdir()]:
        if number > 2 and number != control.fileno():
            with contextlib.suppress(OSError):  # the listing's own, which is closed already
                os.close(number)
    logging.getLogger().setLevel(logging.WARNING)


def _fork_when_asked(control: socket.socket) -> None:
    """Until the parent wants no more. Reaps what it has forked."""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    forked: dict[int, int] = {}  # process number by descriptor
    while True:
        for ready, _ in poll.poll():
            if ready != control.fileno():
                poll.unregister(ready)
                os.close(ready)
                os.waitpid(forked.pop(ready), 0)
                continue
            request, received, _, _ = socket.recv_fds(control, MAX_MESSAGE_BYTES, 3)
            if not request:
                return
            pid = _fork(Settings.from_json(request), received, unwanted=[control.fileno(), *forked])
            descriptor = os.pidfd_open(pid)
            forked[descriptor] = pid
            poll.register(descriptor, select.POLLIN)
            socket.send_fds(control, [json.dumps({"pid": pid}).encode()], [descriptor])


def _fork(told: Settings, received: list[int], unwanted: list[int]) -> int:
    """An averaging process with what was received, of which nothing stays here: its number. Raises OSError."""
    socket_fd, memory_fd, lock_fd = received
    settings = replace(told, parent_pid=os.getpid(), socket_fd=socket_fd, memory_fd=memory_fd, lock_fd=lock_fd)
    pid = os.fork()
    if pid == 0:
        try:
            children.be_killed_with_parent(settings.parent_pid)
            for descriptor in unwanted:
                os.close(descriptor)
            os.environ.update(settings.environment)
            tempfile.tempdir = None  # found out anew
            averaging_process.serve(settings)
        except BaseException:  # noqa: BLE001 - as in _be_zygote
            traceback.print_exc()
        finally:
            os._exit(1)
    for descriptor in received:
        os.close(descriptor)
    return pid
