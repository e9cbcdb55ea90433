"""A stage put together from its configuration and its disk: whole, damaged, full."""

from __future__ import annotations

import asyncio
import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from node.assembly import StageParts, build_stage, stage_folder, stage_with_state, stages_kept_beside
from node.config import RunConfig
from node.errors import DataUnreadable
from node.folders import beside_folder
from node.unsplit import weights_digest
from stage_server import checkpoint
from stage_server.checkpoint import CheckpointStore
from stage_server.errors import CheckpointUnwritable
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.links import LinkIdentity
from stage_server.reports import CheckpointReport, CompleteReport, Report, StepReport
from stage_server.trainer import StageTrainer


@pytest.fixture(autouse=True)
def one_thread_and_own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"words and numbers {number} " * 40)
    return folder


def run(text: Path | None = None, stages: int = 2, steps: int = 4, every: int = 2) -> RunConfig:
    values = {
        "stages": stages,
        "model": {
            "vocab_size": 257, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 1, "num_key_value_heads": 1,
        },
        "bottleneck": {"width": 2},
        "plan": {"steps": steps, "microbatches_per_step": 2, "batch": 1, "tokens": 8, "evaluation_microbatches": 0,
                 "checkpoint_every": every},
        "data": {"source": "files", "paths": [str(text or "/nowhere")], "validation_fraction": 0.25},
    }  # fmt: skip
    return RunConfig.model_validate(values)


def build(config: RunConfig, folder: Path, stage: int = 1) -> StageParts:
    return build_stage(config, stage, state_folder=folder, device="cpu", activation_budget_bytes=1 << 30)


def store_of(config: RunConfig, folder: Path, stage: int = 1) -> CheckpointStore:
    return CheckpointStore(stage_folder(folder, config.run_id, stage), config.run_id, stage)


def trained(config: RunConfig, steps: int, stage: int = 1) -> StageTrainer:
    """Weights that stand for those of a step: the initial ones, moved."""
    trainer = StageTrainer(config, config.run_id, stage, activation_budget_bytes=1 << 30)
    with torch.no_grad():
        for _, tensor in trainer.parameters_fp32():
            tensor.add_(0.1 * steps)
    return trainer


def digest(trainer: StageTrainer) -> str:
    return weights_digest(trainer.parameters_fp32())


