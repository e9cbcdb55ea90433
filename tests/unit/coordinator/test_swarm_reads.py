"""When the directory is asked, and when what was read last will do."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from datetime import timedelta
from typing import Any

import pytest

from coordinator import swarm as swarm_module
from coordinator.swarm import RECENT, Swarm

RUN = "0123456789abcdef"


class Directory:
    """Knows nothing, and counts how often it is asked."""

    def __init__(self) -> None:
        self.searches = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def get(self, keys: Collection[str]) -> dict[str, Any]:
        self.searches += 1
        await self.may_answer.wait()
        return {}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(swarm_module.time, "monotonic", lambda: now[0])
    return now


def new_swarm() -> tuple[Swarm, Directory]:
    directory = Directory()
    return Swarm(directory, bytes(32)), directory  # type: ignore[arg-type]


def test_who_may_see_something_older_shares_a_search(clock: list[float]) -> None:
    async def story() -> None:
        swarm, directory = new_swarm()
        first = await swarm.snapshot(RUN, 3)
        clock[0] += RECENT.total_seconds() - 0.1
        assert await swarm.snapshot(RUN, 3, RECENT) is first
        assert directory.searches == 1
        assert await swarm.snapshot(RUN, 3) is not first  # who says nothing gets what is so now
        assert directory.searches == 2
        clock[0] += RECENT.total_seconds() + 0.1
        await swarm.snapshot(RUN, 3, RECENT)
        assert directory.searches == 3

    asyncio.run(story())


def test_another_run_is_not_taken_for_this_one(clock: list[float]) -> None:
    async def story() -> None:
        swarm, directory = new_swarm()
        await swarm.snapshot(RUN, 3)
        await swarm.snapshot("f" * 16, 3, RECENT)
        await swarm.snapshot("f" * 16, 4, RECENT)
        assert directory.searches == 3

    asyncio.run(story())


def test_a_search_is_as_old_as_its_beginning_and_a_slow_one_hides_no_newer_one(clock: list[float]) -> None:
    async def story() -> None:
        swarm, directory = new_swarm()
        directory.may_answer.clear()
        slow = asyncio.create_task(swarm.snapshot(RUN, 3))
        await asyncio.sleep(0)
        waiting = directory.may_answer
        directory.may_answer = asyncio.Event()
        directory.may_answer.set()
        clock[0] += 2.0
        newer = await swarm.snapshot(RUN, 3)
        waiting.set()
        await slow
        assert await swarm.snapshot(RUN, 3, timedelta(seconds=1)) is newer

    asyncio.run(story())
