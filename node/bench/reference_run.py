"""One measured run of the unsplit model: `resbm-node reference` in a process of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from node.bench.cpu_account import CpuAccount, Sample, between, sample
from node.bench.swarm_run import StepsDone
from node.config import dump_toml
from node.demo import COMMAND, Interrupted
from node.errors import MachineUnfit
from node.events import Event, Step
from node.pipes import forward_events, reading_stdout
from node.processes import BoundedLog, start_child, terminate_then_kill
from node.supervisor import stop_on_signals
from node.tasks import first_of

if TYPE_CHECKING:
    from node.config import RunConfig

LEAVING = timedelta(seconds=5)


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """What one run showed."""

    threads: int
    tokens_per_second: float
    step_seconds: Sequence[float]  # of the steady steps
    cpu: CpuAccount


def run_reference(config: RunConfig, folder: Path, *, warm_up: int, threads: int, on_step: StepsDone) -> ReferenceRun:
    """Trains the run; all steps after the first `warm_up` are measured. Call it in the main thread.

    Args:
        folder: for the run file and the log.

    Raises:
        MachineUnfit: the process gave up.
        KeyboardInterrupt: someone asked to stop.
    """
    plan = config.plan
    run_file = folder / "run.toml"
    run_file.write_text(dump_toml(config))
    log = BoundedLog(folder / "reference.log")
    steps: list[Step] = []
    samples: list[Sample] = []

    def on_event(event: Event) -> None:
        if isinstance(event, Step):
            steps.append(event)
            if event.step in (warm_up, plan.steps):
                samples.append(sample())
            on_step(event.step)

    command = [*COMMAND, "reference", "--run", str(run_file), "--threads", str(threads), "--json"]
    try:
        asyncio.run(_follow(command, log, on_event))
    except Interrupted:
        raise KeyboardInterrupt from None
    if len(samples) < 2:
        last = (log.tail(1) or [""])[0]
        raise MachineUnfit(f"the reference ended after {len(steps)} of {plan.steps} steps: {last}")
    seconds = [step.seconds for step in steps[warm_up:]]
    tokens_per_step = plan.microbatches_per_step * plan.batch * plan.tokens
    return ReferenceRun(threads, len(seconds) * tokens_per_step / sum(seconds), seconds, between(*samples))


async def _follow(command: Sequence[str], log: BoundedLog, on_event: Callable[[Event], None]) -> None:
    """Until the process ends; nothing of it is left then. Raises Interrupted."""
    process = start_child(command, log=log)
    stopping = asyncio.Event()
    try:
        with stop_on_signals(stopping.set):
            async with reading_stdout(process) as reader:
                await first_of(forward_events(reader, on_event, log.write), stopping.wait())
        if stopping.is_set():
            raise Interrupted
    finally:
        terminate_then_kill(process, LEAVING)
