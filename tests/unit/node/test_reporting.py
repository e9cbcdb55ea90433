"""From what a stage reports to what a supervisor, a scrape and the directory are told."""

from __future__ import annotations

from datetime import timedelta

import pytest

from node.events import (
    Checkpoint,
    Complete,
    Evaluation,
    Event,
    Link,
    StageStep,
    StateTransfer,
    encode_event,
    parse_event,
)
from node.metrics import PREFIX, NodeInfo, WorkerMetrics
from node.reporting import EventReporter, Figures
from stage_server.ids import StepIndex
from stage_server.profile import Spent, Work
from stage_server.reports import (
    CheckpointReport,
    CompleteReport,
    EvaluationReport,
    LinkBytes,
    LinkReport,
    StepReport,
)
from stage_server.state_plan import StateProgress
from stage_server.trainer import MemoryReport
from stage_server.work import Side

MEMORY = MemoryReport(
    parameters_bytes=100,
    gradients_bytes=0,
    optimizer_bytes=200,
    activations_bytes=0,
    peak_activations_bytes=50,
    microbatch_activations_bytes=25,
)


def step(number: int, *, wall: float = 2.0, compute: float = 1.0, link: LinkBytes | None = None) -> StepReport:
    return StepReport(
        step=StepIndex(number),
        loss=3.0 - number / 10,
        num_tokens=1000,
        num_microbatches=4,
        wall=timedelta(seconds=wall),
        compute=timedelta(seconds=compute),
        wait=timedelta(seconds=0.5),
        gradient_norm=0.25,
        link=link,
        work={Work.FORWARD: Spent(0.75, 0.5)},
    )


class Listener:
    def __init__(self, stage: int = 1) -> None:
        self.events: list[Event] = []
        self.metrics = WorkerMetrics(NodeInfo("run", "name", stage, 3, "1.0", "cpu"))
        self.reporter = EventReporter(stage, self.metrics, self.events.append)

    def value(self, name: str, **labels: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"{PREFIX}_{name}", labels)


def test_every_report_becomes_one_event_that_reads_back() -> None:
    listener = Listener()
    for report in (
        step(1, link=LinkBytes(1280, 6, 4)),
        EvaluationReport(1, 2.5),
        CheckpointReport(StepIndex(1), timedelta(seconds=0.125), 4096),
        LinkReport(Side.DOWNSTREAM, open=False, detail="gone"),
        CompleteReport(StepIndex(1), MEMORY),
    ):
        listener.reporter(report)
    assert [type(event) for event in listener.events] == [StageStep, Evaluation, Checkpoint, Link, Complete]
    assert [parse_event(encode_event(event)) for event in listener.events] == listener.events
    assert all(event.stage == 1 for event in listener.events)  # type: ignore[union-attr]


def test_a_step_is_told_in_full() -> None:
    listener = Listener()
    listener.reporter(step(3, link=LinkBytes(1280, 6, 4)))
    event = listener.events[0]
    assert isinstance(event, StageStep)
    assert (event.step, event.loss, event.tokens, event.microbatches) == (3, 2.7, 1000, 4)
    assert (event.seconds, event.compute_seconds, event.wait_seconds, event.gradient_norm) == (2.0, 1.0, 0.5, 0.25)
    assert event.link is not None
    assert (event.link.dense_bytes, event.link.wire_bytes_forward, event.link.wire_bytes_backward) == (1280, 6, 4)
    assert (event.work["forward"].seconds, event.work["forward"].cpu_seconds) == (0.75, 0.5)


def test_the_last_stage_has_no_link_to_tell_of() -> None:
    listener = Listener()
    listener.reporter(step(1))
    assert listener.events[0].link is None  # type: ignore[union-attr]


@pytest.mark.parametrize(("is_open", "state"), [(True, "open"), (False, "lost")])
@pytest.mark.parametrize("side", Side)
def test_a_link_is_named_by_its_side(side: Side, is_open: bool, state: str) -> None:
    listener = Listener()
    listener.reporter(LinkReport(side, open=is_open, detail="why"))
    assert listener.events == [Link(stage=1, side=side.value, state=state, detail="why")]  # type: ignore[arg-type]


def test_a_run_that_is_complete_changes_the_entry_at_once() -> None:
    listener = Listener()
    listener.reporter.base_bytes = 12345
    listener.reporter(step(1))
    assert not listener.reporter.complete
    assert not listener.reporter.state_changed.is_set()
    listener.reporter(CompleteReport(StepIndex(1), MEMORY))
    assert listener.reporter.complete
    assert listener.reporter.state_changed.is_set()
    event = listener.events[-1]
    assert isinstance(event, Complete)
    assert event.memory is not None
    assert event.memory.gradients_bytes == event.memory.parameters_bytes == 100
    assert (event.memory.optimizer_bytes, event.memory.activations_bytes) == (200, 50)
    assert event.memory.base_bytes == 12345
    assert event.memory.peak_bytes > 10 << 20  # this very process


def test_a_states_way_here_is_told_now_and_then_and_to_its_end() -> None:
    listener = Listener()
    for done in range(0, 101, 10):
        listener.reporter.transfer(StateProgress(done, 100, 5.0, None if done == 0 else 1.0))
    told = [event for event in listener.events if isinstance(event, StateTransfer)]
    assert [event.done_bytes for event in told] == [0, 100]  # all within a second
    assert parse_event(encode_event(told[0])) == told[0]


def test_metrics_hear_what_events_say() -> None:
    listener = Listener()
    for number in (1, 2):
        listener.reporter(step(number, link=LinkBytes(1000, 6, 4)))
    listener.reporter(EvaluationReport(2, 2.25))
    assert listener.value("tokens_total") == 2000
    assert listener.value("step") == 2
    assert listener.value("validation_loss_nats") == 2.25


def test_before_the_first_step_there_is_nothing_to_tell() -> None:
    figures = Listener().reporter.figures()
    assert figures == Figures(loss=None, compute_share=0.0, microbatches=0, tokens_per_second=0.0, wire_compression=0.0)


def test_figures_are_those_of_the_last_few_steps() -> None:
    listener = Listener()
    for number in range(1, 11):
        slow_start = number <= 2
        listener.reporter(step(number, wall=100.0 if slow_start else 2.0, link=LinkBytes(1000, 6, 4)))
    figures = listener.reporter.figures()
    assert figures.loss == 2.0
    assert figures.compute_share == pytest.approx(0.5)
    assert figures.tokens_per_second == pytest.approx(500)
    assert figures.wire_compression == pytest.approx(100)
    assert figures.microbatches == 40  # of all steps


def test_shares_stay_shares_and_nothing_divides_by_zero() -> None:
    listener = Listener()
    listener.reporter(step(1, wall=1.0, compute=1.5, link=LinkBytes(0, 0, 0)))
    assert listener.reporter.figures().compute_share == 1.0
    assert listener.reporter.figures().wire_compression == 0.0
    listener = Listener()
    listener.reporter(step(1, wall=0.0, compute=0.0))
    assert listener.reporter.figures().tokens_per_second == 0.0
