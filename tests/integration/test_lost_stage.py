"""All who serve a stage are gone for good, with their disks: a newcomer goes on from a copy that others keep."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from node.bench.churn.schedule import Blow
from node.bench.churn.swarm import ChurnSwarm
from node.config import dump_toml, preset, validated
from node.demo import Loopback
from node.processes import become_subreaper

pytestmark = pytest.mark.processes

COMMON_EVERY = 5


async def until(condition: object, seconds: float, what: str) -> None:
    try:
        async with asyncio.timeout(seconds):
            while not condition():  # type: ignore[operator]  # noqa: ASYNC110 - told by other processes
                await asyncio.sleep(0.1)
    except TimeoutError:
        pytest.fail(f"not within {seconds} s: {what}")


async def run(folder: Path) -> None:
    values = preset("tiny").model_dump()
    values["stages"] = 2
    values["plan"] |= {"steps": 100_000, "microbatches_per_step": 4, "evaluate_every": 0, "checkpoint_every": 1}
    values["replicas"] |= {"averaging": "sync", "common_every": COMMON_EVERY}
    run_file = folder / "run.toml"
    run_file.write_text(dump_toml(validated(values, "test")))
    become_subreaper()
    swarm = ChurnSwarm(run_file, 2, folder, Loopback(), record_every=1_000)
    journal = swarm.journal
    try:
        await swarm.start()
        for stage in ("0", "1"):
            await swarm.join(late=False, stage=stage)
        await until(lambda: len(swarm.serving) == 2, 60, "both serve")
        last = next(name for name, stage in swarm.serving.items() if stage == 1)
        first = next(name for name, stage in swarm.serving.items() if stage == 0)
        await until(lambda: any((folder / first).glob("*/copies/stage-1/step-*")), 60, "a copy of stage 1 is kept")
        swarm.strike(Blow.KILL, last)
        shutil.rmtree(folder / last)
        reached = max(journal.stage_steps[0])
        await swarm.join(late=True, stage="1")
        await until(lambda: max(journal.stage_steps[1]) > reached + 2, 240, "the run goes on beyond where it was")
        assert journal.restarts >= 1  # the other stage went back; the newcomer too, unless it began with the copy
        assert all(len(told) == 1 for told in journal.losses.values())  # what is done again gives the same
    finally:
        await swarm.close()


@pytest.mark.slow
@pytest.mark.timeout(420)
def test_a_stage_is_restored_from_a_copy_and_the_run_goes_back_to_it(tmp_path: Path) -> None:
    asyncio.run(run(tmp_path))
