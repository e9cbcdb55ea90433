"""For all tests: what has to be so before the first of them runs, and which of them may not be skipped."""

from __future__ import annotations

import os
import signal
from collections.abc import Generator

import pytest
from hypothesis import settings

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before anything imports grpc; with fork support on, forks hang
# Before anything imports torch, here and in what tests start. Models of tests are too small for two threads, and on a
# busy machine the threads of OpenMP wait for one another by spinning: a test of seconds then takes minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it

settings.register_profile("resbm", deadline=None)  # no test asserts seconds, not even hypothesis'
settings.load_profile("resbm")

FORKING = "test_swarm.py"  # starts directories in this very process
FORBIDDEN_SKIPS = frozenset(filter(None, os.environ.get("RESBM_FORBID_SKIP", "").split(",")))
"""Markers whose tests must run: CI installs what they need, so a skip there means that nobody looked."""


def pytest_configure(config: pytest.Config) -> None:
    """Encoded text is kept from one session to the next, apart from what this machine's user has."""
    if config.cache is not None:
        os.environ["XDG_CACHE_HOME"] = str(config.cache.mkdir("text"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """hivemind forks: as in a worker, it goes first, before other tests have started gRPC and its threads."""
    items.sort(key=lambda item: item.path.name != FORKING)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A forbidden skip is a failure that tells the reason of the skip."""
    report = yield
    marked = FORBIDDEN_SKIPS.intersection(mark.name for mark in item.iter_markers())
    if report.skipped and marked:
        report.outcome = "failed"
        report.longrepr = f"RESBM_FORBID_SKIP names {', '.join(sorted(marked))}, but: {report.longrepr}"
    return report
