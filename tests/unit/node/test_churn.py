"""The churn benchmark's pure parts: who is hit, what is counted, what the times say."""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from dataclasses import replace

from node.bench.churn.health import Health, Sample, Slope, keep_sampling
from node.bench.churn.journal import Counted, Journal, Struck, count_microbatches, percentile
from node.bench.churn.schedule import Blow, ChurnPlan, choose_victim


def test_the_last_peer_of_a_stage_is_spared() -> None:
    serving = {"a": 0, "b": 0, "c": 1}
    hit = Counter(choose_victim(serving, random.Random(seed)) for seed in range(50))
    assert hit.keys() == {"a", "b"}
    assert choose_victim({"a": 0, "b": 1}, random.Random(0)) is None
    assert choose_victim(serving, random.Random(0), {"a", "c"}) == "b"
    assert choose_victim(serving, random.Random(0), {"a", "b"}) is None


def test_a_seed_gives_the_same_churn() -> None:
    serving = {f"peer-{number}": number % 2 for number in range(8)}
    first, second = (
        [choose_victim(serving, chance) for _ in range(9)] for chance in (random.Random(3), random.Random(3))
    )
    assert first == second
    assert ChurnPlan(8, 60.0, 600.0, 20.0, 15.0).num_blows == 30


def test_lost_and_doubled_microbatches_are_counted_once_a_sum() -> None:
    sizes = [0, 3, 3]
    whole = [[0, 2], [1]]
    assert count_microbatches([(0, 1, "x", whole), (0, 1, "x", whole), (0, 2, "y", whole)], sizes) == Counted(
        2, 0, 0, 0
    )
    assert count_microbatches([(0, 1, "x", [[0], [0, 1]])], sizes) == Counted(1, 1, 1, 0)
    assert count_microbatches([(0, 1, "x", whole), (0, 1, "z", whole)], sizes).disagreements == 1
    assert count_microbatches([(0, 1, "x", [])], sizes) == Counted(0, 0, 0, 0)  # nothing is known of it


def test_the_journal_tells_speed_recovery_and_joining() -> None:
    journal = Journal(num_stages=2)
    for step in range(1, 11):
        for stage in (0, 1):
            journal.committed(f"old-{stage}", stage, step, 1.0, at=float(step) + 0.1 * stage)
    journal.committed("old-0", 0, 11, 1.0, at=20.0)  # the other stage has not committed it
    assert max(journal.swarm_step_times()) == 10
    assert journal.steps_per_second(0.0, 10.0) == 0.9  # the tenth came at 10.1
    assert journal.longest_step(3.0, 4.0) is None  # one step
    journal.committed("old-1", 1, 11, 1.0, at=12.5)  # stage 0 at 20.0
    assert journal.longest_step(0.0, 30.0) == 20.0 - 10.1
    del journal.stage_steps[1][11]
    journal.struck.append(Struck(5.5, Blow.KILL, "old-0", 0, 8))
    assert journal.recoveries() == [7.1 - 5.5]
    journal.joined["new"] = 8.0
    assert journal.join_times() == []
    journal.committed("new", 1, 10, 1.0, at=10.5)
    assert journal.join_times() == [2.5]


def test_who_lags_behind_its_stage_is_not_level() -> None:
    journal = Journal(num_stages=1)
    for step in range(1, 8):
        journal.committed("ahead", 0, step, None, at=float(step))
    journal.committed("close", 0, 5, None, at=9.0)
    journal.committed("far", 0, 4, None, at=9.0)
    assert [journal.is_level(peer, 0) for peer in ("ahead", "close", "far", "never")] == [True, True, False, False]


def test_percentiles_of_few() -> None:
    assert percentile([], 0.5) is None
    assert percentile([3.0], 0.95) == 3.0
    assert percentile([1.0, 2.0, 3.0], 0.5) == 2.0


# -- health -----------------------------------------------------------------------------------------------------


def peer_samples(*, growth: float, minutes: float = 30.0) -> list[Sample]:
    """`growth`: bytes a second, after a start that takes what it takes."""
    times = [10.0 * turn for turn in range(int(minutes * 6))]
    sizes = [4e8 + 1e6 * min(at, 100.0) + growth * at + 1e5 * (turn % 3) for turn, at in enumerate(times)]
    return [Sample(at, int(size), 50, 6) for at, size in zip(times, sizes, strict=True)]


def test_a_leak_shows_and_a_start_does_not() -> None:
    health = Health({"leaks": peer_samples(growth=5000.0), "sound": peer_samples(growth=0.0)})
    slopes = health.memory_slopes()
    assert abs(slopes["leaks"].per_second - 5000.0) < 50
    assert slopes["leaks"].per_second > 10 * slopes["leaks"].error
    assert abs(slopes["sound"].per_second) < 3 * slopes["sound"].error


def test_memory_that_wanders_is_no_trend() -> None:
    chance, wandering, size = random.Random(1), [], 4e8
    for turn in range(180):
        size += chance.gauss(0.0, 1e6) - 0.1 * (size - 4e8)
        wandering.append(Sample(20.0 * turn, int(size), 50, 6))
    slope = Health({"wanders": wandering}).memory_slopes()["wanders"]
    assert abs(slope.per_second) < 2 * slope.error
    alone = Slope.of([(float(at), float(at % 2)) for at in range(100)])  # points that say nothing of the next one
    assert alone.error < 0.01


def test_open_files_of_an_averager_that_starts_late_are_no_leak() -> None:
    alone = [Sample(20.0 * turn, 4 * 10**8, 90, 6) for turn in range(10, 20)]
    together = [Sample(20.0 * turn, 5 * 10**8, 140 + turn % 2, 8) for turn in range(20, 60)]
    summary = Health({"peer": alone + together}).summary()
    assert summary["open_files_change"] == 1
    assert abs(summary["open_files_slope_per_hour"]) < 2 * summary["open_files_slope_error_per_hour"]
    leaking = [replace(sample, open_files=sample.open_files + turn // 5) for turn, sample in enumerate(together)]
    summary = Health({"peer": alone + leaking}).summary()
    assert summary["open_files_change"] >= 5
    assert summary["open_files_slope_per_hour"] > 5 * summary["open_files_slope_error_per_hour"]


def test_who_lived_much_shorter_than_others_says_nothing_of_trends() -> None:
    health = Health({"long": peer_samples(growth=0.0), "young": peer_samples(growth=5000.0, minutes=7)})
    assert health.memory_slopes().keys() == {"long"}


def test_who_lived_too_short_says_nothing_of_trends() -> None:
    health = Health({"short": peer_samples(growth=5000.0, minutes=3)})
    assert health.summary() == {
        "survivors": 0,
        "memory_slope_mb_per_hour": None,
        "memory_slope_error_mb_per_hour": None,
        "open_files_slope_per_hour": None,
        "open_files_slope_error_per_hour": None,
        "open_files_change": None,
    }


async def sampled(health: Health) -> None:
    sampling = asyncio.create_task(keep_sampling(health, lambda: {"me": os.getpid(), "gone": 2**22}))
    while not health.samples:  # noqa: ASYNC110 - filled by a task that runs for ever
        await asyncio.sleep(0.01)
    sampling.cancel()
    await asyncio.gather(sampling, return_exceptions=True)


def test_a_living_process_is_sampled_and_one_that_is_gone_is_passed_over() -> None:
    health = Health()
    asyncio.run(sampled(health))
    assert set(health.samples) == {"me"}
    assert health.samples["me"][0].memory_bytes > 1e6
    assert health.samples["me"][0].open_files > 0
    assert health.samples["me"][0].processes > 0
