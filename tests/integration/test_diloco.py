"""Outer steps through real averaging processes and hivemind's real all-reduce."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.local_replicas import LocalReplicas, run, tiny
from support.local_swarm import RUN_ID

from coordinator.averaging import ReplicaAveraging, StageSum, Wire
from node.replication.sums import Averaging
from node.unsplit import weights_digest
from stage_server.config import DilocoConfig
from stage_server.diloco_trainer import DilocoTrainer

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]  # processes load torch and hivemind

DILOCO = DilocoConfig(inner_steps=3)


class Weighed:
    """The real one; what its sums have cost is written down."""

    def __init__(self, real: ReplicaAveraging, sums: list[StageSum]) -> None:
        self._real, self._sums = real, sums

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    async def sum(self, *args: Any) -> StageSum:
        result = await self._real.sum(*args)
        self._sums.append(result)
        return result


def test_replicas_hold_the_same_bits_after_2_bytes_a_value(tmp_path: Path) -> None:
    sums: list[StageSum] = []

    config = tiny(stages=1, steps=6)
    started: list[ReplicaAveraging] = []

    async def averaging(_: int) -> Averaging:
        return Weighed(started.pop(), sums)

    async def scenario(swarm: LocalReplicas) -> None:
        num_values = DilocoTrainer(config, RUN_ID, 0, activation_budget_bytes=1 << 30, diloco=DILOCO).num_values
        start = partial(ReplicaAveraging.start, num_values=num_values, wire=Wire(DILOCO.wire), listen_host="127.0.0.1")
        started.extend(await asyncio.gather(start(), start()))
        for _ in range(2):
            await swarm.join(0)
        await swarm.until_complete(120)
        one, other = swarm.of(0)
        assert weights_digest(one.trainer.parameters_fp32()) == weights_digest(other.trainer.parameters_fp32())
        assert sums
        for done in sums:  # two members: each sends half of the values to the other, and the sum of its own half
            assert 2 * one.trainer.num_values <= done.bytes_sent < 2.1 * one.trainer.num_values

    run(
        scenario,
        config,
        tmp_path,
        new_averaging=averaging,
        new_trainer=partial(DilocoTrainer, diloco=DILOCO),
    )
