"""`resbm-node bench wan` as a command: real swarms on shaped links, what is refused, and that nothing is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.lab import left_by, needs_lab

pytestmark = pytest.mark.processes

COMMAND = (sys.executable, "-m", "node.cli", "bench", "wan", "--json")
NOBODY = 65534


def refused(*arguments: str, folder: Path) -> dict[str, object]:
    """The error event of a command that is refused at once, and leaves no file."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60, check=False, cwd=folder)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert not list(folder.iterdir())
    error: dict[str, object] = json.loads(done.stdout)
    return error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--system", "deepspeed"), "deepspeed"),
        (("--bandwidth", "fast"), "--bandwidth"),
        (("--loss", "100"), "--loss"),
        (("--preset", "nosuch"), "nosuch"),
        (("--precision", "fp8"), "compute.precision"),
    ],
)
def test_bad_input_is_refused_by_name(arguments: tuple[str, ...], word: str, tmp_path: Path) -> None:
    error = refused(*arguments, folder=tmp_path)
    assert word in str(error["cause"]) and error["remedy"]


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be someone else")
def test_without_root_it_is_refused_in_words(tmp_path: Path) -> None:
    program = f"import os, node.lab.tools; from node.cli import main; os.setuid({NOBODY}); main()"
    command = [sys.executable, "-c", program, "bench", "wan", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert "root" in json.loads(done.stdout)["cause"]
    assert not list(tmp_path.iterdir())


@pytest.mark.root
@pytest.mark.slow
@needs_lab
@pytest.mark.timeout(240)
def test_two_dense_pipelines_on_shaped_links(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    link = ("--bandwidth", "unshaped", "--bandwidth", "5", "--round-trip", "0")
    who = ("--system", "dense", "--system", "torch", "--preset", "tiny", "--stages", "2", "--microbatches", "4")
    command = [*COMMAND, *link, *who, "--quick", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        stdout, stderr = process.communicate(timeout=220)
    assert process.returncode == 0, stderr
    summary, result = json.loads(stdout.splitlines()[-1]), json.loads(out.read_text())
    assert summary["equivalent_mbit"] > 0 and summary["dense_over_unshaped"] > 0
    measured = result["measurements"]["measurements"]
    assert {m["system"] for m in measured} == {"dense", "torch"}
    for m in (m for m in measured if m["point"]["rate_mbit"] is None):
        payload = sum(stage["up_bytes"] for stage in m["stages"])
        sent = sum(stage["tx_bytes"] for stage in m["stages"])
        assert 0.8 < sent / payload < 1.6, "frames are counted when the transport takes them, packets when they leave"
        bf16 = 2 * 64 * 2  # one boundary, both directions, H = 64
        assert 0.8 * bf16 < payload / m["tokens"] < 1.2 * bf16, "zstandard saves a tenth, token ids cost a little"
    shaped = [m for m in measured if m["point"]["rate_mbit"] == 5.0]
    assert len(shaped) == 2 and all("htb" in m["shaping"] for m in shaped)
    assert not left_by(process.pid)
