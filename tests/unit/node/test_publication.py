"""What a coordinator remembers of its run."""

from __future__ import annotations

from pathlib import Path

import pytest

from node import publication
from node.config import dump_toml, preset
from node.errors import ConfigUnreadable
from node.publication import Publication


def test_the_last_run_and_its_address_are_remembered(tmp_path: Path) -> None:
    for name in ("tiny", "demo"):
        config = preset(name)
        publication.remember(tmp_path, Publication(config_toml=dump_toml(config), host="h", announce="", port=7))
    last = publication.recall(tmp_path)
    assert last.config.run_id == preset("demo").run_id
    assert (last.host, last.port) == ("h", 7)


@pytest.mark.parametrize("text", [None, "", "{}", '{"port": 70000}'])
def test_without_a_run_there_is_nothing_to_resume(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / publication.FILE_NAME).write_text(text)
    with pytest.raises(ConfigUnreadable, match="no run was published"):
        publication.recall(tmp_path)
