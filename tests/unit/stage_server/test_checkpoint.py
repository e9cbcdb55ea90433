"""A checkpoint is complete or absent, is what was saved, and is never someone else's."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stage_server.checkpoint import COMMON_AGE, CheckpointStore
from stage_server.errors import CheckpointInvalid, CheckpointUnwritable
from stage_server.state_listing import CHUNK_BYTES

RUN = "0123456789abcdef"


def tensors(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "parameter.b": torch.randn(7, 5, generator=generator),
        "parameter.a": torch.randn(64, 64, generator=generator),
        "optimizer.adamw.b.step": torch.tensor(3.0),
        "optimizer.adamw.b.exp_avg": torch.randn(7, 5, generator=generator).t(),
    }


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "state", RUN, 2, shard_bytes=1024)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_what_is_loaded_is_what_was_saved(store: CheckpointStore) -> None:
    size_bytes = store.save(4, tensors())
    assert store.steps() == [4]
    assert same(store.load(4), tensors())
    assert size_bytes == store.listing(4).size_bytes


def test_shards_are_bounded_except_for_a_larger_tensor(store: CheckpointStore) -> None:
    store.save(1, tensors())
    header_bytes = 1024
    sizes = [file.size_bytes for file in store.listing(1).files]
    assert [size > 1024 + header_bytes for size in sizes] == [False, True, False]  # in the middle parameter.a, 16 KiB


def test_listed_files_can_be_read_and_match_their_hashes(store: CheckpointStore) -> None:
    store.save(1, tensors())
    for file in store.listing(1).files:
        with store.open_file(1, file.name, file.sha256) as opened:
            data = opened.read()
        assert len(data) == file.size_bytes
        assert hashlib.sha256(data).digest() == file.sha256
        assert file.chunk_sha256 == (hashlib.sha256(data).digest(),)


def test_every_mebibyte_has_a_hash(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, RUN, 2)
    store.save(1, {"parameter.a": torch.randn(600_000)})
    (file,) = store.listing(1).files
    with store.open_file(1, file.name) as opened:
        chunks = [opened.read(CHUNK_BYTES) for _ in range(3)]
    assert file.chunk_sha256 == tuple(hashlib.sha256(chunk).digest() for chunk in chunks)


def test_what_is_listed_is_read_once(store: CheckpointStore) -> None:
    store.save(1, tensors())
    listing = store.listing(1)
    (store.folder / "step-00000001" / listing.files[0].name).write_bytes(b"spoiled")
    assert store.listing(1) is listing
    store.save(1, tensors(1))
    assert store.listing(1) != listing


def test_a_damaged_file_is_not_listed(store: CheckpointStore) -> None:
    store.save(1, tensors())
    path = store.folder / "step-00000001" / "state-00001.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointInvalid, match="hash"):
        store.listing(1)


def test_replicas_with_equal_tensors_have_equal_listings(store: CheckpointStore, tmp_path: Path) -> None:
    other = CheckpointStore(tmp_path / "other", RUN, 2, shard_bytes=1024)
    store.save(1, tensors(), "history")
    other.save(1, dict(reversed(tensors().items())), "history")
    assert store.listing(1) == other.listing(1)
    other.save(1, tensors(), "another")
    assert store.listing(1) != other.listing(1)
    assert store.listing(1).files == other.listing(1).files


def test_lineage_is_kept_and_older_manifests_have_none(store: CheckpointStore) -> None:
    store.save(1, tensors(), "l" * 64)
    store.save(2, tensors())
    assert [store.lineage(1), store.lineage(2)] == ["l" * 64, ""]
    path = store.folder / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["lineage"]
    path.write_text(json.dumps(manifest))
    assert store.lineage(1) == ""
    with pytest.raises(ValueError, match="64"):
        store.save(3, tensors(), "l" * 65)
    assert store.steps() == [1, 2]


def copied(store: CheckpointStore, folder: Path) -> Path:
    """The files of step 1, as a download leaves them."""
    shutil.copytree(store.folder / "step-00000001", folder)
    return folder


def test_a_download_is_adopted(store: CheckpointStore) -> None:
    store.save(1, tensors(1), "history")
    copied(store, store.incoming)
    store.save(1, tensors(2))
    CheckpointStore(store.folder, RUN, 2)
    assert store.adopt(store.incoming) == 1
    assert same(store.load(1), tensors(1))
    assert store.lineage(1) == "history"
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


@pytest.mark.parametrize("victim", ["manifest.json", "state-00000.safetensors"])
def test_half_a_download_is_not_adopted(store: CheckpointStore, victim: str) -> None:
    store.save(1, tensors())
    (copied(store, store.incoming) / victim).unlink()
    with pytest.raises(CheckpointInvalid):
        store.adopt(store.incoming)
    assert same(store.load(1), tensors())


def test_a_download_of_another_stage_is_not_adopted(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(1, tensors())
    other = CheckpointStore(tmp_path / "other", RUN, 3)
    with pytest.raises(CheckpointInvalid, match="stage"):
        other.adopt(copied(store, other.incoming))


LONG = timedelta(hours=1)
OVER = timedelta(0)


def test_a_pinned_checkpoint_is_not_pruned(store: CheckpointStore) -> None:
    for step in (2, 4, 6):
        store.save(step, tensors(step))
    assert store.pin(2, LONG)
    assert store.pin(4, OVER)
    store.prune(6)
    assert store.steps() == [2, 6]


def read(store: CheckpointStore, step: int, name: str, sha256: bytes) -> bytes:
    with store.open_file(step, name, sha256) as file:
        return file.read()


def test_a_pinned_checkpoint_that_is_discarded_can_be_read_but_is_none_any_more(store: CheckpointStore) -> None:
    for step in (2, 4):
        store.save(step, tensors(step))
    file = store.listing(4).files[0]
    data = read(store, 4, file.name, file.sha256)
    store.pin(4, LONG)
    store.discard_after(2)
    assert store.steps() == [2]
    assert read(store, 4, file.name, file.sha256) == data
    with pytest.raises(CheckpointInvalid):
        store.load(4)
    store.save(4, tensors(99))  # the same step, redone otherwise: both can be read by their hashes
    anew = store.listing(4).files[0]
    assert anew.sha256 != file.sha256
    assert read(store, 4, file.name, file.sha256) == data
    assert read(store, 4, anew.name, anew.sha256) != data


def test_what_was_withdrawn_goes_when_its_pin_expires(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(2, tensors(2))
    file = store.listing(2).files[0]
    store.pin(2, LONG)
    store.discard_after(0)
    store.prune(0)
    assert read(store, 2, file.name, file.sha256)
    monkeypatch.setattr(store._pins, "_clock", lambda: time.monotonic() + 2 * LONG.total_seconds())
    store.prune(0)
    assert list(store.folder.iterdir()) == []
    with pytest.raises(CheckpointInvalid):
        store.open_file(2, file.name)


def test_pins_are_few_and_do_not_survive_a_restart(store: CheckpointStore) -> None:
    for step in (1, 2, 3, 4):
        store.save(step, tensors())
    assert [store.pin(step, LONG) for step in (1, 2, 3, 4, 1)] == [True, True, True, False, True]
    store.discard_after(0)
    assert store.steps() == []
    CheckpointStore(store.folder, RUN, 2)
    assert list(store.folder.iterdir()) == []


@pytest.mark.parametrize(
    "name",
    ["../step-00000002/manifest.json", "/etc/passwd", "", ".", "state-00009.safetensors", "manifest.json\0", "a/b"],
)
def test_only_listed_names_are_opened(store: CheckpointStore, name: str) -> None:
    store.save(1, tensors())
    store.save(2, tensors())
    with pytest.raises(CheckpointInvalid):
        store.open_file(1, name)


def test_a_manifest_that_names_other_folders_is_refused(store: CheckpointStore) -> None:
    store.save(1, tensors())
    path = store.folder / "step-00000001" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][0]["name"] = "../../secret"
    path.write_text(json.dumps(manifest))
    assert store.steps() == []
    with pytest.raises(CheckpointInvalid):
        store.listing(1)


def test_a_file_that_is_a_link_is_not_followed(store: CheckpointStore, tmp_path: Path) -> None:
    store.save(1, tensors())
    path = store.folder / "step-00000001" / "state-00000.safetensors"
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointInvalid):
        store.open_file(1, path.name)


def test_one_flipped_bit_is_found(store: CheckpointStore) -> None:
    store.save(1, tensors())
    path = store.folder / "step-00000001" / "state-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointInvalid, match="hash"):
        store.load(1)


@pytest.mark.parametrize("victim", ["manifest.json", "state-00000.safetensors"])
def test_an_incomplete_folder_is_no_checkpoint(store: CheckpointStore, victim: str) -> None:
    store.save(1, tensors())
    store.save(2, tensors())
    (store.folder / "step-00000002" / victim).unlink()
    assert store.steps() == [1]
    with pytest.raises(CheckpointInvalid):
        store.load(2)


def test_a_truncated_file_is_no_checkpoint(store: CheckpointStore) -> None:
    store.save(1, tensors())
    path = store.folder / "step-00000001" / "state-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert store.steps() == []


def test_another_run_or_stage_is_refused(store: CheckpointStore) -> None:
    store.save(1, tensors())
    with pytest.raises(CheckpointInvalid, match="run"):
        CheckpointStore(store.folder, "fedcba9876543210", 2).load(1)
    with pytest.raises(CheckpointInvalid, match="stage"):
        CheckpointStore(store.folder, RUN, 1).load(1)
    (store.folder / "step-00000001").rename(store.folder / "step-00000009")
    with pytest.raises(CheckpointInvalid, match="step 1"):
        store.load(9)


def test_saving_a_step_again_replaces_it(store: CheckpointStore) -> None:
    store.save(1, tensors(0))
    store.save(1, tensors(1))
    assert same(store.load(1), tensors(1))
    assert [path.name for path in store.folder.iterdir()] == ["step-00000001"]


def test_discard_after_removes_only_later_steps(store: CheckpointStore) -> None:
    for step in (0, 5, 10, 15):
        store.save(step, tensors())
    store.discard_after(5)
    assert store.steps() == [0, 5]


@pytest.mark.parametrize(
    ("keep_from", "kept"), [(0, [2, 4, 6]), (2, [2, 4, 6]), (3, [2, 4, 6]), (4, [4, 6]), (5, [4, 6]), (99, [6])]
)
def test_prune_keeps_what_may_be_needed(store: CheckpointStore, keep_from: int, kept: list[int]) -> None:
    for step in (2, 4, 6):
        store.save(step, tensors())
    store.prune(keep_from)
    assert store.steps() == kept


def test_common_checkpoints_are_kept_for_longer(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, "run", 0, common_every=10)
    for step in range(5, 65, 5):
        store.save(step, tensors())
    old = time.time() - 2 * COMMON_AGE.total_seconds()
    for step in (10, 20, 40, 50):
        os.utime(tmp_path / f"step-{step:08d}", (old, old))
    store.prune(60)
    assert store.steps() == [30, 50, 60]  # still being copied, perhaps; and the newest two


@contextmanager
def files_no_larger_than(size_bytes: int) -> Iterator[None]:
    """Writes beyond it fail as on a full disk, without needing one (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("size_bytes", [10, 300, 9000])
def test_a_disk_that_refuses_leaves_nothing_half_written(store: CheckpointStore, size_bytes: int) -> None:
    store.save(1, tensors())
    before = sorted(store.folder.rglob("*"))
    with files_no_larger_than(size_bytes), pytest.raises(CheckpointUnwritable) as refusal:
        store.save(2, tensors())
    assert refusal.value.code == 402
    assert sorted(store.folder.rglob("*")) == before
    assert same(store.load(1), tensors())


def test_a_full_disk_at_the_last_moment_leaves_nothing(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.save(1, tensors(0))

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refuse)
        with pytest.raises(CheckpointUnwritable, match="No space left"):
            store.save(2, tensors(1))
    assert store.steps() == [1]
    assert len(list(store.folder.iterdir())) == 1


def test_a_folder_that_cannot_be_made_is_a_typed_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointUnwritable):
        CheckpointStore(tmp_path / "file" / "state", RUN, 0)


