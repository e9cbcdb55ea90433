"""Generates proto/gen/resbm_pb from proto/*.proto.

The files are compiled under the virtual path `resbm_pb/` so that their names in protobuf's global registry can never
clash with those of hivemind, which registers `dht.proto` and others without a package.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent
SERVICES = ("replicas.proto", "stage.proto")


def generate(out: Path) -> None:
    """Writes the generated modules and type stubs to `out`/resbm_pb. Raises RuntimeError when protoc fails."""
    package = out / "resbm_pb"
    package.mkdir(parents=True, exist_ok=True)
    names = sorted(path.name for path in ROOT.glob("*.proto"))
    include = f"-Iresbm_pb={ROOT}"
    _protoc(include, f"--python_out={out}", f"--mypy_out=quiet:{out}", *(f"resbm_pb/{name}" for name in names))
    for name in SERVICES:
        _protoc(include, f"--grpc_python_out={out}", f"--mypy_grpc_out=quiet:{out}", f"resbm_pb/{name}")
    (package / "__init__.py").write_text('"""Generated from proto/*.proto by proto/generate.py; do not edit."""\n')
    (package / "py.typed").touch()


def _protoc(*arguments: str) -> None:
    if protoc.main(["protoc", *arguments]) != 0:
        raise RuntimeError(f"protoc failed: {' '.join(arguments)}")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "gen")
