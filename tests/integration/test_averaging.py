"""Sums over replicas through real averaging processes and hivemind's real all-reduce, on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
import pytest

from coordinator.averaging import AveragingFailed, Reason, ReplicaAveraging, StageSum, Wire
from coordinator.averaging_launch import COMMAND, FreshInterpreter

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]  # a dozen processes load torch and hivemind

NUM_VALUES = 200_000
LONG = timedelta(seconds=60)
SHORT = timedelta(seconds=4)
HERE = Path(__file__).parent
FAULTY = (sys.executable, str(HERE / "averaging_process.py"))
SLOW = ("never answers", "stops")  # nothing but time tells

T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


async def started(
    count: int, *, command: Sequence[str] = COMMAND, num_values: int = NUM_VALUES, wire: Wire = Wire.FLOAT32
) -> list[ReplicaAveraging]:
    launcher = FreshInterpreter(command)
    start = partial(
        ReplicaAveraging.start, num_values=num_values, wire=wire, listen_host="127.0.0.1", launcher=launcher
    )
    return list(await asyncio.gather(*(start(within=2 * LONG) for _ in range(count))))


async def close(replicas: Sequence[ReplicaAveraging]) -> None:
    await asyncio.gather(*(replica.close() for replica in replicas))


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def run(runner: asyncio.Runner) -> Run[Any]:
    return runner.run


@pytest.fixture(scope="module")
def four(run: Run[Any]) -> Iterator[list[ReplicaAveraging]]:
    """Sound replicas for all tests: each leaves them able to average."""
    replicas = run(started(4))
    yield replicas
    run(close(replicas))


def fill(replicas: Sequence[ReplicaAveraging]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Other values in each, and their sum."""
    rng = np.random.default_rng(len(replicas))
    for number, replica in enumerate(replicas):
        replica.values[:] = rng.standard_normal(len(replica.values), dtype=np.float32) * np.float32(10.0**-number)
    return np.sum([replica.values.astype(np.float64) for replica in replicas], axis=0)


async def average(
    replicas: Sequence[ReplicaAveraging], key: str, within: timedelta = LONG
) -> list[StageSum | AveragingFailed]:
    addresses = [replica.address for replica in replicas]
    outcomes = await asyncio.gather(
        *(replica.sum(key, addresses, count, within) for count, replica in enumerate(replicas)), return_exceptions=True
    )
    assert all(isinstance(outcome, (StageSum, AveragingFailed)) for outcome in outcomes), outcomes
    return outcomes  # type: ignore[return-value]


async def averages_well(replicas: Sequence[ReplicaAveraging], key: str, error: float = 1e-5) -> None:
    expected = fill(replicas)
    outcomes = await average(replicas, key)
    sums = [outcome for outcome in outcomes if isinstance(outcome, StageSum)]
    assert len(sums) == len(replicas), outcomes
    for replica, outcome in zip(replicas, sums, strict=True):
        assert np.linalg.norm(replica.total - expected) <= error * np.linalg.norm(expected)
        assert replica.total.tobytes() == replicas[0].total.tobytes()
        assert outcome.digest == sums[0].digest
        assert outcome.num_microbatches == sum(range(len(replicas)))


def reasons(outcomes: Sequence[StageSum | AveragingFailed]) -> list[Reason | None]:
    return [outcome.reason if isinstance(outcome, AveragingFailed) else None for outcome in outcomes]


