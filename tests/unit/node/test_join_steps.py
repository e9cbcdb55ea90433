"""The numbered steps of joining: one event each, whatever happens in them."""

from __future__ import annotations

import asyncio

import pytest

from node.errors import MachineUnfit
from node.events import CHECK_NAMES, Check, Event
from node.join_steps import JoinSteps
from stage_server.errors import LinkLost


def said(events: list[Event]) -> list[tuple[int, str, str, str]]:
    checks = [event for event in events if isinstance(event, Check)]
    assert len(checks) == len(events)
    return [(check.number, check.name, check.verdict, check.detail) for check in checks]


def test_a_step_says_what_was_found_and_how_long_it_took() -> None:
    events: list[Event] = []
    with JoinSteps(events.append).step("identity") as note:
        assert events == []  # said at its end
        note("first")
        note("12D3Koo")
    assert said(events) == [(2, "identity", "ok", "12D3Koo")]
    assert isinstance(events[0], Check)
    assert events[0].seconds >= 0


def test_steps_are_numbered_in_the_order_that_people_read() -> None:
    events: list[Event] = []
    steps = JoinSteps(events.append)
    for name in CHECK_NAMES:
        with steps.step(name):
            pass
    assert said(events) == [(number, name, "ok", "") for number, name in enumerate(CHECK_NAMES, 1)]
    assert CHECK_NAMES == ("machine", "identity", "network", "reach", "speed", "stage", "state", "live")


def test_a_warning_lets_the_join_go_on() -> None:
    events: list[Event] = []
    with JoinSteps(events.append).step("reach") as note:
        note("! nobody answers from here")
    assert said(events) == [(4, "reach", "warn", "nobody answers from here")]


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (MachineUnfit("no CUDA device", remedy="use the CPU"), "no CUDA device"),
        (LinkLost("nobody answers"), "nobody answers"),  # without the code: that is in the error event
        (ValueError("something else"), "something else"),
    ],
)
def test_a_step_that_fails_says_its_cause_and_the_error_goes_on(error: Exception, cause: str) -> None:
    events: list[Event] = []
    with pytest.raises(type(error)) as raised, JoinSteps(events.append).step("machine") as note:
        note("found before it failed")
        raise error
    assert raised.value is error
    assert said(events) == [(1, "machine", "failed", cause)]


def test_a_join_that_is_called_off_is_no_failure() -> None:
    events: list[Event] = []

    async def join() -> None:
        with JoinSteps(events.append).step("speed"):
            await asyncio.sleep(10)

    async def scenario() -> None:
        task = asyncio.create_task(join())
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert events == []
