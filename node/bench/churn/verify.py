"""Recorded steps, computed again by one process from the same weights on the same microbatches."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from node.config import RunConfig
from node.data import load_corpus
from node.unsplit import UnsplitModel

_RECORD = re.compile(r"step-(\d+)-(\d+)-(.+)\.safetensors")


@dataclass(frozen=True, slots=True)
class Verified:
    """One recorded step."""

    step: int
    relative_difference: float  # of the gradients of all stages together: norm of the difference over the norm
    replicas: int  # records that were compared, of all stages
    identical: bool  # the replicas of each stage recorded the same bits


def verify_steps(config: RunConfig, folder: Path) -> list[Verified]:
    """Every step of which each stage has left a record."""
    records: dict[int, dict[int, list[Path]]] = {}
    for path in sorted(folder.glob("step-*.safetensors")):
        if match := _RECORD.fullmatch(path.name):
            records.setdefault(int(match[1]), {}).setdefault(int(match[2]), []).append(path)
    torch.set_num_threads(1)
    model = UnsplitModel(config, config.run_id)
    corpus = load_corpus(config)
    return [
        _verify(model, corpus.microbatch, step, stages)
        for step, stages in sorted(records.items())
        if len(stages) == config.stages
    ]


def undisturbed_loss(config: RunConfig, steps: int) -> float:
    """Validation loss of one process that has taken so many steps, nats per token: as if nothing had ever happened."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0))))
    model = UnsplitModel(config, config.run_id)
    corpus = load_corpus(config)
    for step in range(1, steps + 1):
        model.train_step(step, corpus.microbatch)
    return model.evaluate(steps + 1, corpus.microbatch)


def _verify(model: UnsplitModel, microbatch: object, step: int, stages: Mapping[int, list[Path]]) -> Verified:
    loaded = {stage: [_load(path) for path in paths] for stage, paths in stages.items()}
    first = {stage: records[0] for stage, records in loaded.items()}
    identical = all(
        torch.equal(record["gradient"], records[0]["gradient"]) for records in loaded.values() for record in records
    )
    weights = {
        name.removeprefix("weight."): tensor
        for record in first.values()
        for name, tensor in record.items()
        if name.startswith("weight.")
    }
    model.load(weights)
    model.accumulate(step, microbatch)  # type: ignore[arg-type]
    difference = norm = 0.0
    for stage, gradient_N in model.gradients().items():
        difference += float((gradient_N - first[stage]["gradient"]).double().square().sum())
        norm += float(gradient_N.double().square().sum())
    model.zero_gradients()
    return Verified(step, math.sqrt(difference / norm) if norm else 0.0, sum(map(len, loaded.values())), identical)


def _load(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = load_file(path)
    return tensors
