"""A process with an averager, for tests: tells its averaging process's pid, then waits to be killed."""

from __future__ import annotations

import asyncio

from coordinator.averaging import ReplicaAveraging


async def main() -> None:
    averaging = await ReplicaAveraging.start(num_values=1000, listen_host="127.0.0.1")
    print(averaging.pid, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
