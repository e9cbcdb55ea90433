"""Runs the cells of a convergence grid, several at a time, each a process of its own; what is done stays done.

A cell's points are appended to `<key>.jsonl` in the work folder as they come, its state lies beside them.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, cast

from node.bench.convergence_grid import Cell, Grid, cells_to_run, num_cells
from node.bench.convergence_point import CellSpec, Point
from node.errors import MachineUnfit
from node.processes import BoundedLog, describe_exit, start_child, terminate_then_kill

LEAVING = timedelta(seconds=5)
OnPoint = Callable[[Point], None]
OnProgress = Callable[[str, float], None]
"""Told what is being trained, and the share of the whole grid's steps that is done."""


class CellFiles:
    """The work folder: points and states of cells, by their key."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def points(self, key: str) -> list[Point]:
        """All points of a cell so far, in order of their steps. A line cut short by a crash is left out."""
        try:
            lines = (self._folder / f"{key}.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [Point.model_validate_json(line) for line in lines if line.endswith("\n")]

    def all_points(self, grid: Grid) -> list[Point]:
        """Of every training of a grid that is done, in the grid's order."""
        return [point for key in self.final_losses(grid) for point in self.points(key)]

    def append(self, key: str, point: Point) -> None:
        path = self._folder / f"{key}.jsonl"
        known = self.points(key)
        with path.open("w") as file:  # rewritten: a torn last line must not stay in the middle
            file.writelines(old.model_dump_json() + "\n" for old in known if old.step < point.step)
            file.write(point.model_dump_json() + "\n")

    def state_file(self, key: str) -> Path:
        return self._folder / f"{key}.safetensors"

    def log(self, key: str) -> BoundedLog:
        return BoundedLog(self._folder / f"{key}.log")

    def is_done(self, cell: Cell) -> bool:
        points = self.points(cell.key)
        return bool(points) and points[-1].step == cell.config.plan.steps

    def final_losses(self, grid: Grid) -> dict[str, float]:
        """Validation losses of all done cells of a grid, by key."""
        losses: dict[str, float] = {}
        while done := [cell for cell in cells_to_run(grid, losses) if self.is_done(cell)]:
            losses |= {cell.key: self.points(cell.key)[-1].val_loss for cell in done}
        return losses


class Pool:
    """Processes that train cells.

    Args:
        jobs: cells at a time; each has an equal share of the cores.
    """

    def __init__(self, grid: Grid, files: CellFiles, jobs: int, on_point: OnPoint, on_progress: OnProgress) -> None:
        self._grid, self._files, self._jobs = grid, files, jobs
        self._on_point, self._on_progress = on_point, on_progress
        self._running: dict[str, _Running] = {}
        self._selector = selectors.DefaultSelector()
        self._losses: dict[str, float] = {}

    def run(self) -> None:
        """Until every cell is done. Raises MachineUnfit when one fails; no process is left then, or at Ctrl+C."""
        try:
            while True:
                self._losses = self._files.final_losses(self._grid)
                self._start_more()
                if not self._running:
                    return
                for key, _ in self._selector.select(timeout=10.0):
                    self._read(key.data)
        finally:
            for running in self._running.values():
                running.end()
            self._selector.close()

    def _start_more(self) -> None:
        for cell in cells_to_run(self._grid, self._losses):
            if len(self._running) >= self._jobs:
                return
            if cell.key not in self._running:
                self._start(cell)

    def _start(self, cell: Cell) -> None:
        key = cell.key
        points = self._files.points(key)
        if not points:  # a state without points is of another life
            self._files.state_file(key).unlink(missing_ok=True)
        spec = CellSpec(
            variant=cell.variant,
            rate=cell.rate,
            seed=cell.seed,
            run=cell.config.model_dump(),
            state_file=self._files.state_file(key),
            threads=max(1, len(os.sched_getaffinity(0)) // self._jobs),
        )
        command = [sys.executable, "-m", "node.bench.convergence_cell"]
        child = start_child(command, log=self._files.log(key), stdin=True)
        running = self._running[key] = _Running(cell, child, points[-1].step if points else 0)
        running.tell(spec)
        self._selector.register(running.pipe, selectors.EVENT_READ, running)

    def _read(self, running: _Running) -> None:
        """What a process has said since; at its end, whether it did what it should."""
        chunk = os.read(running.pipe.fileno(), 1 << 16)
        for line in running.lines(chunk):
            self._take(running, line)
        if not chunk:
            self._ended(running)

    def _take(self, running: _Running, line: bytes) -> None:
        fields: Mapping[str, object] = json.loads(line)
        if fields["event"] == "evaluation":
            point = Point.model_validate(fields)
            self._files.append(running.cell.key, point)
            running.step = point.step
            self._on_point(point)
        else:
            running.step = int(str(fields["step"]))
        self._on_progress(running.text, self._share_done())

    def _ended(self, running: _Running) -> None:
        key = running.cell.key
        self._selector.unregister(running.pipe)
        code = running.end()
        del self._running[key]
        if not self._files.is_done(running.cell):
            log = self._files.log(key)
            last = (log.tail(1) or [""])[0]
            raise MachineUnfit(
                f"training {key} ended early ({describe_exit(code)}): {last}; log: {log.path}",
                remedy="read its log; the same command goes on from the last evaluation",
            )
        self._files.state_file(key).unlink(missing_ok=True)

    def _share_done(self) -> float:
        done = len(self._losses) + sum(running.share for running in self._running.values())
        return min(1.0, done / num_cells(self._grid))


class _Running:
    """One process."""

    def __init__(self, cell: Cell, child: subprocess.Popen[bytes], step: int) -> None:
        self.cell, self.step = cell, step
        self._child = child
        self._rest = b""

    @property
    def pipe(self) -> IO[bytes]:
        """Its stdout."""
        return cast(IO[bytes], self._child.stdout)  # `start_child` always makes one

    def tell(self, spec: CellSpec) -> None:
        with cast(IO[bytes], self._child.stdin) as stdin:
            stdin.write(spec.model_dump_json().encode() + b"\n")

    def end(self) -> int:
        """However it stands; its return code."""
        code = terminate_then_kill(self._child, LEAVING)
        self.pipe.close()
        return code

    @property
    def share(self) -> float:
        return self.step / self.cell.config.plan.steps

    @property
    def text(self) -> str:
        rate = f", rate x{self.cell.rate:g}" if self.cell.rate != 1 else ""
        return f"{self.cell.variant}{rate}, seed {self.cell.seed}: step {self.step} of {self.cell.config.plan.steps}"

    def lines(self, chunk: bytes) -> list[bytes]:
        *whole, self._rest = (self._rest + chunk).split(b"\n")
        return whole
