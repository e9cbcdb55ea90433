"""Stages with several replicas, real arithmetic and real gRPC: the training of one process, whoever comes and goes."""

from __future__ import annotations

import asyncio
import gc
import threading
from datetime import timedelta
from functools import cache
from pathlib import Path

import psutil
import pytest
import torch
from support.local_replicas import Hub, LocalReplicas, run, tiny
from support.local_swarm import RUN_ID, Reference, token_source

from node.replication import sums
from node.replication.group import Averaging
from node.unsplit import UnsplitModel, weights_digest
from stage_server.config import StageConfig


@cache
def reference(config_json: str) -> Reference:
    return Reference.of(StageConfig.model_validate_json(config_json))


def check(swarm: LocalReplicas) -> None:
    """Losses, weights and every step's gradient are those of one process; replicas of a stage hold the same bits."""
    expected = reference(swarm.config.model_dump_json())
    model = UnsplitModel(swarm.config, RUN_ID)
    whole = dict(model.parameters_fp32())
    for step in range(1, swarm.config.plan.steps + 1):
        model.train_step(step, token_source(swarm.config))
    for stage in range(swarm.config.stages):
        replicas = swarm.of(stage)
        assert len({weights_digest(replica.trainer.parameters_fp32()) for replica in replicas}) == 1
        for replica in replicas:
            for step, loss in replica.losses().items():
                assert loss == pytest.approx(expected.losses[step - 1], rel=1e-4)
            for name, parameter in replica.trainer.parameters_fp32():
                assert torch.allclose(parameter, whole[name], atol=2e-4), name


def test_one_replica_a_stage_is_bit_equal_to_one_process(tmp_path: Path) -> None:
    config = tiny(stages=3, codec="int4")

    async def scenario(swarm: LocalReplicas) -> None:
        for stage in range(3):
            await swarm.join(stage)
        await swarm.until_complete(60)
        pairs = [pair for r in swarm.replicas.values() for pair in r.trainer.parameters_fp32()]
        assert weights_digest(pairs) == reference(config.model_dump_json()).digest
        for replica in swarm.replicas.values():
            assert list(replica.losses().values()) == reference(config.model_dump_json()).losses

    run(scenario, config, tmp_path)


def test_two_replicas_a_stage_train_as_one_process(tmp_path: Path) -> None:
    async def scenario(swarm: LocalReplicas) -> None:
        for stage in (0, 0, 1, 1):
            await swarm.join(stage)
        await swarm.until_complete(90)
        check(swarm)
        for stage in (0, 1):  # each hears that the other one stands where it stands
            one, other = swarm.of(stage)
            async with asyncio.timeout(10):
                while (one.group.level(), other.group.level()) != ({other.name}, {one.name}):  # noqa: ASYNC110 - told by words
                    await asyncio.sleep(0.05)

    run(scenario, tiny(), tmp_path)


def test_a_replica_that_dies_and_one_that_comes_change_nothing(tmp_path: Path) -> None:
    async def scenario(swarm: LocalReplicas) -> None:
        for stage in (0, 0, 1, 1, 2, 2):
            await swarm.join(stage)
        for step, stage in ((2, 1), (4, 0), (6, 2)):
            await swarm.until_step(step)
            await swarm.kill(swarm.of(stage)[0].name)
            await swarm.join(stage)
        await swarm.until_complete(120)
        check(swarm)
        assert all(len(swarm.of(stage)) == 2 for stage in range(3))

    run(scenario, tiny(stages=3, steps=10), tmp_path)


def test_who_comes_when_the_run_is_over_gets_its_state(tmp_path: Path) -> None:
    async def scenario(swarm: LocalReplicas) -> None:
        await swarm.join(0)
        await swarm.until_complete(60)
        await swarm.join(0)
        await swarm.until_complete(60)
        check(swarm)

    run(scenario, tiny(stages=1, steps=2), tmp_path)


def test_peers_that_come_and_go_leave_no_socket_open(tmp_path: Path) -> None:
    """Neither at those who stay nor at those who have gone: here both are this process."""

    def connections() -> int:
        gc.collect()
        return len(psutil.Process().net_connections("tcp"))

    async def visit(swarm: LocalReplicas, visitors: int) -> None:
        for number in range(visitors):
            visitor = await swarm.join(number % 2)
            await asyncio.sleep(0.1 + 0.2 * (number % 4))  # in the middle of anything
            await swarm.kill(visitor.name)

    async def scenario(swarm: LocalReplicas) -> None:
        for stage in (0, 1):
            await swarm.join(stage)
        await swarm.until_step(1)
        before = connections()
        await visit(swarm, 8)
        async with asyncio.timeout(10):
            while connections() > before:  # noqa: ASYNC110 - the kernel tells nobody
                await asyncio.sleep(0.2)
        assert not swarm.failures

    run(scenario, tiny(steps=10_000), tmp_path)


def test_a_replica_that_serves_and_cannot_average_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a router that lets nobody in: it hears and is heard, and holds up every round that it is part of."""
    monkeypatch.setattr(sums, "PATIENCE_FIRST", timedelta(seconds=0.5))
    monkeypatch.setattr(sums, "PATIENCE_LEAST", timedelta(seconds=0.5))
    hub = Hub()

    async def averaging(num_values: int) -> Averaging:
        made = await hub.averaging(num_values)
        if made.address.startswith("averager 2 "):
            made.hub = Hub()  # type: ignore[attr-defined]  # where nobody else ever comes
        return made

    async def scenario(swarm: LocalReplicas) -> None:
        for _ in range(2):
            await swarm.join(0)
        first, second = swarm.of(0)
        async with asyncio.timeout(60):
            await first.complete.wait()
        assert first.losses().keys() == set(range(1, 5))
        expected = reference(swarm.config.model_dump_json()).losses
        for step, loss in first.losses().items():
            assert loss == pytest.approx(expected[step - 1], rel=1e-4)
        assert not second.group.serving or second.group._ledger.committed == 4

    run(scenario, tiny(stages=1, steps=4), tmp_path, new_averaging=averaging)


def test_an_order_that_is_given_up_is_not_begun_or_has_ended(tmp_path: Path) -> None:
    """What is put on the device thread may change weights: nobody goes on while it is under way."""

    async def scenario(swarm: LocalReplicas) -> None:
        await swarm.join(0)
        await swarm.until_complete(60)
        peer, begun, may_end = swarm.of(0)[0].peer, threading.Event(), threading.Event()
        done: list[str] = []

        def slow() -> None:
            begun.set()
            may_end.wait(30)
            done.append("slow")

        first = asyncio.create_task(peer.order(slow))
        await asyncio.to_thread(begun.wait, 30)
        second = asyncio.create_task(peer.order(lambda: done.append("second")))
        await asyncio.sleep(0.05)
        first.cancel()
        second.cancel()
        await asyncio.wait({second}, timeout=10)
        assert second.cancelled() and not first.done()
        may_end.set()
        await asyncio.wait({first}, timeout=10)
        assert first.cancelled()
        assert await peer.order(lambda: done) == ["slow"]

    run(scenario, tiny(stages=1, steps=1), tmp_path)