def family_of(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def folders() -> set[Path]:
    return set(Path(tempfile.gettempdir()).glob("resbm-averaging-*"))


def shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


def wait_until_gone(family: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def test_two_and_four_members(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    for members in (four[:2], four, four[1:3], four[:1]):
        run(averages_well(members, f"{members[0].peer_id} and {len(members) - 1} more"))


def test_eight_members(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        more = await started(4)
        try:
            await averages_well([*four, *more], "eight")
        finally:
            await close(more)

    run(story())


def test_a_coarse_wire(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        coarse = await started(2, wire=Wire.FLOAT16)
        try:
            await averages_well(coarse, "coarse", error=2e-3)
            outcomes = await average([four[0], coarse[0]], "both")
            assert set(reasons(outcomes)) <= {Reason.MEMBER_STRANGE, Reason.MEMBER_LOST}
        finally:
            await close(coarse)

    run(story())


def test_a_faulty_member_voids_the_round(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    """Nobody takes a wrong sum for right, and the others average on without it."""
    faults = {
        "averages nothing": {Reason.NOT_VERIFIED},
        "leaves itself out": {Reason.NOT_VERIFIED},
        "breaks its codec": {Reason.MEMBER_LOST, Reason.EXCHANGE_FAILED},
        "never answers": {Reason.MEMBER_LOST, Reason.TIMED_OUT},
        "dies": {Reason.MEMBER_LOST, Reason.PROCESS_LOST},
        "dies late": {Reason.MEMBER_LOST, Reason.PROCESS_LOST},  # nobody waits for values of it any more
        "stops": {Reason.MEMBER_LOST, Reason.TIMED_OUT, Reason.PROCESS_LOST},
    }

    async def story() -> None:
        (faulty,) = await started(1, command=FAULTY)
        try:
            await averages_well([*four[:2], faulty], "no fault")
            for fault, expected in faults.items():
                expected_sum = fill([*four[:2], faulty])
                outcomes = await average([*four[:2], faulty], f"{fault}:", SHORT if fault in SLOW else LONG)
                assert set(reasons(outcomes)) <= expected, outcomes
                assert np.allclose(sum(replica.values.astype(float) for replica in [*four[:2], faulty]), expected_sum)
                await averages_well(four[:2], f"after one {fault}")
        finally:
            await faulty.close()

    run(story())


def test_a_hivemind_that_nobody_has_read_is_refused(run: Run[Any]) -> None:
    before = folders()
    with pytest.raises(AveragingFailed, match="HivemindChanged") as failure:
        run(started(1, command=[*FAULTY, "another digest"]))
    assert failure.value.reason is Reason.NOT_STARTED
    assert folders() <= before


def test_a_missing_member_and_a_stranger(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        one, two, three, _ = four
        fill(four)
        addresses = [replica.address for replica in four]
        with pytest.raises(AveragingFailed, match=two.peer_id) as missing:
            await one.sum("two does not come", addresses[:2], 1, SHORT)
        assert missing.value.reason is Reason.TIMED_OUT

        outcomes = await asyncio.gather(
            one.sum("three is a stranger", addresses[:2], 1, SHORT),
            two.sum("three is a stranger", addresses[:2], 1, SHORT),
            three.sum("three is a stranger", addresses[:3], 1, SHORT),
            return_exceptions=True,
        )
        assert isinstance(outcomes[0], StageSum)
        assert isinstance(outcomes[1], StageSum)
        assert outcomes[0].num_microbatches == 2
        assert isinstance(outcomes[2], AveragingFailed)

        for members in ([addresses[1]], [addresses[0], addresses[0]], [addresses[0], "/ip4/127.0.0.1/tcp/1"]):
            with pytest.raises(AveragingFailed) as wrong:
                await one.sum("no such members", members, 1, SHORT)
            assert wrong.value.reason is Reason.MEMBER_STRANGE

    run(story())


def test_values_that_are_not_finite_fail_at_once(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        fill(four)
        four[1].values[77] = np.inf
        outcomes = await average(four, "infinite")
        assert set(reasons(outcomes)) <= {Reason.MEMBER_STRANGE, Reason.MEMBER_LOST}, outcomes
        assert Reason.MEMBER_STRANGE in reasons(outcomes)

    run(story())


def test_a_cancelled_round_leaves_no_trace(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        fill(four)
        addresses = [replica.address for replica in four[:2]]
        waiting = asyncio.create_task(four[0].sum("cancelled", addresses, 1, LONG))
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.wait({waiting})
        assert waiting.cancelled()
        with pytest.raises(AveragingFailed, match="given"):
            await four[1].sum("cancelled", addresses, 1, LONG)
        await averages_well(four[:2], "after the cancellation")

    run(story())


def test_a_killed_process_is_started_anew_under_the_same_address(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        address, pid = four[0].address, four[0].pid
        assert pid is not None
        family = family_of(pid)
        assert len(family) > 1
        os.kill(pid, signal.SIGKILL)
        four[0].values[0] = 1
        wait_until_gone(family[1:])  # the daemon does not outlive it
        await averages_well(four, "after the kill")
        assert four[0].address == address
        assert four[0].pid != pid

    run(story())


def test_a_process_killed_in_its_round_says_so(run: Run[Any], four: list[ReplicaAveraging]) -> None:
    async def story() -> None:
        fill(four)
        pid = four[0].pid
        assert pid is not None
        waiting = asyncio.create_task(four[0].sum("alone", [replica.address for replica in four[:2]], 1, LONG))
        await asyncio.sleep(0.2)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(AveragingFailed) as failure:
            await waiting
        assert failure.value.reason is Reason.PROCESS_LOST
        await averages_well(four[:2], "again")

    run(story())


def test_nothing_is_left_after_close(run: Run[Any]) -> None:
    async def story() -> None:
        before = folders()
        (replica,) = await started(1)
        assert replica.pid is not None
        family = family_of(replica.pid)
        assert len(folders() - before) == 1
        await replica.close()
        await replica.close()
        assert not [process for process in family if process.is_running()]
        assert folders() <= before
        left = [path for path in shared_memory() if path.name.startswith(f"torch_{family[0].pid}_")]
        assert not left  # a pid is short enough to be found in other names by chance
        with pytest.raises(AveragingFailed):
            await replica.sum("closed", [replica.address], 1, SHORT)

    run(story())


@contextlib.contextmanager
def parent(story: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """A process that holds averagers, killed at the end, and what it says of them."""
    command = [sys.executable, str(HERE / "averaging_parent.py"), story]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, start_new_session=True) as parent:
        try:
            assert parent.stdout is not None
            yield parent, json.loads(parent.stdout.readline())
        finally:
            parent.kill()


def test_nothing_is_left_after_the_parents_death() -> None:
    before = folders()
    with parent("fresh") as (_, said):
        family = family_of(said["pids"][0])
        assert len(family) > 1
    wait_until_gone(family)
    deadline = time.monotonic() + 10
    while folders() - before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert folders() <= before


def files_of(pid: int) -> set[str]:
    """Names of all open files; a pipe or socket has a name of its own."""
    return {str(path.readlink()) for path in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.mark.skipif(sys.platform != "linux", reason="forks with descriptors of processes")
def test_a_zygote_forks_averagers_that_add_up_and_that_end_with_the_parent() -> None:
    with parent("zygote") as (process, said):
        assert said["sums"] == [3.0, 3.0]
        averagers = [psutil.Process(pid) for pid in said["pids"]]
        (zygote,) = {averager.parent() for averager in averagers}
        assert zygote is not None
        assert zygote.ppid() == process.pid
        family = family_of(process.pid)
        assert len(family) == 6  # parent, zygote, two averaging processes with a daemon each

        groups = [os.getpgid(member.pid) for member in (psutil.Process(process.pid), zygote, *averagers)]
        assert len(set(groups)) == len(groups)  # Ctrl+C at a terminal reaches the parent alone
        assert set(zygote.children()) == set(averagers)  # the killed one is reaped

        pipes = {str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in (0, 1)}
        assert all(name.startswith("pipe:") for name in pipes)
        assert not [member for member in family[1:] if files_of(member.pid) & pipes]
        sockets_to_parent = {name for name in files_of(said["pids"][0]) if name.startswith("socket:")}
        others = [member for member in family if member.pid != said["pids"][0]]
        assert not [member for member in others if files_of(member.pid) & sockets_to_parent]
        assert not [name for name in files_of(zygote.pid) if "memfd" in name or name.endswith("/lock")]
    wait_until_gone(family)


@pytest.mark.skipif(sys.platform != "linux", reason="forks with descriptors of processes")
def test_who_has_lost_its_zygote_goes_on_with_fresh_interpreters() -> None:
    with parent("lost zygote") as (process, said):
        assert said["sums"] == [7.0]
        assert psutil.Process(said["pids"][0]).ppid() == process.pid
        family = family_of(process.pid)
        assert len(family) == 3  # parent, averaging process, daemon: the zygote is reaped
    wait_until_gone(family)
