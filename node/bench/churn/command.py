"""`resbm-node bench churn`: machines that come, stall and die while a swarm trains, and what of it training shows.

Real processes: a coordinator and peers as anyone would start them, each in a network namespace of its own where this
runs as root, else all on the loopback. First undisturbed, then every few seconds a random peer is killed, stopped or
cut off and a new one joins. Afterwards every commit's microbatches are counted, and recorded steps are computed again
by one process from the same weights on the same microbatches.
"""

from __future__ import annotations

import asyncio
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import psutil
import typer

from node.bench.churn.health import Health, keep_sampling
from node.bench.churn.journal import Counted, Journal, count_microbatches, percentile
from node.bench.churn.schedule import Blow, ChurnPlan, choose_victim
from node.bench.common import JsonLines, OutFile, Quick, Report, Table, watching
from stage_server.concurrency import cancelled

if TYPE_CHECKING:
    from node.bench.churn.swarm import ChurnSwarm
    from node.bench.churn.verify import Verified
    from node.config import RunConfig
    from node.demo import Place

FORMING_SECONDS = 180.0
LEFT_ALONE_WITHIN = 8.0
"""Seconds after the end of a peer in which nothing of it is left: `torch_shm_manager` takes four to notice."""
MOST_RECORDS = 70
"""Recorded steps of a run that takes one a second: a sample that does not grow with a long run."""
FEWEST_BETWEEN_RECORDS = 10  # steps
MOST_COMPARED = 1000
"""Steps after which the loss is compared with an undisturbed run's at the latest: one process trains them all again."""
PRESET = "tiny"