def test_a_writer_killed_midway_leaves_no_checkpoint_and_is_cleaned_up_after(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    CheckpointStore(folder, RUN, 0).save(1, tensors())
    program = textwrap.dedent(f"""
        import os, signal, torch
        from pathlib import Path
        from stage_server import checkpoint
        def die(path):
            os.kill(os.getpid(), signal.SIGKILL)
        store = checkpoint.CheckpointStore(Path({str(folder)!r}), {RUN!r}, 0)
        checkpoint.write_manifest = lambda folder, manifest: die(folder)
        store.save(2, {{"parameter.a": torch.ones(3)}})
    """)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    died = subprocess.run([sys.executable, "-c", program], check=False, env=environment, timeout=60)
    assert died.returncode == -signal.SIGKILL
    assert any(path.name.startswith(".writing-") for path in folder.iterdir())
    store = CheckpointStore(folder, RUN, 0)
    assert store.steps() == [1]
    assert [path.name for path in folder.iterdir()] == ["step-00000001"]


def test_a_living_writer_is_left_alone(store: CheckpointStore) -> None:
    busy = store.folder / ".writing-busy"
    busy.mkdir()
    descriptor = os.open(busy, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        CheckpointStore(store.folder, RUN, 2)
        assert busy.exists()
    finally:
        os.close(descriptor)
    CheckpointStore(store.folder, RUN, 2)
    assert not busy.exists()
