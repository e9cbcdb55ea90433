"""Exactly once with the real parts: real stages, real arithmetic, real checkpoints, links that are spoiled by plan."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.local_swarm import LocalSwarm, Reference

from stage_server import links, neighbours
from stage_server.config import (
    BottleneckConfig,
    CodecConfig,
    ModelConfig,
    PlanConfig,
    StageConfig,
)
from stage_server.faults import Fault, FaultPlan
from stage_server.reports import Report, StepReport


@pytest.fixture(autouse=True, scope="module")
def hurry() -> Iterator[None]:
    """Links that notice losses and redial within milliseconds, so that many fault plans fit into the suite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(links, "STATUS_INTERVAL", timedelta(milliseconds=30))
        patch.setattr(links, "HANDSHAKE_LIMIT", timedelta(milliseconds=500))
        patch.setattr(neighbours, "REDIAL_FIRST", timedelta(milliseconds=5))
        patch.setattr(neighbours, "REDIAL_LONGEST", timedelta(milliseconds=20))
        yield


def tiny(stages: int = 3, codec: str = "int4", **plan: int) -> StageConfig:
    values = {"steps": 4, "microbatches_per_step": 3, "batch": 1, "tokens": 8, "evaluation_microbatches": 2}
    return StageConfig(
        stages=stages,
        seed=3,
        model=ModelConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1,
        ),
        bottleneck=BottleneckConfig(width=4),
        codec=CodecConfig(forward=codec, backward=codec),
        plan=PlanConfig(**{**values, "checkpoint_every": 2, "evaluate_every": 2, **plan}),
    )  # fmt: skip


@cache
def reference(config_json: str) -> Reference:
    return Reference.of(StageConfig.model_validate_json(config_json))


def assert_undisturbed(swarm: LocalSwarm) -> None:
    expected = reference(swarm.config.model_dump_json())
    for stage in range(swarm.config.stages):
        assert swarm.losses(stage) == expected.losses
        assert swarm.evaluations(stage) == expected.evaluations
    assert swarm.digest() == expected.digest


@pytest.mark.parametrize("over_grpc", [False, True], ids=["memory", "grpc"])
@pytest.mark.parametrize("codec", ["none", "int4"])
def test_an_undisturbed_swarm_equals_the_reference(codec: str, over_grpc: bool, tmp_path: Path) -> None:
    swarm = LocalSwarm(tiny(codec=codec), tmp_path, over_grpc=over_grpc)
    asyncio.run(swarm.run())
    assert_undisturbed(swarm)
    assert swarm.links_lost() == 2 * (swarm.config.stages - 1)  # each link once at each end, when all leave


FAULTS = st.dictionaries(st.integers(0, 90), st.sampled_from(list(Fault)), max_size=10)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=FAULTS, second=FAULTS)
def test_spoiled_frames_change_nothing(first: dict[int, Fault], second: dict[int, Fault], tmp_path_factory) -> None:
    plans = {0: FaultPlan(first), 1: FaultPlan(second)}
    swarm = LocalSwarm(tiny(), tmp_path_factory.mktemp("swarm"), plans=plans)
    asyncio.run(swarm.run())
    assert_undisturbed(swarm)


@pytest.mark.parametrize("frame", range(0, 40, 3))
def test_a_link_cut_at_any_frame_is_resumed_over_grpc(frame: int, tmp_path: Path) -> None:
    plan = FaultPlan({frame: Fault.CUT})
    swarm = LocalSwarm(tiny(stages=2, steps=3), tmp_path, plans={0: plan}, over_grpc=True)
    asyncio.run(swarm.run())
    assert plan.struck == [Fault.CUT]
    assert_undisturbed(swarm)


@pytest.mark.parametrize("over_grpc", [False, True], ids=["memory", "grpc"])
@pytest.mark.parametrize("victims", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_killed_stages_come_back_to_the_same_weights(victims: tuple[int, ...], over_grpc: bool, tmp_path: Path) -> None:
    killed: list[int] = []

    def kill_once(swarm: LocalSwarm, stage: int, report: Report) -> None:
        if isinstance(report, StepReport) and report.step == 3 and stage == 0 and not killed:
            killed.extend(victims)
            for victim in victims:
                asyncio.get_running_loop().call_later(0.004 * (victim + 1), swarm.kill, victim)

    swarm = LocalSwarm(tiny(steps=6), tmp_path, on_report=kill_once, over_grpc=over_grpc)
    asyncio.run(swarm.run())
    assert killed
    assert all(swarm.stages[victim].starts >= 2 for victim in victims)
    assert_undisturbed(swarm)


def test_recomputing_activations_changes_nothing(tmp_path: Path) -> None:
    swarm = LocalSwarm(tiny(), tmp_path, activation_budget_bytes=0)
    asyncio.run(swarm.run())
    assert_undisturbed(swarm)
