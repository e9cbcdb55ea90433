"""Runs workers one after another, each forked from this process, which has loaded everything once.

A fresh interpreter for each takes seconds of imports. Takes {"spec": ..., "stdout": path, "log": path} lines on stdin;
answers each with the worker's exit status. It starts no thread and no gRPC of its own, so a forked worker is as a
fresh one: `node.worker.main` does the rest.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import node.worker


def status_of(request: dict[str, Any]) -> int:
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    reader, writer = os.pipe()
    os.write(writer, request["spec"].encode() + b"\n")
    os.close(writer)
    sys.stdin = open(reader)  # noqa: PTH123, SIM115 - a descriptor, for as long as this process lives
    for name, fd in (("stdout", 1), ("log", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
    sys.exit(node.worker.main())


if __name__ == "__main__":
    while line := sys.stdin.readline():
        print(status_of(json.loads(line)), flush=True)
