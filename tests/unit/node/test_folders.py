"""Files that are replaced: whole, where a link leads, and nothing half-written beside them."""

from __future__ import annotations

from pathlib import Path

import pytest

from node.folders import replace_text
from node.invitation import FILE_NAME


@pytest.mark.parametrize("durable", [True, False])
def test_the_old_text_gives_way_to_the_new(tmp_path: Path, *, durable: bool) -> None:
    path = tmp_path / "file"
    for text in ("a long first text", "new"):
        replace_text(path, text, durable=durable)
        assert path.read_text() == text
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    """As in the lab's containers: the coordinator's ticket is a link into a volume that the peers read."""
    state, shared = tmp_path / "state", tmp_path / "shared"
    state.mkdir()
    shared.mkdir()
    link = state / FILE_NAME
    link.symlink_to(shared / FILE_NAME)  # to nothing yet
    for text in ("first", "second"):
        replace_text(link, text)
        assert (shared / FILE_NAME).read_text() == text
    assert link.is_symlink()
    assert [path.name for folder in (state, shared) for path in folder.iterdir()] == [FILE_NAME, FILE_NAME]


def test_a_folder_that_is_not_there_is_an_error_and_nothing_is_made(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        replace_text(tmp_path / "none" / "file", "text")
    assert not list(tmp_path.iterdir())
