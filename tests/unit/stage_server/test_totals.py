"""What a stage counts while it works: every microbatch once, hops from hand-over to gradient, the codec's error."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from support.hand_link import Bench, changed, refused, run
from support.local_swarm import LocalSwarm

from stage_server.config import BottleneckConfig, CodecConfig, ModelConfig, PlanConfig, StageConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.reports import Report, StepReport
from stage_server.totals import HopTimer, Replays, Result, Totals
from stage_server.work import Side

STEPS, MICROBATCHES, EVALUATIONS = 4, 3, 2


def config(codec: str = "int4") -> StageConfig:
    return StageConfig(
        stages=3,
        seed=3,
        model=ModelConfig(
            vocab_size=61, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
            num_key_value_heads=1,
        ),
        bottleneck=BottleneckConfig(width=4),
        codec=CodecConfig(forward=codec, backward=codec),
        plan=PlanConfig(
            steps=STEPS, microbatches_per_step=MICROBATCHES, batch=1, tokens=8, evaluation_microbatches=EVALUATIONS,
            checkpoint_every=2, evaluate_every=2,
        ),
    )  # fmt: skip


def train(index: int, step: int = 1) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def totals_of(swarm: LocalSwarm) -> list[Totals]:
    return [stage.peer.totals for stage in swarm.stages if stage.peer is not None]


def test_every_microbatch_counts_once_at_every_stage(tmp_path: Path) -> None:
    swarm = LocalSwarm(config(), tmp_path)
    asyncio.run(swarm.run())
    rounds = 1 + STEPS // 2  # before step 1, after 2 and after 4
    for totals in totals_of(swarm):
        assert totals.microbatches == {
            Result.TRAINED: STEPS * MICROBATCHES,
            Result.EVALUATED: rounds * EVALUATIONS,
            Result.REPLAYED: 0,
            Result.REFUSED: 0,
        }
    first, middle, last = totals_of(swarm)
    for sender in (first, middle):
        hops = sender.hops.take()
        assert len(hops) == STEPS * MICROBATCHES
        assert min(hops) > 0
        assert sender.dense_bytes_forward > sender.dense_bytes_backward > 0  # evaluations have no way back
    assert last.hops.take() == []


def test_what_a_restarted_stage_computes_again_is_told_from_new_work(tmp_path: Path) -> None:
    victim, killed = 1, []

    def kill_once(swarm: LocalSwarm, stage: int, report: Report) -> None:
        if isinstance(report, StepReport) and report.step == 3 and stage == victim and not killed:
            killed.append(stage)
            asyncio.get_running_loop().call_soon(swarm.kill, victim)

    swarm = LocalSwarm(config(), tmp_path, on_report=kill_once)
    asyncio.run(swarm.run())
    assert killed
    before, again, after = totals_of(swarm)
    assert again.microbatches[Result.REPLAYED] >= MICROBATCHES  # step 3; its checkpoint was of step 2
    total = sum(again.microbatches.values())
    assert again.microbatches[Result.TRAINED] < total == 2 * MICROBATCHES + 2 * EVALUATIONS  # steps 3 and 4
    for neighbour in (before, after):
        assert neighbour.microbatches[Result.REPLAYED] == 0


def test_what_the_door_refuses_is_counted_and_never_as_computed(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await refused(bench, changed(checksum=0), code=208, opened=True)
        counts = bench.peer.totals.microbatches
        assert counts == {**dict.fromkeys(Result, 0), Result.REFUSED: 1}

    run(tmp_path, scenario)


@pytest.mark.parametrize(("codec", "least", "most"), [("none", 0.0, 0.0), ("bf16", 1e-5, 0.01), ("int4", 0.02, 0.5)])
def test_the_codecs_error_is_that_of_its_grid(codec: str, least: float, most: float, tmp_path: Path) -> None:
    swarm = LocalSwarm(config(codec), tmp_path)
    asyncio.run(swarm.run())
    errors = [dict(stage.peer.codec_errors) for stage in swarm.stages if stage.peer is not None]
    assert [sorted(error) for error in errors] == [["forward"], ["backward", "forward"], ["backward"]]
    assert all(least <= value <= most for error in errors for value in error.values())


def test_a_hop_lasts_from_the_newest_hand_over_to_the_first_answer() -> None:
    hops = HopTimer()
    hops.sent(train(0), 10.0)
    hops.sent(train(1), 11.0)
    hops.sent(train(1), 20.0)  # the link broke: sent again
    hops.returned(train(1), 20.5)
    hops.returned(train(0), 14.0)
    hops.returned(train(0), 99.0)  # a duplicate
    hops.returned(train(2), 99.0)  # never sent in this life
    assert hops.take() == [0.5, 4.0]
    assert hops.take() == []


def test_hops_without_an_answer_or_a_reader_are_forgotten() -> None:
    hops = HopTimer()
    for index in range(10_000):
        hops.sent(train(index), float(index))
    hops.returned(train(0), 1.0)
    assert hops.take() == []
    for index in range(10_000):
        hops.sent(train(index), 0.0)
        hops.returned(train(index), 1.0)
    assert len(hops.take()) < 10_000


def test_what_a_neighbour_holds_when_a_link_is_reopened_is_no_replay() -> None:
    replays = Replays()
    replays.forwarded(train(0))
    replays.opened(Side.DOWNSTREAM, 0, [train(0)])  # only the link broke
    replays.forwarded(train(1))
    assert not replays.finished(train(0))
    assert not replays.finished(train(1))


def test_what_either_neighbour_had_before_is_a_replay() -> None:
    replays = Replays()
    replays.opened(Side.UPSTREAM, 0, [train(2)])
    replays.opened(Side.DOWNSTREAM, 1, [])
    for name in (train(0), train(2), train(0, step=2)):
        replays.forwarded(name)
    assert replays.finished(train(0))
    assert replays.finished(train(2))
    assert not replays.finished(train(0, step=2))
    assert not replays.finished(train(2))  # told once