def churn(
    *,
    preset: Annotated[str, typer.Option(help="Run to train; its stages are shared.")] = PRESET,
    stages: Annotated[int, typer.Option(min=1, help="Stages.")] = 4,
    peers: Annotated[int, typer.Option(min=1, help="Peers at the start.")] = 8,
    microbatches: Annotated[int, typer.Option(min=1, help="Microbatches in a step.")] = 16,
    quiet: Annotated[float, typer.Option(min=0, help="Seconds before the first blow.")] = 120.0,
    seconds: Annotated[float, typer.Option(min=1, help="Seconds of churn.")] = 600.0,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two blows.")] = 20.0,
    stop: Annotated[float, typer.Option(min=0, help="Seconds that a stopped peer sleeps.")] = 15.0,
    spare: Annotated[
        int,
        typer.Option(
            min=0, help="Peers to whom nothing happens, each at one stage for good: a long run shows in them."
        ),
    ] = 0,
    rate: Annotated[float, typer.Option(min=0.01, help="Mbit/s of each up-link and down-link.")] = 80.0,
    round_trip: Annotated[
        float,
        typer.Option(min=0, help="Milliseconds between two peers. Who waits for links leaves the cores to who starts."),
    ] = 80.0,
    without_coordinator: Annotated[
        bool, typer.Option("--without-coordinator", help="Kill the coordinator with the first blow, for good.")
    ] = False,
    loopback: Annotated[
        bool, typer.Option("--loopback", help="No network namespaces, so no links are cut; needs no root.")
    ] = False,
    folder: Annotated[
        Path | None, typer.Option(help="Keep the processes' folders, logs and records here.", show_default="not kept")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides who is hit by what.")] = 0,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Train while peers are killed, stopped and replaced; count every microbatch and check the gradients.

    Example: resbm-node bench churn --quick
    """
    if quick:
        stages, peers, quiet, seconds, every, stop = 2, 4, 20.0, 60.0, 15.0, 8.0
    from node.config import preset as preset_named
    from node.config import validated

    values = preset_named(preset).model_dump()
    values["stages"] = stages
    values["model"]["num_hidden_layers"] = max(stages, values["model"]["num_hidden_layers"])
    values["plan"] |= {
        "steps": 100_000,
        "microbatches_per_step": microbatches,
        "evaluate_every": 50,
        # Not at every step: between checkpoints frames are retained, and with them a replica that is steps behind
        # catches up when those ahead of it have died.
        "checkpoint_every": 10,
    }
    values["replicas"] |= {"averaging": "sync", "common_every": 1}
    config = validated(values, "command line")
    loopback = loopback or os.geteuid() != 0
    blows = tuple(blow for blow in Blow if blow is not Blow.CUT or not loopback)
    plan = ChurnPlan(peers, quiet, seconds, every, stop, blows, seed, spare)
    with watching(json_lines=json_lines) as watcher:
        report = Report("churn", watcher, quick=quick, out=out)
        with _folder(folder) as where:
            found = _Findings(config, plan, where, watcher.doing, without_coordinator=without_coordinator)
            links = None if loopback else (rate, round_trip)
            with _place(plan, links) as place:
                asyncio.run(found.run(place))
            found.verify()
        network = "loopback" if links is None else {"rate_mbit": rate, "round_trip_ms": round_trip}
        measurements = {"run": config.model_dump(mode="json"), "run_id": config.run_id, "network": network}
        measurements |= found.measurements()
        report.finish(measurements, found.tables(), found.summary())


def _descendants() -> set[int]:
    """Processes that live below this one: it adopts those whose parents have died."""
    below = psutil.Process().children(recursive=True)
    return {process.pid for process in below if process.is_running() and process.status() != psutil.STATUS_ZOMBIE}


@contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory(prefix="resbm-churn-") as folder:
        yield Path(folder)


def _place(plan: ChurnPlan, links: tuple[float, float] | None) -> AbstractContextManager[Place]:
    """`links`: Mbit/s and milliseconds between two peers, in network namespaces; None: the loopback."""
    from node.demo import COORDINATOR, Loopback

    if links is None:
        return nullcontext(Loopback())
    from node.bench.churn.swarm import peer_name
    from node.lab.namespaces import NamespaceLab
    from node.lab.shapes import LinkShape

    names = [COORDINATOR, *(peer_name(number) for number in range(1, plan.num_joins + 1))]
    return NamespaceLab(names, LinkShape.of_round_trip(*links))


class _Findings:
    """One run of the benchmark and what it showed."""

    def __init__(
        self,
        config: RunConfig,
        plan: ChurnPlan,
        folder: Path,
        doing: Callable[[str, float], None],
        *,
        without_coordinator: bool,
    ) -> None:
        self._config, self._plan, self._folder, self._doing = config, plan, folder, doing
        self._without_coordinator = without_coordinator
        self._marks: dict[str, float] = {}
        self.journal = Journal(config.stages)
        self.health = Health()
        self.left_behind = 0
        self.undisturbed_loss: float | None = None
        self.counted = Counted(0, 0, 0, 0)
        self.verified: list[Verified] = []

    async def run(self, place: Place) -> None:
        """Forms the swarm, leaves it alone, strikes it, ends it."""
        from node.bench.churn.swarm import ChurnSwarm
        from node.config import dump_toml
        from node.processes import become_subreaper

        become_subreaper()
        run_file = self._folder / "run.toml"
        run_file.write_text(dump_toml(self._config))
        not_ours = _descendants()
        swarm = ChurnSwarm(run_file, self._config.stages, self._folder, place, record_every=self._record_every())
        self.journal = swarm.journal
        sampling = asyncio.create_task(keep_sampling(self.health, lambda: swarm.pids))
        try:
            await swarm.start()
            for number in range(self._plan.peers):
                self._doing(f"peer {number + 1} of {self._plan.peers} measures this machine", 0.0)
                stage = str(number % self._config.stages) if number < self._plan.num_spared else "auto"
                await swarm.until_measured(await swarm.join(late=False, stage=stage))
            await self._until_formed(swarm)
            self._marks["quiet"] = time.monotonic()
            await self._pass(self._plan.quiet_seconds, "undisturbed", 0.0)
            self._marks["churn"] = time.monotonic()
            await self._strike(swarm)
            self._marks["end"] = time.monotonic()
        finally:
            await cancelled(sampling)
            await swarm.close()
        left_behind = _descendants() - not_ours
        end = time.monotonic() + LEFT_ALONE_WITHIN
        while left_behind and time.monotonic() < end:
            await asyncio.sleep(0.1)
            left_behind = _descendants() - not_ours
        self.left_behind = len(left_behind)
        self._count(swarm.records)

    async def _until_formed(self, swarm: ChurnSwarm) -> None:
        async with asyncio.timeout(FORMING_SECONDS):
            while len(swarm.serving) < self._plan.peers:
                self._doing(f"{len(swarm.serving)} of {self._plan.peers} peers take part", 0.0)
                await asyncio.sleep(0.5)

    async def _pass(self, seconds: float, what: str, done: float) -> None:
        end = time.monotonic() + seconds
        total = self._plan.quiet_seconds + self._plan.churn_seconds
        while (left := end - time.monotonic()) > 0:
            self._doing(
                f"{what}, step {max(self.journal.swarm_step_times(), default=0)}", done + (seconds - left) / total
            )
            await asyncio.sleep(min(1.0, left))

    async def _strike(self, swarm: ChurnSwarm) -> None:
        from node.bench.churn.swarm import peer_name

        plan = self._plan
        chance = random.Random(plan.seed)
        if self._without_coordinator:
            swarm.end_coordinator()
        total = plan.quiet_seconds + plan.churn_seconds
        spared = {peer_name(number + 1) for number in range(plan.num_spared)}
        sleepers: set[asyncio.Task[None]] = set()
        for number in range(plan.num_blows):
            blow = chance.choice(list(plan.blows))
            victim = choose_victim(swarm.serving, chance, spared)
            if victim is not None:
                swarm.strike(blow, victim)
                if blow is not Blow.KILL:
                    sleepers.add(asyncio.create_task(self._wake(swarm, victim)))
                await swarm.join(late=True)
            done = (plan.quiet_seconds + number * plan.every_seconds) / total
            await self._pass(plan.every_seconds, f"blow {number + 1} of {plan.num_blows}: {blow}", done)
        await cancelled(*sleepers)

    async def _wake(self, swarm: ChurnSwarm, name: str) -> None:
        """It goes on, finds back, and leaves in good order later: the peer that joined at the blow has its place."""
        await asyncio.sleep(self._plan.stop_seconds)
        swarm.go_on(name)
        await asyncio.sleep(self._plan.every_seconds)
        while swarm.is_needed(name):  # noqa: ASYNC110 - nobody who cares leaves as the last of a stage
            await asyncio.sleep(1.0)
        swarm.ask_to_leave(name)

    def _count(self, records: Path) -> None:
        from node.replication.duties import sizes
        from node.replication.record import read_commits
        from stage_server.plan import Plan

        size = sizes(Plan.of(self._config.plan))
        commits = read_commits(records)
        newest = max((commit.step for commit in commits), default=0)
        self.counted = count_microbatches(
            ((c.stage, c.step, c.lineage, list(c.shares.values())) for c in commits),
            [size(step) for step in range(newest + 1)],
        )

    def verify(self) -> None:
        """Computes the recorded steps again, and then all steps undisturbed up to the last evaluation."""
        from node.bench.churn.verify import undisturbed_loss, verify_steps

        self._doing("computing recorded steps again", 0.97)
        self.verified = verify_steps(self._config, self._folder / "records")
        if self._evaluated:
            self._doing(f"training {self._evaluated} steps undisturbed", 0.98)
            self.undisturbed_loss = undisturbed_loss(self._config, self._evaluated)

    def _record_every(self) -> int:
        seconds = self._plan.quiet_seconds + self._plan.churn_seconds
        return max(FEWEST_BETWEEN_RECORDS, round(seconds / MOST_RECORDS))

    @property
    def _evaluated(self) -> int:
        """Steps before the last evaluation that is compared; 0: there was none."""
        return max((step for step in self.journal.evaluations if step <= MOST_COMPARED), default=0)

    # -- results ------------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        journal, marks = self.journal, self._marks
        quiet = journal.steps_per_second(marks["quiet"], marks["churn"])
        churning = journal.steps_per_second(marks["churn"], marks["end"])
        return {
            "lost": self.counted.lost,
            "duplicated": self.counted.duplicated,
            "gradient_max_relative_difference": max((v.relative_difference for v in self.verified), default=None),
            "replicas_identical": all(v.identical for v in self.verified),
            "forked_commits": self.counted.disagreements,
            "throughput_ratio": churning / quiet if quiet else None,
            "recovery_p50_seconds": percentile(journal.recoveries(), 0.50),
            "recovery_p95_seconds": percentile(journal.recoveries(), 0.95),
            "join_p50_seconds": percentile(journal.join_times(), 0.50),
            "join_p95_seconds": percentile(journal.join_times(), 0.95),
            "longest_step_seconds": journal.longest_step(marks["churn"], marks["end"]),
            "blows": len(journal.struck),
            "most_peers_running": max((struck.num_running for struck in journal.struck), default=None),
            "steps": max(journal.swarm_step_times(), default=0),
            "commits_counted": self.counted.commits,
            "steps_verified": len(self.verified),
            "losses_disagree": sum(max(told) - min(told) > 1e-4 for told in journal.losses.values()),
            "worker_restarts": journal.restarts,
            "val_loss_steps": self._evaluated,
            "val_loss": journal.evaluations.get(self._evaluated),
            "val_loss_undisturbed": self.undisturbed_loss,
            **self.health.summary(),
            "processes_left_behind": self.left_behind,
        }

    def tables(self) -> list[Table]:
        rows = [
            (name, "–" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value))
            for name, value in self.summary().items()
        ]
        return [Table("Training while machines come, stall and die", ("figure", "value"), rows)]

    def measurements(self) -> dict[str, Any]:
        start = self._marks["quiet"]
        journal = self.journal
        return {
            "plan": asdict(self._plan),
            "without_coordinator": self._without_coordinator,
            "churn_began_seconds": self._marks["churn"] - start,
            "steps": {step: round(at - start, 3) for step, at in journal.swarm_step_times().items()},
            "struck": [{**asdict(struck), "at": round(struck.at - start, 3)} for struck in journal.struck],
            "recoveries_seconds": journal.recoveries(),
            "joins_seconds": journal.join_times(),
            "evaluations": journal.evaluations,
            "survivors": {
                peer: [asdict(sample) | {"at": round(sample.at - start, 1)} for sample in samples]
                for peer, samples in self.health.survivors().items()
            },
            "memory_slopes_bytes_per_second": {p: asdict(slope) for p, slope in self.health.memory_slopes().items()},
            "open_files_slopes_per_second": {p: asdict(slope) for p, slope in self.health.file_slopes().items()},
            "verified": [asdict(verified) for verified in self.verified],
        }
