"""One real machine starts a run alone, at all its stages, and gives them up as others come."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from support.nodes import NodeProcess, leave_all

from node.config import RunConfig, dump_toml, preset
from node.events import Coverage, Live, Relieved, StageStep, TicketPrinted, Worker

pytestmark = pytest.mark.processes


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_one_machine_trains_alone_and_gives_a_stage_to_the_next_one(tmp_path: Path) -> None:
    values = preset("tiny").with_overrides(stages=2, steps=1_000_000).model_dump()
    values["replicas"] = {"averaging": "sync"}
    values["plan"] |= {"checkpoint_every": 50, "evaluation_microbatches": 0}
    run_file = tmp_path / "run.toml"
    run_file.write_text(dump_toml(RunConfig.model_validate(values)))
    here = ("--host", "127.0.0.1")
    nodes = [NodeProcess(tmp_path / "coordinator", "coordinator", "--run", str(run_file), *here)]

    def join(name: str) -> NodeProcess:
        ticket = nodes[0].wait_for(TicketPrinted, 120).ticket
        nodes.append(NodeProcess(tmp_path / name, "join", ticket, *here, "--threads", "1", "--cover-after", "1"))
        return nodes[-1]

    try:
        alone = join("alone")
        first = alone.wait_for(Live, 120).stage
        other = 1 - first
        alone.wait_for(Coverage, 30, lambda event: event.unserved == (other,))
        alone.wait_for(StageStep, 120, lambda event: event.stage == other and event.step >= 3)
        alone.wait_for(Coverage, 30, lambda event: event.unserved == ())
        second = join("second")
        live = second.wait_for(Live, 120)
        assert live.stage == other
        assert alone.wait_for(Relieved, 120) == Relieved(stage=other, peer_id=live.peer_id)
        left = alone.wait_for(Worker, 60, lambda event: event.state == "exited")
        assert (left.stage, left.detail) == (other, "exit code 0")
        reached = max(event.step for event in alone.events(StageStep))
        for node, stage in ((alone, first), (second, other)):
            node.wait_for(StageStep, 30, lambda event, stage=stage: event.stage == stage and event.step > reached + 5)  # type: ignore[misc]
        time.sleep(0.1)
        assert len([event for event in alone.events(Worker) if event.state == "started"]) == 2
    finally:
        leave_all(nodes)
    assert [node.process.returncode for node in nodes[1:]] == [0, 0]
