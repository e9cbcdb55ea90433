"""Side by side until one ends: what is raised, what is cancelled, what is awaited."""

from __future__ import annotations

import asyncio

import pytest

from stage_server.concurrency import until_first_ends


async def returns() -> None:
    await asyncio.sleep(0)


async def raises(error: Exception) -> None:
    await asyncio.sleep(0)
    raise error


async def waits(log: list[str], cleanup: float = 0.0) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        await asyncio.sleep(cleanup)
        log.append("cleaned up")


def run(coroutine: object) -> list[Exception]:
    return asyncio.run(asyncio.wait_for(coroutine, 5))  # type: ignore[arg-type]


def test_the_first_to_return_ends_the_others_and_waits_for_them() -> None:
    log: list[str] = []
    assert run(until_first_ends(waits(log, cleanup=0.05), returns(), waits(log))) == []
    assert log == ["cleaned up"] * 2


def test_what_was_raised_is_returned() -> None:
    log: list[str] = []
    error = ValueError("x")
    assert run(until_first_ends(waits(log), raises(error))) == [error]
    assert log == ["cleaned up"]


def test_two_that_fail_at_once_are_both_told_in_order() -> None:
    first, second = ValueError("1"), KeyError("2")
    assert run(until_first_ends(raises(first), raises(second))) == [first, second]


def test_an_error_while_being_cancelled_is_not_taken_for_the_cause() -> None:
    async def fails_when_cancelled() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise RuntimeError("cleanup failed") from None

    assert run(until_first_ends(fails_when_cancelled(), returns())) == []


@pytest.mark.parametrize("fails", [False, True], ids=["healthy", "a child fails on the way out"])
def test_a_cancellation_from_outside_always_goes_on(fails: bool) -> None:
    log: list[str] = []

    async def child() -> None:
        try:
            await waits(log)
        except asyncio.CancelledError:
            if fails:
                raise RuntimeError("on the way out") from None
            raise

    async def scenario() -> list[Exception]:
        task = asyncio.create_task(until_first_ends(child(), waits(log)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return []

    run(scenario())
    assert log == ["cleaned up"] * 2
