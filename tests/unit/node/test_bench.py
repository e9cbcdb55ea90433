"""The pure parts of the benchmarks: who spent the processor's time, bytes of a frame, figures, documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from node.bench.common import Report, Spread, Table
from node.bench.cpu_account import ProcessTimes, Sample, between
from node.bench.frames import FrameCounter
from node.bench.local_tables import MEMORY_FACTOR, WORKING_ROOM_BYTES, accounted_bytes, bound_bytes
from node.bench.markdown import rendered
from node.bench.tensors import gradients_like, latents_like, zipf_ids
from node.config import RunConfig, preset
from node.errors import MachineUnfit
from node.events import MemoryUse
from stage_server.codec import backward_encoding, clip_for, forward_encoding, pack
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex

DOCS = Path(__file__).resolve().parents[3] / "docs"
WORKER, CHILD, OTHER = 10, 11, 12


def sample(at: float, machine: float, worker: ProcessTimes, child: float, other: float) -> Sample:
    processes = {WORKER: worker, CHILD: ProcessTimes(child, {}), OTHER: ProcessTimes(other, {})}
    return Sample(at, machine, processes, frozenset({WORKER}), frozenset({CHILD}))


def test_processor_time_is_told_apart_and_adds_up() -> None:
    before = sample(0.0, 100.0, ProcessTimes(1.0, {21: 5.0, 22: 0.5}), 2.0, 3.0)
    after = sample(10.0, 115.0, ProcessTimes(1.5, {21: 13.0, 22: 0.7, 23: 0.1}), 2.25, 3.5)
    account = between(before, after)
    assert account.device_threads == pytest.approx(8.0)
    assert account.event_loops == pytest.approx(0.5)
    assert account.transport_threads == pytest.approx(0.3)  # one of the threads is new
    assert account.directory == pytest.approx(0.25)
    assert account.others_of_ours == pytest.approx(0.5)
    assert account.foreign == pytest.approx(15.0 - 9.55)
    assert account.idle == pytest.approx(max(0.0, account.cores * 10.0 - 15.0))


def test_a_spread_is_the_middle_and_the_ends() -> None:
    spread = Spread.of([3.0, 1.0, 2.0])
    assert (spread.median, spread.low, spread.high) == (2.0, 1.0, 3.0)
    assert spread.text() == "2.00 (1.00 to 3.00)"


@pytest.fixture
def config() -> RunConfig:
    return preset("tiny")


def counted(config: RunConfig) -> FrameCounter:
    counter, plan, codec = FrameCounter(config), config.plan, config.codec
    size = (plan.batch, plan.tokens, config.latent_width)
    name = MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, 0)
    there, back = forward_encoding(codec), backward_encoding(codec)
    ids = zipf_ids((plan.batch, plan.tokens + 1), config.model.vocab_size, seed=0)
    counter.forward(name, ids, pack(latents_like(size, seed=0), there, clip_for(codec, there)))
    counter.backward(name, 1.0, pack(gradients_like(size, seed=0), back, clip_for(codec, back)))
    return counter


def test_every_byte_of_a_frame_is_counted_once(config: RunConfig) -> None:
    """At 4 bits: half a byte a value, a byte a token for scales on the way back, ceil(log2 V) bits an id."""
    plain = config.model_copy(update={"codec": config.codec.model_copy(update={"zstd_level": 0})})
    traffic, tokens = counted(plain).traffic, config.plan.batch * config.plan.tokens
    assert traffic.num_tokens == tokens
    assert traffic.dense_bytes == 2 * tokens * config.model.hidden_size * 2
    assert traffic.forward.values == traffic.backward.values == tokens * config.latent_width // 2
    assert traffic.forward.scales == 0
    assert traffic.backward.scales == tokens
    assert traffic.forward.ids == -(-config.plan.batch * (config.plan.tokens + 1) * 9 // 8)  # 512 ids: 9 bits
    assert traffic.backward.ids == 0
    for direction in (traffic.forward, traffic.backward):
        assert 10 < direction.headers < 100


def test_zstandard_never_makes_frames_larger(config: RunConfig) -> None:
    plain = config.model_copy(update={"codec": config.codec.model_copy(update={"zstd_level": 0})})
    assert counted(config).traffic.compression >= counted(plain).traffic.compression


def test_stand_ins_are_as_told() -> None:
    latents = latents_like((2, 64, 12), seed=1)
    assert torch.allclose(latents.square().mean(-1), torch.ones(2, 64), atol=1e-5)
    magnitudes = gradients_like((2, 512, 12), seed=1).square().mean(-1).sqrt().flatten()
    assert magnitudes.quantile(0.95) / magnitudes.quantile(0.05) > 10
    assert torch.equal(latents, latents_like((2, 64, 12), seed=1))


def test_the_memory_bound_is_the_promised_one() -> None:
    memory = MemoryUse(
        base_bytes=400, peak_bytes=0, parameters_bytes=1, gradients_bytes=2, optimizer_bytes=3, activations_bytes=4
    )
    assert accounted_bytes(memory) == 10
    assert bound_bytes(memory) == MEMORY_FACTOR * 10 + 400 + WORKING_ROOM_BYTES


class Silent:
    def doing(self, text: str, done: float) -> None: ...
    def note(self, fields: object) -> None: ...
    def end(self, tables: object, summary: object, path: Path) -> None: ...


def test_a_result_file_has_all_that_a_reader_needs(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "result.json"
    table = Table("speeds", ["run", "GB/s"], [["demo", "1.0"]])
    Report("codec", Silent(), quick=True, out=out).finish([{"raw": [1.0]}], [table], {"x": 1.0})
    result = json.loads(out.read_text())
    assert result["benchmark"] == "codec" and result["quick"] and result["summary"] == {"x": 1.0}
    assert result["measurements"] == [{"raw": [1.0]}]
    assert {"cpu", "cores", "torch", "load_average_before"} <= result["machine"].keys()
    assert [path.name for path in out.parent.iterdir()] == ["result.json"]
    shown = rendered("a\n<!-- deep/result.json -->\nold\n<!-- end -->\nb\n", tmp_path)
    assert "| demo | 1.0 |" in shown and "old" not in shown and shown.endswith("<!-- end -->\nb\n")
    assert rendered(shown, tmp_path) == shown


def test_a_result_that_cannot_be_written_is_refused_before_measuring(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MachineUnfit):
        Report("codec", Silent(), quick=True, out=tmp_path / "file" / "result.json")


def test_the_documents_figures_are_those_of_the_committed_files() -> None:
    text = (DOCS / "results.md").read_text()
    assert rendered(text, DOCS) == text, "run: python -m node.bench.markdown docs/results.md"
