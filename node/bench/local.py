"""`resbm-node bench local`: what a swarm costs against one process, on the same cores.

Swarm and reference run in turn, in changing order, so that whatever else slows the machine down slows both. Each is
measured over its steady steps: after the first few, with its checkpoints, without validation. The reference has as many
threads as there are cores, or one, whichever is faster; each stage of the swarm has one.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, Spread, Watcher, watching

if TYPE_CHECKING:
    from node.bench.reference_run import ReferenceRun
    from node.bench.swarm_run import StepsDone, SwarmRun
    from node.config import RunConfig


def local(
    *,
    preset: Annotated[list[str] | None, typer.Option(help="Runs to measure.", show_default="demo, wide")] = None,
    stages: Annotated[list[int] | None, typer.Option(help="Stages of the swarm.", show_default="4, 2")] = None,
    pairs: Annotated[int | None, typer.Option(min=1, help="Pairs of runs.", show_default="3; --quick: 1")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steady steps.", show_default="20; --quick: 5")] = None,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Measure a swarm against one process on the same cores: speed, where the time goes, memory of each stage.

    Example: resbm-node bench local --preset demo --stages 4
    """
    cases = [
        Case(name, count) for name in preset or ("demo", "wide") for count in stages or ((4,) if quick else (4, 2))
    ]
    plan = Plan(
        pairs=pairs or (1 if quick else 3),
        more_pairs=0 if quick else 3,
        warm_up=2 if quick else 4,
        steps=steps or (5 if quick else 20),
    )
    with watching(json_lines=json_lines) as watcher:
        report = Report("local", watcher, quick=quick, out=out)
        results = measure(cases, plan, watcher)
        from node.bench.local_tables import summary_of, tables_of

        report.finish([asdict(result) for result in results], tables_of(results), summary_of(results))


@dataclass(frozen=True, slots=True)
class Case:
    """One comparison."""

    preset: str
    stages: int


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is run for each case."""

    pairs: int
    more_pairs: int  # that may replace ones in which other programs were busy
    warm_up: int  # steps before the steady ones: allocators, caches and the credit window settle
    steps: int  # steady ones


CALIBRATION = Plan(pairs=1, more_pairs=0, warm_up=1, steps=3)
"""Enough to see how many threads suit the reference best."""

MAX_FOREIGN_SHARE = 0.05
"""A pair counts as undisturbed when other programs took no more of the cores than this."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that were neighbours in time."""

    swarm: SwarmRun
    reference: ReferenceRun

    @property
    def ratio(self) -> float:
        return self.swarm.tokens_per_second / self.reference.tokens_per_second

    @property
    def foreign_share(self) -> float:
        """The most that other programs took of the cores in either run."""
        return max(self.swarm.cpu.foreign_share, self.reference.cpu.foreign_share)


@dataclass(frozen=True, slots=True)
class CaseResult:
    """What was measured for one case."""

    case: Case
    run_id: str
    seed: int
    hidden_size: int
    tokens_per_step: int
    reference_threads: int
    calibration: Sequence[ReferenceRun]  # by number of threads: the best of them is the reference
    pairs: Sequence[Pair]
    left_out: Sequence[Pair]  # disturbed, and others were less so

    @property
    def ratio(self) -> Spread:
        """Swarm / reference, in tokens per second."""
        return Spread.of([pair.ratio for pair in self.pairs])

    @property
    def swarm(self) -> list[SwarmRun]:
        return [pair.swarm for pair in self.pairs]

    @property
    def foreign_share(self) -> float:
        return max(pair.foreign_share for pair in self.pairs)


def measure(cases: Sequence[Case], plan: Plan, watcher: Watcher) -> list[CaseResult]:
    """All cases, one after another."""
    from node.data import load_corpus

    results = []
    for number, case in enumerate(cases):
        config = config_of(case, plan)
        span = (number / len(cases), (number + 1) / len(cases))
        watcher.doing("reading text", span[0])
        load_corpus(config)  # all processes then find it in the cache
        with pinned(case.stages):
            results.append(_Case(case, config, plan, watcher, span).measure())
    return results


