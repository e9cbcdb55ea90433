"""What replicas committed, kept so that it can be checked afterwards: for benchmarks and for whoever doubts.

With RESBM_RECORD_STEPS=FOLDER in its environment a worker writes into FOLDER one JSON line a commit (whose microbatches
are in the sum), and for every RESBM_RECORD_EVERY-th step the gradient that it was taken with and the weights of before.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from coordinator.agreement import Round
from stage_server.replica_trainer import ReplicaTrainer

FOLDER_VARIABLE = "RESBM_RECORD_STEPS"
EVERY_VARIABLE = "RESBM_RECORD_EVERY"
EVERY = 10


@dataclass(frozen=True, slots=True)
class CommitRecord:
    """One commit at one replica."""

    stage: int
    peer: str
    step: int
    lineage: str  # of the weights after it
    shares: Mapping[str, list[int]]  # by replica, numbers of microbatches within the step
    time: float  # Unix time in seconds


class StepRecorder:
    """One worker's records."""

    def __init__(self, folder: Path, every: int, stage: int, peer: str) -> None:
        self._folder, self._every, self._stage, self._peer = folder, every, stage, peer
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = folder / f"commits-{stage}-{peer}.jsonl"

    @classmethod
    def from_environment(cls, stage: int, peer: str) -> StepRecorder | None:
        """None where nobody asked for records."""
        folder = os.environ.get(FOLDER_VARIABLE)
        return cls(Path(folder), int(os.environ.get(EVERY_VARIABLE, EVERY)), stage, peer) if folder else None

    def committed(self, step: int, lineage: str, agreed: Round | None) -> None:
        """A commit was decided."""
        shares = {} if agreed is None else {peer: sorted(share) for peer, share in agreed.shares.items()}
        record = CommitRecord(self._stage, self._peer, step, lineage, shares, time.time())
        with self._lines.open("a") as lines:
            lines.write(json.dumps({name: getattr(record, name) for name in record.__slots__}) + "\n")

    def before_commit(self, step: int, trainer: ReplicaTrainer) -> None:
        """The optimizer is about to take a step. On the device thread."""
        if step % self._every:
            return
        gradient_N = torch.empty(trainer.num_values)
        trainer.write_gradients(gradient_N)
        tensors: dict[str, Tensor] = {"gradient": gradient_N}
        tensors |= {f"weight.{name}": weight.contiguous() for name, weight in trainer.parameters_fp32()}
        save_file(tensors, self._folder / f"step-{step:08d}-{self._stage}-{self._peer}.safetensors")


def read_commits(folder: Path) -> list[CommitRecord]:
    """All records of a folder. A line that its writer did not live to finish is left out."""
    records = []
    for path in sorted(folder.glob("commits-*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                records.append(CommitRecord(**json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                continue
    return records
