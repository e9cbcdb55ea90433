"""The command line as a person and a script meet it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from node import checks, cli
from node.checks import Check
from node.config import load, preset
from node.errors import ConfigInvalid
from stage_server.errors import StateLost

COMMANDS = sorted(typer.main.get_command(cli.build_app()).commands)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")


def resbm_node(*arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Runs the program as people do, in a process of its own."""
    command = [sys.executable, "-m", "node.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def invoke(*arguments: str, monkeypatch: pytest.MonkeyPatch | None = None) -> Result:
    """Runs the program inside this process: faster, but its arguments must be told to whoever reads sys.argv."""
    if monkeypatch:
        monkeypatch.setattr(sys, "argv", ["resbm-node", *arguments])
    return CliRunner().invoke(cli.build_app(), list(arguments))


def json_lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


# Help


def test_help_loads_nothing_heavy() -> None:
    """Which is what makes it quick; seconds would only measure the machine."""
    code = (
        "import sys; sys.argv = ['resbm-node', '--help']\n"
        "import node.cli\n"
        "try: node.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'hivemind', 'tokenizers', 'grpc', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command() -> None:
    text = invoke("--help").stdout
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    result = invoke(command, "--help")
    assert result.exit_code == 0
    assert f"resbm-node {command}" in result.stdout


def test_version() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("resbm-node ")


def test_no_command_shows_the_help() -> None:
    result = invoke()
    assert result.exit_code == 2
    assert "reference" in result.output


# Refusals


def test_a_refusal_is_two_lines_and_status_2() -> None:
    done = resbm_node("reference", "--preset", "tiny", "--stages", "9")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error E103: command line: stages = 9 is more than model.num_hidden_layers = 4",
        "  remedy: change one of the named numbers so that they fit each other",
    ]


def test_a_refusal_is_a_json_line_for_scripts() -> None:
    done = resbm_node("reference", "--preset", "none-such", "--json")
    assert done.returncode == 2
    (event,) = json_lines(done.stdout)
    assert (event["event"], event["code"]) == ("error", 102)
    assert "none-such" in event["cause"]
    assert event["remedy"]


@pytest.mark.parametrize("raised", [ConfigInvalid("why"), StateLost("why")])
def test_errors_of_all_rooms_are_told_alike(raised: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise raised

    with pytest.raises(typer.Exit) as stopped:
        cli.guarded(command)()
    assert stopped.value.exit_code == 2
    assert capsys.readouterr().err.startswith(f"error E{raised.code}: why\n  remedy: ")  # type: ignore[attr-defined]


def test_a_refusal_inside_a_task_group_is_told_too(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise ExceptionGroup("tasks", [ExceptionGroup("inner", [StateLost("gone")])])

    with pytest.raises(typer.Exit):
        cli.guarded(command)()
    assert "error E403: gone" in capsys.readouterr().err


@pytest.mark.parametrize("fault", [RuntimeError("a bug"), ExceptionGroup("two", [StateLost("a"), ValueError("b")])])
def test_faults_of_ours_are_not_hidden(fault: Exception) -> None:
    def command() -> None:
        raise fault

    with pytest.raises(type(fault)) as raised:
        cli.guarded(command)()
    assert raised.value is fault


def test_interrupt_is_quiet() -> None:
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as stopped:
        cli.guarded(command)()
    assert stopped.value.exit_code == 130


def test_run_and_preset_exclude_each_other() -> None:
    result = invoke("reference", "--run", "a.toml", "--preset", "tiny")
    assert result.exit_code == 2
    assert "not both" in result.output


# init


def test_init_writes_a_run_file_that_loads(tmp_path: Path) -> None:
    result = invoke("init", "my.toml", "--preset", "narrow")
    assert result.exit_code == 0, result.output
    assert load(tmp_path / "my.toml") == preset("narrow")
    assert "resbm-node reference --run my.toml" in result.stdout


def test_init_defaults_to_the_demo_in_run_toml(tmp_path: Path) -> None:
    assert invoke("init").exit_code == 0
    assert load(tmp_path / "run.toml") == preset("demo")


def test_init_overwrites_only_when_told_to(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("mine")
    refused = invoke("init")
    assert refused.exit_code == 2
    assert "error E109" in refused.stderr
    assert path.read_text() == "mine"
    assert invoke("init", "--force").exit_code == 0
    assert load(path) == preset("demo")


def test_init_into_a_folder_that_is_not_there() -> None:
    refused = invoke("init", "none/run.toml")
    assert refused.exit_code == 2
    assert "none/run.toml cannot be written: No such file or directory" in refused.stderr


# doctor


def test_doctor_tells_each_check_and_its_verdict() -> None:
    done = resbm_node("doctor", "--json")
    *lines, last = json_lines(done.stdout)
    assert [line["name"] for line in lines][:4] == ["python", "processor", "memory", "disk"]
    assert all(line["detail"] and (line["remedy"] or line["verdict"] == "ok") for line in lines)
    assert last == {"event": "summary", "fit": done.returncode == 0, "failed": last["failed"]}
    assert done.returncode == (1 if last["failed"] else 0)
    working = {line["name"] for line in lines if line["verdict"] == "ok"}
    assert {"python", "folders", "p2p daemon", "loopback gRPC", "devices"} <= working


def test_doctor_fails_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    poor = (lambda: Check("memory", "failed", "0.1 GiB free", "buy [some]"), lambda: Check("clock", "ok", "set"))
    monkeypatch.setattr(checks, "CHECKS", poor)
    result = invoke("doctor")
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["failed", "memory", "0.1", "GiB", "free"]
    assert lines[1].strip() == "remedy: buy [some]"
    assert lines[-1] == "1 checks failed"


def _no_space(_: Path) -> Any:
    class Usage:
        free = 5

    return Usage


FAULTS: list[tuple[str, Any, Callable[[], Check], str]] = [
    ("shutil.disk_usage", _no_space, checks.check_disk, "failed"),
    ("time.time", lambda: 0.0, checks.check_clock, "failed"),
    ("resource.getrlimit", lambda _: (256, 256), checks.check_open_files, "warn"),
    ("util.find_spec", lambda _: None, checks.check_p2p_daemon, "failed"),
    ("folders.cache_folder", lambda: Path("/proc/none"), checks.check_folders, "failed"),
]


@pytest.mark.parametrize(("place", "replacement", "check", "verdict"), FAULTS)
def test_each_check_can_fail(
    place: str,
    replacement: Any,
    check: Callable[[], Check],
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"node.checks.{place}", replacement)
    result = check()
    assert result.verdict == verdict
    assert result.remedy


# reference


def small_run(folder: Path, steps: int = 3) -> Path:
    """A run of a moment, on text of its own."""
    (folder / "text.txt").write_text("".join(f"line {n} of the text\n" for n in range(2000)))
    path = folder / "small.toml"
    path.write_text(
        f"""
        stages = 2
        [model]
        vocab_size = 300
        hidden_size = 32
        intermediate_size = 32
        num_hidden_layers = 2
        num_attention_heads = 2
        num_key_value_heads = 2
        [plan]
        steps = {steps}
        microbatches_per_step = 2
        batch = 2
        tokens = 16
        evaluate_every = 2
        evaluation_microbatches = 2
        [data]
        source = "files"
        paths = ["{folder / "text.txt"}"]
        """
    )
    return path


def test_reference_tells_each_step_and_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = small_run(tmp_path)
    done = resbm_node("reference", "--run", str(path), "--threads", "1", "--json")
    assert done.returncode == 0, done.stderr
    lines = json_lines(done.stdout)
    steps = [line for line in lines if line["event"] == "step"]
    assert [list(step) for step in steps] == [
        ["event", "step", "loss", "tokens", "seconds", "dense_bytes", "wire_bytes"]
    ] * 3
    assert [(step["step"], step["tokens"]) for step in steps] == [(1, 64), (2, 128), (3, 192)]
    assert all(step["seconds"] > 0 and step["wire_bytes"] == 0 for step in steps)
    evaluations = [(line["step"], line["loss"]) for line in lines if line["event"] == "evaluation"]
    assert [step for step, _ in evaluations] == [0, 2, 3]
    summary = lines[-1]
    assert list(summary)[:6] == [
        "event",
        "val_loss_before",
        "val_loss",
        "wire_compression",
        "tokens_per_second",
        "weights_digest",
    ]
    assert (summary["val_loss_before"], summary["val_loss"]) == (evaluations[0][1], evaluations[-1][1])
    assert summary["wire_compression"] is None
    assert len(summary["weights_digest"]) == 64


def test_reference_for_people(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    done = resbm_node("reference", "--run", str(small_run(tmp_path)), "--threads", "1", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "step 2/2  loss" in done.stdout
    assert "validation loss" in done.stdout
    assert "best without context" in done.stdout


def test_interrupt_of_a_reference_is_quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = small_run(tmp_path, steps=1_000_000)
    command = [sys.executable, "-m", "node.cli", "reference", "--run", str(path), "--threads", "1", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                if json.loads(line)["event"] == "step":
                    break
            os.kill(process.pid, signal.SIGINT)
            for line in process.stdout:  # read on, so that it never waits for us
                json.loads(line)
            assert process.wait(timeout=30) == 130
            assert process.stderr.read() == ""
        finally:
            process.kill()
