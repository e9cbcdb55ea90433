"""A real swarm of processes trains exactly what one process trains: the same losses and weights, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.processes, pytest.mark.slow, pytest.mark.timeout(400)]

Line = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the state and temporary files of all runs here: nothing of this machine's user is read or written."""
    return tmp_path_factory.mktemp("demo")


def run(folder: Path, command: str, *options: str) -> list[Line]:
    """A command's --json lines; that stdout holds nothing else is part of every test here."""
    environment = {
        **os.environ,
        "XDG_STATE_HOME": str(folder / "state"),
        "TMPDIR": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-m", "node.cli", command, *options, "--threads", "1", "--json"],
        capture_output=True,
        env=environment,
        timeout=240,  # seven starts, of seconds of a core each: a minute and a half have been seen
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


def steps(lines: list[Line]) -> list[tuple[int, float, int]]:
    return [(line["step"], line["loss"], line["tokens"]) for line in lines if line["event"] == "step"]


def assert_equal_training(swarm: list[Line], single: list[Line]) -> None:
    assert steps(swarm) == steps(single)
    assert [step for step, _, _ in steps(swarm)] == [1, 2, 3, 4]
    for key in ("val_loss_before", "val_loss", "weights_digest"):
        assert swarm[-1][key] == single[-1][key]


# Both models and both ends of the codecs; every combination of them, with two to four stages, in one process is in
# tests/unit/node/test_unsplit.py.


def test_a_swarm_trains_the_same_bits_as_one_process(folder: Path) -> None:
    which = ("--preset", "qwen3-tiny", "--stages", "4", "--codec", "none")
    lines = run(folder, "demo", *which)
    assert [line["event"] for line in lines] == ["step"] * 4 + ["summary"]
    assert_equal_training(lines, run(folder, "reference", *which))
    assert lines[-1]["restarts"] == 0
    for line in lines[:-1]:
        assert 0 < line["wire_bytes"] < line["dense_bytes"]
        assert line["seconds"] > 0
    compression = sum(line["dense_bytes"] for line in lines[:-1]) / sum(line["wire_bytes"] for line in lines[:-1])
    assert lines[-1]["wire_compression"] == pytest.approx(compression)
    assert not list(folder.glob("resbm-node-demo-*"))


def test_kill_9_in_the_middle_of_a_step_changes_no_bit(folder: Path) -> None:
    """The first, an inner and the last stage, each in another step."""
    which = ("--preset", "tiny", "--stages", "3", "--codec", "int4")
    lines = run(folder, "demo", *which, "--kill", "0@2", "--kill", "1@3", "--kill", "2@4")
    assert_equal_training(lines, run(folder, "reference", *which))
    assert lines[-1]["restarts"] == 3
