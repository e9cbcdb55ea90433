"""A process with averagers, for tests: `averaging_parent.py NAME`. Tells a story's facts, then waits to be killed."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import psutil

from coordinator import averaging_zygote
from coordinator.averaging import ReplicaAveraging
from coordinator.averaging_launch import FreshInterpreter, Launcher

WITHIN = timedelta(seconds=60)


async def start(launcher: Launcher) -> ReplicaAveraging:
    return await ReplicaAveraging.start(num_values=1000, listen_host="127.0.0.1", launcher=launcher)


async def add_up(averagers: list[ReplicaAveraging], key: str) -> float:
    """The first value of the sum, which all members have alike."""
    addresses = [averager.address for averager in averagers]
    done = await asyncio.gather(*(averager.sum(key, addresses, 1, WITHIN) for averager in averagers))
    assert len({one.digest for one in done}) == 1
    return float(averagers[0].total[0])


async def kill(pid: int | None) -> None:
    """Returns when it is gone."""
    process = psutil.Process(pid)
    process.kill()
    await asyncio.to_thread(process.wait, WITHIN.total_seconds())


async def with_a_fresh_interpreter() -> dict[str, Any]:
    averager = await start(FreshInterpreter())
    return {"pids": [averager.pid]}


async def with_a_zygote() -> dict[str, Any]:
    """Two averagers add up, and again after one was killed."""
    averagers = [await start(launcher), await start(launcher)]
    for number, averager in enumerate(averagers):
        averager.values[:] = number + 1
    sums = [await add_up(averagers, "first")]
    await kill(averagers[0].pid)
    sums.append(await add_up(averagers, "second"))
    return {"pids": [averager.pid for averager in averagers], "sums": sums}


async def with_a_lost_zygote() -> dict[str, Any]:
    """An averager is there again after zygote and averaging process have died."""
    averager = await start(launcher)
    assert isinstance(launcher, averaging_zygote.Zygote)
    psutil.Process(launcher.pid).kill()
    await kill(averager.pid)
    averager.values[:] = 7
    return {"sums": [await add_up([averager], "alone")], "pids": [averager.pid]}


STORIES: dict[str, Callable[[], Awaitable[dict[str, Any]]]] = {
    "fresh": with_a_fresh_interpreter,
    "zygote": with_a_zygote,
    "lost zygote": with_a_lost_zygote,
}


async def main(name: str) -> None:
    print(json.dumps(await STORIES[name]()), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with averaging_zygote.launching() as launcher:
        asyncio.run(main(sys.argv[1]))
