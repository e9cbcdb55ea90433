"""What is installed elsewhere than here: every package of ours, and the files that they read."""

from __future__ import annotations

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
ROOMS = ("node", "stage_server", "coordinator")


def test_every_package_is_installed() -> None:
    """An editable install does not notice one that is missing; a container does."""
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    ours = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert set(SETUPTOOLS["packages"]) == ours | {"resbm_pb"}


def test_every_run_and_grid_is_installed() -> None:
    files = {path for room in ROOMS for path in (ROOT / room).rglob("*.toml")}
    for path in files:
        package = ".".join(path.parent.relative_to(ROOT).parts)
        assert any(path.match(pattern) for pattern in SETUPTOOLS["package-data"].get(package, [])), path
