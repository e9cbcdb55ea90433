"""For all tests: what has to be so before the first of them runs."""

from __future__ import annotations

import os

import pytest

os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"  # before anything imports grpc; with fork support on, forks hang

FORKING = "test_swarm.py"  # starts directories in this very process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """hivemind forks: as in a worker, it goes first, before other tests have started gRPC and its threads."""
    items.sort(key=lambda item: item.path.name != FORKING)
