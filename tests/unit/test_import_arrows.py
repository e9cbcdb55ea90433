"""Who may import whom (docs/architecture.md):

resbm_pb <- stage_server <- node        resbm_pb <- coordinator <- node        hivemind <- coordinator only
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "stage_server": {"stage_server", "resbm_pb"},
    "coordinator": {"coordinator", "resbm_pb"},
    "node": {"node", "stage_server", "coordinator", "resbm_pb"},
}
OURS = {"node", "stage_server", "coordinator", "resbm_pb", "tests"}
LIGHT_MODULES = ("node.cli", "node.supervisor", "node.config", "node.identity", "node.events", "node.ui", "node.demo")
HEAVY = ("torch", "transformers", "hivemind", "tokenizers")


def files_of(room: str) -> Iterator[Path]:
    yield from sorted((ROOT / room).rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import in a file, wherever in it: inside functions and type checks too."""
    for item in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(item, ast.Import):
            yield from ((item.lineno, alias.name) for alias in item.names)
        elif isinstance(item, ast.ImportFrom):
            assert item.level == 0, f"{path}:{item.lineno}: imports are absolute, so that the arrows can be read"
            yield item.lineno, item.module or ""


@pytest.mark.parametrize("room", ALLOWED)
def test_rooms_import_only_along_the_arrows(room: str) -> None:
    assert any(files_of(room))
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {module}"
        for path in files_of(room)
        for line, module in imported(path)
        if module.partition(".")[0] in OURS - ALLOWED[room]
    ]
    assert not wrong


@pytest.mark.parametrize("room", ["stage_server", "node"])
def test_only_the_coordinator_knows_hivemind(room: str) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in files_of(room)
        for line, module in imported(path)
        if module.partition(".")[0] == "hivemind"
    ]
    assert not wrong


def test_generated_code_imports_nothing_of_ours() -> None:
    for path in sorted((ROOT / "proto" / "gen").rglob("*.py")):
        assert not {m.partition(".")[0] for _, m in imported(path)} & (OURS - {"resbm_pb"}), path


def test_proto_folder_is_no_package() -> None:
    """An `__init__.py` there would hide Google's proto-plus from everyone who has it."""
    assert not (ROOT / "proto" / "__init__.py").exists()


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_front_ends_load_nothing_heavy(module: str) -> None:
    """The command line must answer at once, and the supervisor must stay small beside its worker."""
    code = f"import sys, {module}; print(*[name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
