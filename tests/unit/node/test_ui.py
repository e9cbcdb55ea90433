"""What a volunteer is told, and that scripts are told nothing else than JSON."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from node import ui
from node.events import (
    Assigned,
    Beside,
    Check,
    Complete,
    Cover,
    Coverage,
    Error,
    Event,
    Link,
    LinkTraffic,
    Live,
    Moving,
    Relieved,
    Rewind,
    StageStep,
    StateTransfer,
    Worker,
    encode_event,
)

ASSIGNED = Assigned(stage=1, num_stages=4, reason="bottleneck 118 -> 131 seq/s")
LIVE = Live(
    stage=1, peer_id="12D3", endpoint="127.0.0.1:5", metrics_endpoint=None, committed_step=0, run="demo", steps=100
)
LINKS = [Link(stage=1, side=side, state="open", detail="") for side in ("upstream", "downstream")]


def step(number: int) -> StageStep:
    return StageStep(
        stage=1,
        step=number,
        loss=5.0 - number / 100,
        tokens=4096,
        seconds=2.0,
        microbatches=8,
        compute_seconds=1.0,
        wait_seconds=0.5,
        gradient_norm=1.0,
        link=LinkTraffic(dense_bytes=1130, wire_bytes_forward=6, wire_bytes_backward=4),
    )


def line_after(*events: Event) -> str:
    state = ui.Contribution()
    for event in events:
        state = state.observe(event)
    return Text.from_markup(ui.contribution_line(state)).plain


def test_a_contributing_peer_says_so_with_its_numbers() -> None:
    line = line_after(ASSIGNED, LIVE, *LINKS, step(1), step(2))
    assert line == (
        "contributing · stage 1 of 4 · step 2/100 · loss 4.980 · 16 microbatches · 2.0k tokens/s · wire 113x · "
        "links 2/2 · 3:16 left"
    )


def test_a_peer_that_does_not_contribute_says_why() -> None:
    lost = Link(stage=1, side="downstream", state="lost", detail="reset")
    died = Worker(state="restarting", pid=5, detail="killed by SIGKILL", in_seconds=2.0)
    assert line_after().startswith("joining")
    assert line_after(ASSIGNED, LIVE, *LINKS).startswith("waiting for the first microbatch")
    assert line_after(ASSIGNED, LIVE, *LINKS, step(1), lost).startswith("waiting for stage 2 ·")
    assert line_after(ASSIGNED, LIVE, *LINKS, step(1), died).startswith("worker killed by SIGKILL, restarts in 2 s")
    assert line_after(ASSIGNED, LIVE, *LINKS, step(1), died, LIVE, *LINKS).startswith("contributing")
    assert line_after(ASSIGNED, LIVE, step(1), Complete(stage=1, step=1)).startswith("run complete")


def test_a_state_on_its_way_is_told_with_the_time_left() -> None:
    begun = StateTransfer(stage=1, done_bytes=0, total_bytes=120_000_000, seconds_left=None)
    under_way = StateTransfer(stage=1, done_bytes=36_000_000, total_bytes=120_000_000, seconds_left=75.0)
    here = StateTransfer(stage=1, done_bytes=120_000_000, total_bytes=120_000_000, seconds_left=0.0)
    assert line_after(ASSIGNED, LIVE, begun).startswith("taking over the stage's state: 0 B of 120 MB · stage 1")
    assert line_after(ASSIGNED, begun, under_way).startswith(
        "taking over the stage's state: 36 MB of 120 MB, 1:15 left"
    )
    assert line_after(ASSIGNED, LIVE, here).startswith("catching up with the stage's other peers")
    assert line_after(ASSIGNED, LIVE, *LINKS, here, step(1)).startswith("contributing")


def test_a_move_is_told_with_its_reason() -> None:
    line = ui.event_line(Moving(stage=1, to_stage=0, reason="the slower of both 70 → 101 microbatches/s"))
    assert Text.from_markup(line or "").plain.strip() == (
        "leaving stage 1 for stage 0: the slower of both 70 → 101 microbatches/s"
    )


def test_going_back_is_told_with_what_it_costs() -> None:
    line = ui.event_line(Rewind(stage=1, to_step=20, redone=7, reason="stage 2 [lost] its state"))
    assert Text.from_markup(line or "").plain.strip() == (
        "back to step 20, 7 steps are done again: stage 2 [lost] its state"
    )


def test_a_paused_run_says_so_to_everyone_who_waits_for_it() -> None:
    away = Coverage(unserved=(2,), detail="paused: nobody serves stage 2; it resumes by itself when somebody joins")
    assert line_after(ASSIGNED, LIVE, *LINKS, step(1), away).startswith(f"{away.detail} · stage 1 of 4 · ")
    back = Coverage(unserved=(), detail="")
    assert line_after(ASSIGNED, LIVE, *LINKS, step(1), away, back).startswith("contributing")


def test_a_machine_at_several_stages_names_them_and_counts_its_own_alone() -> None:
    out = io.StringIO()
    display = ui.PlainDisplay(Console(file=out, width=200), clock=lambda: 0.0)
    display.show(ASSIGNED)
    display.show(LIVE)
    display.show(Cover(stage=2, reason="nobody serves it", beside=Beside(node_id="m", throughput=1.0, stand_in=True)))
    for event in (ASSIGNED, LIVE.model_copy(update={"stage": 2}), step(7), Relieved(stage=2, peer_id="12D9")):
        display.show_beside(2, event)
    display.show(step(1))
    display.show_beside(2, Worker(state="exited", pid=5, detail="exit code 0", stage=2))
    display.close()
    lines = [line.strip() for line in out.getvalue().splitlines()]
    assert lines[2:5] == [
        "serving stage 2 too: nobody serves it",
        "stage 2: serving at 127.0.0.1:5 as 12D3",
        "leaving stage 2 to 12D9",
    ]
    assert lines[5].startswith("contributing · stage 1 of 4 · standing in at 2 · step 1/100 · ")
    assert lines[6].startswith("contributing · stage 1 of 4 · step 1/100 · ")


def test_checks_are_numbered_with_verdict_and_duration() -> None:
    check = Check(number=4, name="reach", verdict="failed", seconds=3.02, detail="nobody answers at [1.2.3.4]")
    plain = Text.from_markup(ui.check_line(check)).plain
    assert plain == "4/8  reach     failed     3.0 s  nobody answers at [1.2.3.4]"


def test_an_error_shows_code_cause_and_remedy() -> None:
    line = ui.event_line(Error(code=310, cause="stage 1 is served already", remedy="join with --stage auto"))
    assert line is not None
    plain = Text.from_markup(line).plain
    assert "E310" in plain
    assert "stage 1 is served already" in plain
    assert "remedy: join with --stage auto" in plain


def test_without_a_terminal_lines_are_plain_and_few() -> None:
    out = io.StringIO()
    seconds = iter(range(10_000))
    display = ui.PlainDisplay(Console(file=out, width=200), clock=lambda: next(seconds) / 10)
    for event in (ASSIGNED, LIVE, *LINKS, *map(step, range(1, 101)), Complete(stage=1, step=100)):
        display.show(event)
    display.close()
    text = out.getvalue()
    assert "\x1b" not in text
    assert "serving at 127.0.0.1:5" in text
    assert "step 1/100" in text
    assert "run complete" in text
    assert text.count("\n") < 20


def test_a_terminal_keeps_one_line_up_to_date_and_leaves_the_last_one() -> None:
    out = io.StringIO()
    seconds = iter(range(10_000))
    console = Console(file=out, width=200, force_terminal=True, highlight=False)
    display = ui.LiveDisplay(console, clock=lambda: float(next(seconds)))
    for event in (ASSIGNED, LIVE, *LINKS, step(1), step(2)):
        display.show(event)
    display.close()
    text = out.getvalue()
    assert "step 1/100" in text
    assert "step 2/100" in text.splitlines()[-2]
    assert text.endswith("\x1b[?25h")  # the cursor is visible again


def test_json_display_writes_the_events_and_nothing_else() -> None:
    code = (
        "from node.events import Complete; from node.ui import join_display; display = join_display(json_lines=True);"
        "display.show(Complete(stage=1, step=2)); display.close()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert done.stdout == encode_event(Complete(stage=1, step=2))
    assert done.stderr == b""


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (999, "999"), (999.7, "1.0k"), (2130, "2.1k"), (9960, "10k"), (13_200_000, "13M")]
)
def test_counts_are_short(number: float, text: str) -> None:
    assert ui.short_count(number) == text


@given(st.floats(0, 9e14))
def test_counts_never_take_more_than_four_characters(number: float) -> None:
    assert len(ui.short_count(number)) <= 4


@pytest.mark.parametrize(("seconds", "text"), [(-1, "0:00"), (7.4, "0:07"), (200, "3:20"), (7400, "2:03:20")])
def test_times_are_short(seconds: float, text: str) -> None:
    assert ui.short_time(seconds) == text


def test_bytes_have_units() -> None:
    assert [ui.short_bytes(number) for number in (12, 2100, 13e6)] == ["12 B", "2.1 kB", "13 MB"]
