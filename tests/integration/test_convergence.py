"""The convergence benchmark trains for real, and what was interrupted ends as if it had not been."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from node.bench.convergence_cell import Told, train
from node.bench.convergence_point import CellSpec, Point
from node.config import preset
from node.data import load_corpus
from node.unsplit import UnsplitModel

pytestmark = pytest.mark.processes

GRID = """
name = "two"
preset = "tiny"
seeds = [0]
run.plan = { steps = 6, evaluate_every = 2 }

[[variants]]
name = "ours"
title = "ours"
role = "ours_128x"

[[variants]]
name = "fair"
title = "fair"
role = "fair"
run.bottleneck = { width = 64, projection = "none" }
run.codec = { forward = "none", backward = "none" }
"""


class Stopped(Exception):
    pass


def points_of(spec: CellSpec, stop_after: int | None = None) -> list[Point]:
    points: list[Point] = []

    def on_point(point: Point) -> None:
        if stop_after is not None and point.step > stop_after:
            raise Stopped
        points.append(point)

    train(spec, Told(point=on_point, progress=lambda _step: None))
    return points


def test_an_interrupted_cell_ends_with_the_same_numbers(tmp_path: Path) -> None:
    config = preset("tiny").with_overrides(steps=6)
    run = config.model_dump()
    run["plan"]["evaluate_every"] = 2
    spec = CellSpec(variant="x", rate=1.0, seed=0, run=run, state_file=tmp_path / "whole.safetensors", threads=1)
    whole = points_of(spec)
    assert [point.step for point in whole] == [0, 2, 4, 6]
    again = spec.model_copy(update={"state_file": tmp_path / "again.safetensors"})
    with contextlib.suppress(Stopped):
        points_of(again, stop_after=3)
    rest = points_of(again)
    assert [point.step for point in rest] == [4, 6], "it went on from its last evaluation"
    assert rest == whole[2:]


def test_a_cell_is_the_training_of_the_swarm(tmp_path: Path) -> None:
    """Losses equal the unsplit model's, which a swarm equals bit for bit."""
    config = preset("tiny")
    corpus, model = load_corpus(config), UnsplitModel(config, config.run_id)
    for step in range(1, config.plan.steps + 1):
        model.train_step(step, corpus.microbatch)
    spec = CellSpec(variant="x", rate=1.0, seed=0, run=config.model_dump(), state_file=tmp_path / "state", threads=1)
    last = points_of(spec)[-1]
    assert last.val_loss == model.evaluate(config.plan.steps, corpus.microbatch)
    assert last.wire_compression is not None and last.wire_compression > 10
    assert last.strange_loss is not None and last.strange_loss != last.val_loss, "latents of another text are told"


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_command_is_stopped_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(GRID)
    command = [sys.executable, "-m", "node.cli", "bench", "convergence", "--grid", "grid.toml"]
    command += ["--json", "--out", "result.json", "--jobs", "1"]
    seen: list[str] = []
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        for line in first.stdout:
            seen.append(line)
            if json.loads(line).get("step") == 2:
                first.send_signal(signal.SIGINT)
        assert first.wait(timeout=60) == 130
    assert not (tmp_path / "result.json").exists()
    second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, check=False)
    assert second.returncode == 0, second.stderr
    events = [json.loads(line) for line in (*seen, *second.stdout.splitlines())]
    told = [(event["variant"], event["step"]) for event in events if event["event"] == "evaluation"]
    assert sorted(set(told)) == sorted((name, step) for name in ("ours", "fair") for step in (0, 2, 4, 6))
    assert (told[-1], events[-1]["event"]) == (("fair", 6), "summary")
    assert "gap_128x" in events[-1]
    result = json.loads((tmp_path / "result.json").read_text())
    assert [(point["variant"], point["step"]) for point in result["measurements"]] == [
        (name, step) for name in ("ours", "fair") for step in (0, 2, 4, 6)
    ]
