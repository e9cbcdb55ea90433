"""The averaging process with faults, for tests: each round's key begins with the name of what goes wrong in it.

With an argument before the settings, something is wrong from the start.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

from coordinator import averaging_group, averaging_hivemind, averaging_process
from coordinator.averaging_group import SumAverager
from coordinator.averaging_hivemind import NoCompression, SumRunner

NUM_PARTS_BEFORE = 2
SECONDS_TO_SEND_ALL = 0.5
fault = ""


class Faulty(SumRunner):  # type: ignore[misc]
    """Its member goes wrong while it adds up its parts."""

    async def _sum_message(self, part_index: int, mean: Any) -> Any:
        own = self.parts_for_local_averaging[part_index]
        if fault == "averages nothing":
            mean = own / len(self.sender_peer_ids)
        elif fault == "leaves itself out":
            mean = mean - own / len(self.sender_peer_ids)
        elif fault in ("dies", "stops") and part_index == NUM_PARTS_BEFORE:
            os.kill(os.getpid(), signal.SIGKILL if fault == "dies" else signal.SIGSTOP)
        elif fault == "never answers" and part_index == NUM_PARTS_BEFORE:
            await asyncio.Event().wait()
        elif fault == "dies late" and part_index == len(self.parts_for_local_averaging) - 1:
            await asyncio.sleep(SECONDS_TO_SEND_ALL)
            os.kill(os.getpid(), signal.SIGKILL)
        return await super()._sum_message(part_index, mean)


class FaultyCodec(NoCompression):  # type: ignore[misc]
    """Breaks as hivemind's 8-bit ones do with a numpy that they do not know."""

    def compress(self, *args: Any, **options: Any) -> Any:
        if fault == "breaks its codec":
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return super().compress(*args, **options)


def take_faults_from_keys() -> None:
    sound = SumAverager.sum

    async def sum_with_fault(self: SumAverager, key: str, *args: Any) -> Any:
        global fault  # noqa: PLW0603
        fault = key.partition(":")[0]
        return await sound(self, key, *args)

    SumAverager.sum = sum_with_fault  # type: ignore[method-assign]


if __name__ == "__main__":
    if len(sys.argv) > 2:
        averaging_hivemind.KNOWN_SOURCES["allreduce"] = sys.argv.pop(1)
    averaging_group.SumRunner = Faulty  # type: ignore[misc]
    averaging_group.CODECS = dict.fromkeys(averaging_group.CODECS, FaultyCodec())  # type: ignore[misc]
    take_faults_from_keys()
    averaging_process.main()
