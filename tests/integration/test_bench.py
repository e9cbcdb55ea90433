"""The benchmarks as commands: what scripts read of them, and that nothing is left when they are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from node.bench import codec, codec_timing
from node.bench.codec import OPERATIONS, Plan, measure, summary_of, tables_of
from node.bench.common import JsonWatcher

pytestmark = pytest.mark.processes

GROWTH_CALLS = 40  # enough to see 30 KB a call stay


def bench(*arguments: str, folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Runs `resbm-node bench ... --json`; gives its summary and its result file."""
    out = folder / "result.json"
    command = [sys.executable, "-m", "node.cli", "bench", *arguments, "--json", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[-1]["event"] == "summary"
    assert all(event["event"] != "summary" for event in events[:-1])
    return events[-1], json.loads(out.read_text())


@pytest.mark.slow
def test_the_codec_keeps_its_memory(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every encoding, a small and a large shape: a call holds a few times its input, and nothing stays."""
    monkeypatch.setattr(codec, "SHAPES", (codec.SHAPES[0], codec.SHAPES[2]))
    monkeypatch.setattr(codec_timing, "GROWTH_CALLS", GROWTH_CALLS)
    results = measure(Plan(repeats=2, seconds_per_repeat=0.002), JsonWatcher())
    capsys.readouterr()
    page_noise = 1 << 20
    for result in results:
        assert set(result.operations) == set(OPERATIONS)
        for measured in result.operations.values():
            if (memory := measured.memory) is not None:
                assert memory.peak_bytes <= 6 * memory.input_bytes + page_noise
                assert memory.growth_bytes <= page_noise, f"grown over {GROWTH_CALLS} calls"
    summary = summary_of(results)
    worst = min(r.gb_per_second("pack").median for r in results if r.four_bits)
    assert summary["pack_gb_per_second"] == worst > 0
    assert [len(table.rows) for table in tables_of(results)] == [len(results), len(results)]


@pytest.mark.slow
def test_wire_counts_real_frames(tmp_path: Path) -> None:
    arguments = ["wire", "--preset", "tiny", "--preset", "h4096-narrow", "--train-steps", "2"]
    summary, result = bench(*arguments, folder=tmp_path)
    assert summary["h4096_narrow"] > 512
    assert summary["h4096_narrow_without_zstd"] > 512
    assert summary["tiny"] > summary["tiny_int8"] > summary["tiny_bf16"] > summary["tiny_none"] > 1
    measured = result["measurements"][0]
    assert measured["source"] == "trained, steps 2 to 2"
    assert measured["traffic"]["num_tokens"] == 3 * 4 * 2 * 32  # boundaries, microbatches, B, T
    assert result["machine"]["cores"] >= 1 and result["command"].startswith("resbm-node bench wire")


@pytest.mark.slow
def test_local_compares_a_real_swarm_with_the_reference(tmp_path: Path) -> None:
    arguments = ["local", "--preset", "tiny", "--stages", "2", "--pairs", "1", "--steps", "3", "--quick"]
    summary, result = bench(*arguments, folder=tmp_path)
    assert summary["ratio"] == summary["ratio_tiny_2"] > 0
    swarm = result["measurements"][0]["pairs"][0]["swarm"]
    assert len(swarm["step_seconds"]) == 3
    assert swarm["wire_compression"] > 1
    for stage, share in enumerate(swarm["stages"]):
        done = {"forward", "backward", "optimizer", "encode", "unpack", "pack"} | ({"decode"} if stage else {"data"})
        assert done <= share["work"].keys()
        parts = sum(time["seconds"] for kind, time in share["work"].items() if kind != "decode")
        assert parts <= share["compute_seconds"] + 0.05 and share["compute_seconds"] <= share["seconds"]
    for memory in swarm["memory"]:
        assert memory["peak_bytes"] > memory["base_bytes"] > 0
        assert memory["optimizer_bytes"] > 0 and memory["activations_bytes"] > 0
    cpu = swarm["cpu"]
    assert 0 < cpu["device_threads"] < cpu["cores"] * cpu["wall_seconds"]


def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    """Interrupted while a whole swarm is starting: status 130, no traceback, no process, no file."""
    command = [sys.executable, "-m", "node.cli", "bench", "local", "--preset", "tiny", "--stages", "2", "--json"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with (tmp_path / "errors").open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=errors, cwd=tmp_path, env=environment, start_new_session=True
        )
        try:
            family = _until_it_has_children(process)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=40) == 130
        finally:
            process.kill()
            process.wait()
    assert "Traceback" not in (tmp_path / "errors").read_text()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not list(tmp_path.glob("resbm-node-*"))
    assert not list((tmp_path / "runs" / "bench").iterdir())


def _until_it_has_children(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if family := psutil.Process(process.pid).children(recursive=True):
            time.sleep(1.0)  # well within its start
            return [*family, *psutil.Process(process.pid).children(recursive=True)]
        time.sleep(0.05)
    raise AssertionError("nothing was started")


def test_overhead_counts_what_the_bottleneck_adds(tmp_path: Path) -> None:
    """One middle stage of H 128, h 4: the parameters and FLOPs are those of the formulas."""
    arguments = ["overhead", "--width", "128", "--tokens", "32", "--repeats", "1"]
    summary, result = bench(*arguments, folder=tmp_path)
    measured = result["measurements"][0]
    hidden, width, tokens = 128, 4, 32
    learned = (4 * hidden * width) + width + hidden + 3 * hidden  # W_e, W_d and two latent taps; gain, bias, taps
    assert measured["ours"]["boundary_parameters"] == learned
    assert measured["ours"]["anchor_parameters"] == 32_768 * hidden
    assert measured["dense"]["boundary_parameters"] == measured["dense"]["anchor_parameters"] == 0
    assert measured["ours"]["layer_parameters"] == measured["dense"]["layer_parameters"]
    added = measured["ours"]["flops"] - measured["dense"]["flops"]
    assert added == 2 * 3 * (4 * hidden * width) * tokens, "four products, forward and twice backward"
    assert summary["flops_share"] == pytest.approx(added / measured["dense"]["flops"])
    assert summary["time_ratio"]["128"] > 0
