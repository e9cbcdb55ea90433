"""`resbm-node bench placement`: how near simulated swarms come to the best placement, and how many peers move for it.

The decisions are the real ones; peers, links and the directory are simulated. So a figure is the same on any machine.
The bound is what the machines that are there could do if they could be cut into pieces and were never on the move.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from node.bench.common import JsonLines, OutFile, Quick, Report, Table, Watcher, watching

if TYPE_CHECKING:
    from coordinator.rebalancing import Policy
    from node.bench.swarm_simulation import History, Scenario

SIZES = ((8, 3), (30, 3), (100, 8), (1000, 20), (10_000, 100))
QUICK_SIZES = ((8, 3), (30, 3), (100, 8))
CHURN = (0.0, 0.5, 2.0)
STEADY_AFTER = 900.0
"""Seconds from which on a swarm is judged: until 600 its first peers join."""
LARGE = 1000
"""Swarms of this many peers are placed at the start, and simulated for a shorter time."""


def placement(
    *,
    peers: Annotated[int | None, typer.Option(min=1, help="Peers.", show_default="8 to 10000")] = None,
    stages: Annotated[int, typer.Option(min=1, help="Stages, with --peers.")] = 4,
    churn: Annotated[
        list[float] | None,
        typer.Option(min=0, help="Peers that go an hour, for each that is there.", show_default="0, 0.5, 2"),
    ] = None,
    minutes: Annotated[
        int | None, typer.Option(min=1, help="Simulated time after all have joined.", show_default="75; large: 5")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Histories of each.", show_default="5; large: 1")] = None,
    quick: Quick = False,
    json_lines: JsonLines = False,
    out: OutFile = None,
) -> None:
    """Simulate swarms whose peers join, move, leave and die.

    Half of those who go die without a word; for each that goes another joins. Machines differ 4-fold in speed.

    Example: resbm-node bench placement --peers 50 --stages 5 --churn 1
    """
    with watching(json_lines=json_lines) as watcher:
        report = Report("placement", watcher, quick=quick, out=out)
        sizes = [(peers, stages)] if peers is not None else QUICK_SIZES if quick else SIZES
        cases = [
            Case(*size, rate, minutes, seeds or (2 if quick else None)) for size in sizes for rate in churn or CHURN
        ]
        results = list(simulate(cases, watcher))
        report.finish([asdict(result) for result in results], [table_of(results)], summary_of(results))


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of swarm."""

    peers: int
    stages: int
    churn: float
    minutes: int | None
    seeds: int | None

    def scenarios(self, policy: Policy | None) -> list[Scenario]:
        from node.bench.swarm_simulation import Scenario

        large = self.peers >= LARGE
        seconds = 60.0 * (self.minutes or (5 if large else 75))
        return [
            Scenario(
                self.peers,
                self.stages,
                seconds=self.since + seconds,
                seed=seed,
                deaths_per_peer_hour=self.churn / 2,
                leaves_per_peer_hour=self.churn / 2,
                placed=[peer % self.stages for peer in range(self.peers)] if large else None,
                view_every=5.0,
                settle_seconds=8.0,
                policy=policy,
            )
            for seed in range(self.seeds or (1 if large else 5))
        ]

    @property
    def since(self) -> float:
        return 120.0 if self.peers >= LARGE else STEADY_AFTER


@dataclass(frozen=True, slots=True)
class Result:
    """Means over the seeds of a case."""

    case: Case
    share: float  # of the bound
    share_without_moves: float
    moves_per_peer_hour: float
    taken_back_per_move: float
    emptied: int  # stages that a peer left though it knew of no other there


def simulate(cases: Sequence[Case], watcher: Watcher) -> Iterable[Result]:
    """All cases, one after another."""
    from coordinator.rebalancing import Policy

    for number, case in enumerate(cases):
        watcher.doing(f"{case.peers} peers, churn {case.churn:g}", number / len(cases))
        histories, bare = ([_history(scenario) for scenario in case.scenarios(policy)] for policy in (Policy(), None))
        result = Result(
            case,
            statistics.mean(history.share_of_bound(case.since) for history in histories),
            statistics.mean(history.share_of_bound(case.since) for history in bare),
            statistics.mean(history.moves_per_peer_hour for history in histories),
            sum(h.taken_back for h in histories) / max(1, sum(len(h.moves) for h in histories)),
            sum(history.emptied for history in histories),
        )
        watcher.note({"event": "case", "peers": case.peers, "churn": case.churn, "share": result.share})
        yield result


def _history(scenario: Scenario) -> History:
    from node.bench.swarm_simulation import Simulation

    return Simulation(scenario).run()


def summary_of(results: Sequence[Result]) -> dict[str, Any]:
    """The worst of all cases."""
    return {
        "share_of_bound": min(result.share for result in results),
        "moves_per_peer_hour": max(result.moves_per_peer_hour for result in results),
        "emptied": sum(result.emptied for result in results),
    }


def table_of(results: Sequence[Result]) -> Table:
    rows = [
        [
            f"{result.case.peers:,}",
            str(result.case.stages),
            f"{result.case.churn:g}",
            f"{100 * result.share:.1f} %",
            f"{100 * result.share_without_moves:.1f} %",
            f"{result.moves_per_peer_hour:.2f}",
            f"{result.taken_back_per_move:.2f}",
            str(result.emptied),
        ]
        for result in results
    ]
    columns = [
        "peers",
        "stages",
        "go per peer-hour",
        "share of the bound",
        "if nobody moved",
        "moves per peer-hour",
        "taken back per move",
        "stages emptied",
    ]
    return Table("bottleneck rate of simulated swarms, 4-fold spread of speeds", columns, rows)
