"""A worker's temporary folder is gone with it, or with the next one that starts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from node.scratch import PREFIX, scratch_folder

OWNER = """
import sys, time
from pathlib import Path
from node.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1])) as folder:
    (folder / "socket").touch()
    print(folder, flush=True)
    time.sleep(100)
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A temporary folder with a short name, unlike tmp_path."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name)


def folders(parent: Path) -> list[Path]:
    return sorted(parent.glob(f"{PREFIX}*"))


def test_it_is_gone_at_the_end_with_all_that_is_in_it(short: Path) -> None:
    with pytest.raises(KeyError), scratch_folder(short) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "file").touch()
        raise KeyError
    assert not folders(short)


def test_what_a_killed_owner_left_goes_with_the_next_start_and_a_living_one_keeps_its_own(short: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(short)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        first = Path(owner.stdout.readline().strip())
        with scratch_folder(short) as second:
            assert folders(short) == sorted([first, second])
        assert folders(short) == [first]
        owner.send_signal(signal.SIGKILL)
    assert (first / "socket").exists()
    with scratch_folder(short) as third:
        assert folders(short) == [third]


def test_an_empty_one_that_nobody_holds_yet_is_given_time(short: Path) -> None:
    new, old = short / f"{PREFIX}new", short / f"{PREFIX}old"
    for folder in (new, old):
        folder.mkdir()
    os.utime(old, (0, 0))
    with scratch_folder(short) as own:
        assert folders(short) == sorted([new, own])


def test_sockets_fit_into_it_wherever_the_temporary_folder_is(tmp_path: Path) -> None:
    with scratch_folder(tmp_path / ("long" * 20)) as folder:
        assert len(str(folder)) <= 60