def spoil(path: Path) -> None:
    """Flips a byte in the middle of the tensors: sizes and manifest stay right."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x55
    path.write_bytes(data)


# -- from disk --------------------------------------------------------------------------------------------------


def test_without_checkpoints_a_stage_starts_from_the_initial_weights(tmp_path: Path) -> None:
    config = run()
    parts = build(config, tmp_path)
    assert (parts.ledger.committed, parts.ledger.durable) == (0, None)
    assert digest(parts.trainer) == digest(trained(config, 0))
    assert parts.source is None


def test_a_stage_starts_from_its_newest_checkpoint(tmp_path: Path) -> None:
    config = run()
    for step in (0, 2):
        store_of(config, tmp_path).save(step, trained(config, step).state_tensors())
    parts = build(config, tmp_path)
    assert (parts.ledger.committed, parts.ledger.durable) == (2, 2)
    assert digest(parts.trainer) == digest(trained(config, 2))


@pytest.mark.parametrize("damage", ["tensors", "manifest", "cut", "gone"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    config = run()
    for step in (0, 2, 4):
        store_of(config, tmp_path).save(step, trained(config, step).state_tensors())
    newest = stage_folder(tmp_path, config.run_id, 1) / "step-00000004"
    tensors = newest / "state-00000.safetensors"
    match damage:
        case "tensors":
            spoil(tensors)
        case "manifest":
            (newest / "manifest.json").write_text("{")
        case "cut":
            tensors.write_bytes(tensors.read_bytes()[:-1])
        case "gone":
            tensors.unlink()
    parts = build(config, tmp_path)
    assert (parts.ledger.committed, parts.ledger.durable) == (2, 2)
    assert parts.checkpoints.steps() == [0, 2]
    assert digest(parts.trainer) == digest(trained(config, 2))


def test_all_damaged_is_the_initial_weights(tmp_path: Path) -> None:
    config = run()
    for step in (0, 2):
        store_of(config, tmp_path).save(step, trained(config, 1 + step).state_tensors())
        spoil(stage_folder(tmp_path, config.run_id, 1) / f"step-0000000{step}" / "state-00000.safetensors")
    parts = build(config, tmp_path)
    assert (parts.ledger.committed, parts.checkpoints.steps()) == (0, [])
    assert digest(parts.trainer) == digest(trained(config, 0))


def test_a_checkpoint_of_another_stage_in_this_ones_place_is_not_used(tmp_path: Path) -> None:
    config = run()
    store_of(config, tmp_path).save(0, trained(config, 0).state_tensors())
    other = CheckpointStore(stage_folder(tmp_path, config.run_id, 1), config.run_id, 0)
    other.save(2, trained(config, 2, stage=0).state_tensors())
    assert build(config, tmp_path).ledger.committed == 0


def test_state_of_another_run_is_not_seen(tmp_path: Path) -> None:
    config, other = run(), run(steps=5)
    store_of(other, tmp_path).save(2, trained(other, 2).state_tensors())
    assert build(config, tmp_path).ledger.committed == 0
    assert stage_with_state(tmp_path, config.run_id) is None
    assert stage_with_state(tmp_path, other.run_id) == 1


def test_of_several_stages_on_disk_the_newest_is_worth_most(tmp_path: Path) -> None:
    config = run()
    for stage, age in ((0, 100), (1, 300)):
        store_of(config, tmp_path, stage).save(0, {})
        folder = stage_folder(tmp_path, config.run_id, stage)
        os.utime(folder, (1e9 - age, 1e9 - age))
    assert stage_with_state(tmp_path, config.run_id) == 0


def test_a_folder_of_another_name_is_no_stage(tmp_path: Path) -> None:
    config = run()
    (tmp_path / config.run_id / "stage-old" / "step-00000001").mkdir(parents=True)
    assert stage_with_state(tmp_path, config.run_id) is None


def test_a_stage_that_was_left_before_its_first_checkpoint_holds_nothing(tmp_path: Path) -> None:
    config = run()
    build(config, tmp_path)
    assert stage_with_state(tmp_path, config.run_id) is None


def test_what_workers_beside_the_first_one_have_left_is_known(tmp_path: Path) -> None:
    config = run()
    for stage in (1, 0):
        store_of(config, beside_folder(tmp_path, stage), stage).save(0, {})
    store_of(run(steps=5), beside_folder(tmp_path, 7), 7).save(0, {})  # of another run
    build(config, beside_folder(tmp_path, 5))  # before its first checkpoint
    assert stages_kept_beside(tmp_path, config.run_id) == (0, 1)
    assert stage_with_state(tmp_path, config.run_id) is None


def test_a_state_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointUnwritable) as error:
        build(run(), tmp_path / "file")
    assert error.value.code == 402


# -- data -------------------------------------------------------------------------------------------------------


def test_the_first_stage_reads_text_and_only_the_first(text: Path, tmp_path: Path) -> None:
    config = run(text)
    parts = build(config, tmp_path, stage=0)
    assert parts.source is not None
    ids = parts.source(MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, 0))
    assert (ids.shape, ids.dtype) == ((1, 9), np.int32)
    assert build(config, tmp_path, stage=1).source is None


def test_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataUnreadable) as error:
        build(run(tmp_path / "missing"), tmp_path, stage=0)
    assert error.value.code == 104


# -- disk full --------------------------------------------------------------------------------------------------


def train_alone(parts: StageParts, on_report: Callable[[Report], None] = lambda report: None) -> list[Report]:
    """Runs a run of one stage until it is complete or fails."""
    reports: list[Report] = []

    async def scenario() -> None:
        def report(report: Report) -> None:
            reports.append(report)
            on_report(report)
            if isinstance(report, CompleteReport):
                peer.drain()

        peer = parts.joined(LinkIdentity(parts.config.run_id, 0, "alone"), report)
        async with asyncio.timeout(30):
            await peer.run()

    asyncio.run(scenario())
    return reports


def test_a_run_of_one_stage_checkpoints_as_planned(text: Path, tmp_path: Path) -> None:
    """What the tests below disturb."""
    reports = train_alone(build(run(text, stages=1), tmp_path, stage=0))
    assert [r.step for r in reports if isinstance(r, CheckpointReport)] == [0, 2, 4]


def test_a_full_disk_ends_the_peer_and_leaves_the_checkpoint_before(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = run(text, stages=1)
    parts = build(config, tmp_path, stage=0)
    save_file = checkpoint.save_file

    def full(tensors: object, path: Path) -> None:
        save_file(tensors, path)  # type: ignore[arg-type]
        path.write_bytes(path.read_bytes()[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def fill_after_step_2(report: Report) -> None:
        if isinstance(report, CheckpointReport) and report.step == 2:
            monkeypatch.setattr(checkpoint, "save_file", full)

    with pytest.raises(CheckpointUnwritable, match="No space left") as error:
        train_alone(parts, fill_after_step_2)
    assert error.value.code == 402
    assert error.value.remedy
    assert_only_step_2_is_left(config, tmp_path)
    monkeypatch.setattr(checkpoint, "save_file", save_file)
    reports = train_alone(build(config, tmp_path, stage=0))  # joined again when there is room
    assert [r.step for r in reports if isinstance(r, CheckpointReport)] == [4]


def assert_only_step_2_is_left(config: RunConfig, folder: Path) -> None:
    store = store_of(config, folder, stage=0)
    assert store.steps() == [2]
    assert store.load(2)
    assert [path.name for path in store.folder.iterdir()] == ["step-00000002"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.root
def test_a_disk_that_is_really_full(text: Path, small_disk: Path) -> None:
    config = run(text, stages=1)
    parts = build(config, small_disk, stage=0)

    def fill_after_step_2(report: Report) -> None:
        if isinstance(report, CheckpointReport) and report.step == 2:
            with (
                pytest.raises(OSError, match="No space left"),
                (small_disk / "ballast").open("wb", buffering=0) as file,
            ):
                while True:
                    file.write(bytes(4096))

    with pytest.raises(CheckpointUnwritable) as error:
        train_alone(parts, fill_after_step_2)
    assert error.value.code == 402
    assert_only_step_2_is_left(config, small_disk)


def test_a_disk_that_is_full_at_the_drain_is_told_too(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A drain saves what is committed; when that fails it must not look like a good end."""
    config = run(text, stages=1, steps=1000, every=1000)

    def full(tensors: object, path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    async def scenario() -> None:
        def drain_at_step_2(report: Report) -> None:
            if isinstance(report, StepReport) and report.step == 2:
                monkeypatch.setattr(checkpoint, "save_file", full)
                peer.drain()

        peer = build(config, tmp_path, stage=0).joined(LinkIdentity(config.run_id, 0, "alone"), drain_at_step_2)
        async with asyncio.timeout(30):
            await peer.run()

    with pytest.raises(CheckpointUnwritable):
        asyncio.run(scenario())
    assert store_of(config, tmp_path, stage=0).steps() == [0]
