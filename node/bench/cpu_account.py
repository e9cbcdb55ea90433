"""Processor time by what it was for, read from /proc: ours by process and thread, and the whole machine's. Linux only.

A swarm on one machine shares its cores among all its processes, so that wall times of one stage say little. Processor
seconds of everyone add up to cores x wall time, and what is left is idle.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

_NANO = 1e-9


@dataclass(frozen=True, slots=True)
class ProcessTimes:
    """Processor seconds of one process since it started."""

    main_thread: float
    other_threads: Mapping[int, float]  # by thread id; those that ended are missing

    @property
    def total(self) -> float:
        return self.main_thread + sum(self.other_threads.values())


@dataclass(frozen=True, slots=True)
class Sample:
    """Processor seconds at one moment."""

    at: float
    machine_seconds: float  # everything on the cores that we may use, whoever ran it
    processes: Mapping[int, ProcessTimes]
    workers: frozenset[int]
    worker_children: frozenset[int]  # directory processes that workers have started


@dataclass(frozen=True, slots=True)
class CpuAccount:
    """Processor seconds between two samples, by what they were for."""

    wall_seconds: float
    cores: int
    device_threads: float  # of all workers: the busiest thread besides the main one
    event_loops: float  # of all workers: their main threads
    transport_threads: float  # of all workers: gRPC's and all others
    directory: float  # DHT and libp2p processes of the workers
    others_of_ours: float  # supervisors, coordinator with its directory, this benchmark
    foreign: float  # everything else that ran on the machine meanwhile

    @property
    def idle(self) -> float:
        spent = self.device_threads + self.event_loops + self.transport_threads + self.directory + self.others_of_ours
        return max(0.0, self.cores * self.wall_seconds - spent - self.foreign)

    @property
    def foreign_share(self) -> float:
        """Share of the cores that was taken by programs that have nothing to do with us."""
        return self.foreign / (self.cores * self.wall_seconds)


def sample(workers: Iterable[int] = ()) -> Sample:
    """Of this process and all its descendants; `workers` are the process ids of the stages' workers."""
    worker_pids = frozenset(workers)
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    children: set[int] = set()
    for pid in worker_pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            children |= {child.pid for child in psutil.Process(pid).children(recursive=True)}
    times = {process.pid: found for process in ours if (found := _process_times(process.pid)) is not None}
    return Sample(time.monotonic(), _machine_seconds(), times, worker_pids, frozenset(children))


def between(before: Sample, after: Sample) -> CpuAccount:
    """What was spent from one sample to the other."""
    device = loops = transport = directory = others = 0.0
    for pid, now in after.processes.items():
        then = before.processes.get(pid, ProcessTimes(0.0, {}))
        main = now.main_thread - then.main_thread
        rest = [seconds - then.other_threads.get(thread, 0.0) for thread, seconds in now.other_threads.items()]
        if pid in after.workers:
            busiest = max(rest, default=0.0)
            device, loops, transport = device + busiest, loops + main, transport + sum(rest) - busiest
        elif pid in after.worker_children:
            directory += main + sum(rest)
        else:
            others += main + sum(rest)
    ours = device + loops + transport + directory + others
    return CpuAccount(
        wall_seconds=after.at - before.at,
        cores=len(os.sched_getaffinity(0)),
        device_threads=device,
        event_loops=loops,
        transport_threads=transport,
        directory=directory,
        others_of_ours=others,
        foreign=max(0.0, after.machine_seconds - before.machine_seconds - ours),
    )


def _process_times(pid: int) -> ProcessTimes | None:
    """None for a process that is gone."""
    main, others = 0.0, {}
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            seconds = int((task / "schedstat").read_text().split()[0]) * _NANO
            if int(task.name) == pid:
                main = seconds
            else:
                others[int(task.name)] = seconds
    except (OSError, IndexError):  # it, or one of its threads, ended while we looked
        if not Path(f"/proc/{pid}").exists():
            return None
    return ProcessTimes(main, others)


def _machine_seconds() -> float:
    """Busy time of the cores that we may use, since the machine started."""
    ours = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    total = 0
    for line in Path("/proc/stat").read_text().splitlines():
        name, *ticks = line.split()
        if name in ours:
            user, nice, system, _idle, _iowait, *rest = map(int, ticks)
            total += user + nice + system + sum(rest[:3])  # interrupts, soft interrupts, stolen by the host
    return total / os.sysconf("SC_CLK_TCK")
