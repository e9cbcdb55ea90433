"""One averager at the address given, for tests: rounds of new averagers, as told on stdin; says how each went."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from datetime import timedelta

from coordinator import averaging_zygote
from coordinator.averaging import AveragingFailed, ReplicaAveraging
from coordinator.averaging_launch import Launcher

WITHIN = timedelta(seconds=5)


async def main(launcher: Launcher, host: str) -> None:
    while True:
        averaging = await ReplicaAveraging.start(num_values=1000, listen_host=host, launcher=launcher)
        say({"address": averaging.address})
        line = await asyncio.to_thread(sys.stdin.readline)
        if not line:
            return await averaging.close()
        order = json.loads(line)
        await asyncio.sleep(order["at"] - time.time())
        try:
            await averaging.sum(order["key"], order["members"], 1, WITHIN)
            say({"failure": ""})
        except AveragingFailed as failure:
            say({"failure": str(failure)})
        await asyncio.to_thread(sys.stdin.readline)  # the others may still need what it has sent
        await averaging.close()


def say(fact: dict[str, str]) -> None:
    print(json.dumps(fact), flush=True)


if __name__ == "__main__":
    with averaging_zygote.launching() as launcher:
        asyncio.run(main(launcher, sys.argv[1]))
