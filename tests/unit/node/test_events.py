"""Events survive the pipe, and what is no event is refused with a reason."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from node.events import (
    Beside,
    Check,
    Complete,
    Cover,
    Coverage,
    Error,
    Event,
    EventInvalid,
    EventWriter,
    LinkTraffic,
    StageStep,
    WorkerSpec,
    encode_event,
    parse_event,
    read_spec,
)

counts = st.integers(min_value=0, max_value=2**53)
seconds = st.floats(min_value=0, max_value=1e9, allow_nan=False)
links = st.none() | st.builds(LinkTraffic, dense_bytes=counts, wire_bytes_forward=counts, wire_bytes_backward=counts)
stage_steps = st.builds(
    StageStep,
    stage=counts,
    step=counts,
    loss=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    tokens=counts,
    seconds=seconds,
    microbatches=counts,
    compute_seconds=seconds,
    wait_seconds=seconds,
    gradient_norm=seconds,
    link=links,
)
checks = st.builds(Check, number=st.integers(1, 8), detail=st.text(), seconds=seconds)
errors = st.builds(Error, code=st.integers(1, 999), cause=st.text(), remedy=st.text())
rates = st.floats(1e-6, 1e6)
covers = st.builds(Cover, stage=counts, beside=st.builds(Beside, throughput=rates, claimed_at=seconds))
coverages = st.builds(Coverage, unserved=st.lists(counts).map(tuple))


@given(stage_steps | checks | errors | covers | coverages)
def test_an_event_is_one_line_and_comes_back_equal_to_the_last_bit(event: Event) -> None:
    line = encode_event(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert parse_event(line) == event


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"Some library says hello\n", "JSON"),
        (b"", "JSON"),
        (b"[1, 2]\n", "object"),
        (b'{"event":"reboot"}\n', "event"),
        (b'{"event":"complete","stage":1}\n', "step"),
        (b'{"event":"complete","stage":1,"step":2,"extra":3}\n', "extra"),
        (b"\xff\xfe\n", "JSON"),
    ],
)
def test_what_is_no_event_is_refused_with_the_reason(line: bytes, why: str) -> None:
    with pytest.raises(EventInvalid, match=why):
        parse_event(line)


def test_a_refused_line_is_quoted_only_in_part() -> None:
    with pytest.raises(EventInvalid) as caught:
        parse_event(b"x" * 1_000_000)
    assert len(str(caught.value)) < 500


def test_writers_of_several_threads_never_mix_their_lines() -> None:
    reading, writing = os.pipe()
    writer = EventWriter(writing)
    long_error = Error(code=1, cause="c" * 20_000, remedy="r")  # far beyond what a pipe writes at once

    def write() -> None:
        for _ in range(20):
            writer.write(long_error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    with os.fdopen(reading, "rb") as stream:
        lines = [stream.readline() for _ in range(80)]
    for thread in threads:
        thread.join(timeout=10)
    os.close(writing)
    assert {parse_event(line) for line in lines} == {long_error}


def test_a_claimed_stdout_holds_events_alone() -> None:
    code = (
        "import os; from node.events import claim_stdout, emit, Complete; claim_stdout(); print('noise', flush=True);"
        "os.system('echo noise of a child'); emit(Complete(stage=1, step=2))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=30, check=True)
    assert parse_event(done.stdout) == Complete(stage=1, step=2)
    assert done.stderr.count(b"noise") == 2


def test_a_worker_reads_its_spec_and_refuses_anything_else(tmp_path: Path) -> None:
    spec = WorkerSpec(ticket="resbm1x", state_folder=tmp_path, identity_file=tmp_path / "identity", stage=2, port=0)
    assert read_spec(io.BytesIO(spec.model_dump_json().encode() + b"\nmore\n")) == spec
    for line in (b"", b"{}\n", b"nonsense\n", b'{"ticket":"a","surprise":1}\n'):
        with pytest.raises(EventInvalid):
            read_spec(io.BytesIO(line))