@contextmanager
def pinned(num_cores: int) -> Iterator[None]:
    """This process and those it starts have at most so many cores: with one thread a stage, a swarm uses no more."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:num_cores])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def config_of(case: Case, plan: Plan) -> RunConfig:
    """The preset's run, as long as is measured, without validation."""
    from node.config import preset, validated

    config = preset(case.preset).with_overrides(stages=case.stages, steps=plan.warm_up + plan.steps)
    values = config.model_dump()
    values["plan"]["evaluation_microbatches"] = 0
    return validated(values, "benchmark")


class _Case:
    """Runs one case and tells of its progress: every step of every run counts alike."""

    def __init__(self, case: Case, config: RunConfig, plan: Plan, watcher: Watcher, span: tuple[float, float]) -> None:
        """`span`: the part of the whole benchmark, from 0 to 1, that this case is."""
        self.case, self.config, self.plan = case, config, plan
        self._watcher = watcher
        self._span = span
        self._steps_done = 0
        self._cores = len(os.sched_getaffinity(0))
        self._thread_counts = sorted({1, self._cores})
        calibration = len(self._thread_counts) * (CALIBRATION.warm_up + CALIBRATION.steps)
        self._num_steps = calibration + 2 * plan.pairs * (plan.warm_up + plan.steps)

    def measure(self) -> CaseResult:
        calibration = [self._run_reference(threads, CALIBRATION) for threads in self._thread_counts]
        threads = max(calibration, key=lambda run: run.tokens_per_second).threads
        made: list[Pair] = []
        undisturbed, least, most = 0, self.plan.pairs, self.plan.pairs + self.plan.more_pairs
        while undisturbed < least and len(made) < most:
            made.append(self._pair(threads, swarm_first=len(made) % 2 == 0))
            undisturbed += made[-1].foreign_share <= MAX_FOREIGN_SHARE
            self._tell(len(made), made[-1])
        made.sort(key=lambda pair: pair.foreign_share)
        config, plan = self.config, self.config.plan
        tokens_per_step = plan.microbatches_per_step * plan.batch * plan.tokens
        return CaseResult(
            self.case,
            config.run_id,
            config.seed,
            config.model.hidden_size,
            tokens_per_step,
            threads,
            calibration,
            made[:least],
            made[least:],
        )

    def _pair(self, threads: int, *, swarm_first: bool) -> Pair:
        if swarm_first:
            swarm = self._run_swarm()
            return Pair(swarm, self._run_reference(threads, self.plan))
        alone = self._run_reference(threads, self.plan)
        return Pair(self._run_swarm(), alone)

    def _run_reference(self, threads: int, plan: Plan) -> ReferenceRun:
        from node.bench.reference_run import run_reference

        config = config_of(self.case, plan)
        with tempfile.TemporaryDirectory(prefix="resbm-node-bench-") as folder:
            progress = self._progress(f"reference with {threads} threads", plan)
            return run_reference(config, Path(folder), warm_up=plan.warm_up, threads=threads, on_step=progress)

    def _run_swarm(self) -> SwarmRun:
        from node.bench.swarm_run import run_swarm

        progress = self._progress(f"swarm of {self.case.stages} stages", self.plan)
        return run_swarm(self.config, warm_up=self.plan.warm_up, threads=1, on_step=progress)

    def _progress(self, what: str, plan: Plan) -> StepsDone:
        steps_before, text = self._steps_done, f"{self.case.preset}: {what}"
        self._steps_done += plan.warm_up + plan.steps

        def on_step(step: int) -> None:
            of_case = (steps_before + step) / self._num_steps
            start, end = self._span
            self._watcher.doing(text, start + (end - start) * min(1.0, of_case))

        on_step(0)
        return on_step

    def _tell(self, number: int, pair: Pair) -> None:
        case, swarm, alone = self.case, pair.swarm.tokens_per_second, pair.reference.tokens_per_second
        self._watcher.note(
            {
                "event": "pair",
                "preset": case.preset,
                "stages": case.stages,
                "pair": number,
                "swarm_tokens_per_second": swarm,
                "reference_tokens_per_second": alone,
                "ratio": pair.ratio,
                "foreign_share": pair.foreign_share,
                "text": f"{case.preset}, {case.stages} stages, pair {number}: swarm {swarm:,.0f}, reference "
                f"{alone:,.0f} tokens/s, ratio {pair.ratio:.3f}, other programs {100 * pair.foreign_share:.0f} %",
            }
        )
