"""The wire contract: generated code is up to date, everything in it is explained, and it lives beside hivemind's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf import descriptor_pb2
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
GENERATED = PROTO / "gen" / "resbm_pb"


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted(folder.iterdir()) if path.is_file()}


def test_regenerating_changes_nothing(tmp_path: Path) -> None:
    tools = str(Path(sys.executable).parent)  # the protoc plugins that came with this environment
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [sys.executable, PROTO / "generate.py", tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    fresh, committed = contents(tmp_path / "resbm_pb"), contents(GENERATED)
    assert fresh.keys() == committed.keys()
    changed = [name for name in fresh if fresh[name] != committed[name]]
    assert not changed, "run `make proto`"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[descriptor_pb2.FileDescriptorProto]:
    """The parsed *.proto files with their comments."""
    out = tmp_path_factory.mktemp("proto") / "set.pb"
    names = sorted(f"resbm_pb/{path.name}" for path in PROTO.glob("*.proto"))
    arguments = ["protoc", f"-Iresbm_pb={PROTO}", "--include_source_info", f"--descriptor_set_out={out}", *names]
    assert protoc.main(arguments) == 0
    return list(descriptor_pb2.FileDescriptorSet.FromString(out.read_bytes()).file)


def test_every_file_is_in_our_package(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    assert files
    for file in files:
        assert file.package == "resbm.v1"
        assert file.name.startswith("resbm_pb/")


# Numbers of descriptor.proto: how source info names a place in a file.
IN_FILE = {4: ("message_type", "message"), 5: ("enum_type", "enum"), 6: ("service", "service")}
IN_MESSAGE = {2: ("field", "field"), 3: ("nested_type", "message"), 4: ("enum_type", "enum")}
IN_ENUM = {2: ("value", "value")}
IN_SERVICE = {2: ("method", "method")}
INSIDE = {"file": IN_FILE, "message": IN_MESSAGE, "enum": IN_ENUM, "service": IN_SERVICE}


def places(
    item: object, kind: str = "file", path: tuple[int, ...] = (), name: str = ""
) -> Iterator[tuple[tuple[int, ...], str]]:
    """Every message, field, enum value and method below `item`, as (path in source info, full name)."""
    for number, (attribute, child_kind) in INSIDE.get(kind, {}).items():
        for position, child in enumerate(getattr(item, attribute)):
            child_path, child_name = (*path, number, position), f"{name}.{child.name}"
            if child_kind in ("message", "field", "value", "method"):
                yield child_path, child_name
            yield from places(child, child_kind, child_path, child_name)


def test_every_message_field_and_value_has_a_comment(files: list[descriptor_pb2.FileDescriptorProto]) -> None:
    silent = []
    for file in files:
        comments = {
            tuple(spot.path): spot.leading_comments + spot.trailing_comments for spot in file.source_code_info.location
        }
        silent += [f"{file.name}{name}" for path, name in places(file) if not comments.get(path, "").strip()]
    assert not silent


def test_numbers_of_error_codes_are_of_their_hundred() -> None:
    """1xx input, 2xx frames, 3xx swarm, 4xx state: the contract keeps each code under its heading."""
    hundred, seen = 0, 0
    for line in (PROTO / "errors.proto").read_text().splitlines():
        if heading := re.match(r"\s*// (\d)xx:", line):
            hundred = int(heading[1])
        elif (code := re.match(r"\s*ERROR_CODE_\w+ = (\d+);", line)) and hundred:
            seen += 1
            assert int(code[1]) // 100 == hundred, line
    assert seen > 30


# All of hivemind takes seconds to load, and only its messages matter here.
ONLY_PROTO = (
    "import importlib.util, sys, types; package = types.ModuleType('hivemind'); "
    "package.__path__ = importlib.util.find_spec('hivemind').submodule_search_locations; "
    "sys.modules['hivemind'] = package"
)


def test_hivemind_and_ours_load_together() -> None:
    """protobuf has one registry of file names per process, and hivemind takes plain ones such as `dht.proto`."""
    modules = [f"resbm_pb.{path.stem}" for path in sorted(GENERATED.glob("*_pb2*.py"))]
    ours = "; ".join(f"import {module}" for module in modules)
    hivemind = (
        f"{ONLY_PROTO}; from hivemind.proto import auth_pb2, averaging_pb2, crypto_pb2, dht_pb2, p2pd_pb2, runtime_pb2"
    )
    for first, second in ((ours, hivemind), (hivemind, ours)):
        done = subprocess.run(
            [sys.executable, "-c", f"{first}; {second}"], capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stderr
