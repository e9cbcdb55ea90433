"""How fast this machine serves a stage of a run, and which stages fit into its memory: measured before joining."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import psutil
import torch

from stage_server.codec import clip_for, forward_encoding, pack
from stage_server.config import StageConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.trainer import StageTrainer

BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and at most two optimizer moments
CONSTANT_BYTES = 600 << 20  # interpreter, libraries and the directory's processes
REPEATS = 2  # the first pass warms up allocators and caches


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured."""

    microbatch: timedelta  # forward and backward of one microbatch on one stage
    stage_bytes: tuple[int, ...]  # memory that each stage would take
    available_bytes: int

    @property
    def throughput(self) -> float:
        """Microbatches per second."""
        return 1.0 / max(self.microbatch.total_seconds(), 1e-9)

    @property
    def fits(self) -> tuple[bool, ...]:
        """By stage: whether this machine has the memory for it."""
        return tuple(needed <= self.available_bytes for needed in self.stage_bytes)

    @property
    def num_stages(self) -> int:
        """How many stages fit at once, each with a process of its own."""
        return self.available_bytes // max(self.stage_bytes)


def measure(config: StageConfig, device: str, activation_budget_bytes: int = 1 << 30) -> Speed:
    """Trains a microbatch of noise on the last stage, which every run has, and scales by nothing: stages are alike."""
    available = _available_bytes(device)  # before the stage that is tried takes its share
    trainer = StageTrainer(config, "speed", config.stages - 1, device=device, activation_budget_bytes=1 << 40)
    fastest = min(_pass(trainer, config, repeat) for repeat in range(REPEATS))
    parameters = trainer.memory().parameters_bytes // 4
    microbatch = trainer.memory().microbatch_activations_bytes
    activations = max(microbatch, min(microbatch * config.stages, activation_budget_bytes))
    per_stage = parameters * BYTES_PER_PARAMETER + activations + CONSTANT_BYTES
    return Speed(fastest, (per_stage,) * config.stages, available)


def _pass(trainer: StageTrainer, config: StageConfig, repeat: int) -> timedelta:
    plan, width = config.plan, config.latent_width
    name = MicrobatchId(StepIndex(1), MicrobatchKind.TRAIN, repeat)
    token_ids = np.zeros((plan.batch, plan.tokens + 1), np.int32)
    latents = None
    if config.stages > 1:
        encoding = forward_encoding(config.codec)
        latents = pack(torch.ones(plan.batch, plan.tokens, width), encoding, clip_for(config.codec, encoding))
    started = time.perf_counter()
    trainer.forward_backward(name, token_ids, latents)
    if trainer.device.type == "cuda":
        torch.cuda.synchronize(trainer.device)
    return timedelta(seconds=time.perf_counter() - started)


def _available_bytes(device: str) -> int:
    if device == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    return int(psutil.virtual_memory().available)
