"""Runs workers, a few at a time, each forked from this process, which has loaded everything once.

A fresh interpreter for each takes seconds of imports. Takes lines of [{"spec": ..., "stdout": path, "log": path}, ...]
on stdin; answers each line with the workers' exit statuses once all of them have ended. It starts no thread and no gRPC
of its own, so a forked worker is as a fresh one: `node.worker.main` does the rest.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import node.worker


def start(request: dict[str, Any]) -> int:
    """The worker's process id; in the worker this does not return."""
    child = os.fork()
    if child:
        return child
    reader, writer = os.pipe()
    os.write(writer, request["spec"].encode() + b"\n")
    os.close(writer)
    sys.stdin = open(reader)  # noqa: PTH123, SIM115 - a descriptor, for as long as this process lives
    for name, fd in (("stdout", 1), ("log", 2)):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), fd)
    sys.exit(node.worker.main())


if __name__ == "__main__":
    while line := sys.stdin.readline():
        children = [start(request) for request in json.loads(line)]
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
