"""One rank of PyTorch's own pipeline, for comparison: `python -m node.bench.wan.torch_stage SPEC`.

The same stages, cut dense, the same text, the same optimizers, Schedule1F1B over gloo, bf16 on the wire. It trains
until it is stopped, and tells each step as a stage of ours does.

Shapes: B batch, T tokens, D model width, M microbatches of a step.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from node.config import RunConfig
from node.data import Corpus, load_corpus
from node.errors import MachineUnfit
from node.events import LinkTraffic, StageStep, claim_stdout, emit
from stage_server.config import Frozen
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex
from stage_server.losses import next_token_loss
from stage_server.module import StageModule
from stage_server.optimizer import StageOptimizer
from stage_server.trainer import autocast

BF16_BYTES = 2


class TorchStageSpec(Frozen):
    """All that a rank is told, as JSON in its only argument."""

    config: RunConfig
    stage: int
    address: str  # of this rank
    first_address: str  # of rank 0, where all meet
    port: int


class WireStage(nn.Module):
    """A stage of ours as torch's pipeline wants one: activations in, activations out, bf16 in between."""

    def __init__(self, config: RunConfig, stage: int) -> None:
        super().__init__()
        self.stage = StageModule(config, stage)
        self._config = config

    def forward(self, received: Tensor) -> Tensor:
        """Token ids [B, T] on the first stage, else bf16 [B, T, D]; gives bf16 [B, T, D], on the last one logits."""
        with autocast(self._config, received.device):
            if self.stage.is_first:
                sent_BTD = self.stage(received, None)
            else:  # no bottleneck, no anchor: of the ids only the shape matters
                ids_BT = torch.zeros(received.shape[:2], dtype=torch.int64)
                sent_BTD = self.stage(ids_BT, received.float())
        output: Tensor = sent_BTD if self.stage.is_last else sent_BTD.bfloat16()
        return output


class TimedStage(PipelineStage):
    """Knows how long it has computed."""

    compute_seconds = 0.0

    def forward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return super().forward_one_chunk(*args, **kwargs)
        finally:
            self.compute_seconds += time.perf_counter() - started

    def backward_one_chunk(self, *args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return super().backward_one_chunk(*args, **kwargs)
        finally:
            self.compute_seconds += time.perf_counter() - started


def interface_of(address: str) -> str:
    """The network interface that has this address. Raises MachineUnfit."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            return name
    raise MachineUnfit(f"no network interface here has the address {address}")


class Rank:
    """One process of the pipeline. `train_step` must be called by all of them."""

    def __init__(self, spec: TorchStageSpec) -> None:
        config = spec.config
        self._config, self._plan = config, config.plan
        self._module = WireStage(config, spec.stage)
        self._stage = TimedStage(self._module, spec.stage, config.stages, torch.device("cpu"))
        # Every rank is given the loss, or it would not expect gradients back; the last one computes it.
        self._schedule = Schedule1F1B(self._stage, self._plan.microbatches_per_step, loss_fn=_loss)
        parameters = dict(self._module.stage.named_global_parameters())
        self._optimizer = StageOptimizer(parameters, config.optimizer, config.stages, self._plan.steps)
        ends = self._module.stage.is_first or self._module.stage.is_last
        self._corpus: Corpus | None = load_corpus(config) if ends else None

    def train_step(self, step: int) -> StageStep:
        """One optimizer step."""
        started, computed_before = time.perf_counter(), self._stage.compute_seconds
        losses: list[Tensor] = []
        stage = self._module.stage
        if stage.is_first:
            self._schedule.step(self._token_ids(step)[:, :-1], return_outputs=False)
        elif stage.is_last:
            self._schedule.step(target=self._token_ids(step)[:, 1:], losses=losses, return_outputs=False)
        else:
            self._schedule.step(return_outputs=False)
        optimizing = time.perf_counter()
        report = self._optimizer.step(step)
        done = time.perf_counter()
        computed = self._stage.compute_seconds - computed_before + done - optimizing
        plan = self._plan
        return StageStep(
            stage=stage.stage,
            step=step,
            loss=float(torch.stack(losses).mean()) if losses else None,
            tokens=plan.microbatches_per_step * plan.batch * plan.tokens,
            seconds=done - started,
            microbatches=plan.microbatches_per_step,
            compute_seconds=computed,
            wait_seconds=max(0.0, done - started - computed),
            gradient_norm=report.gradient_norm,
            link=None if stage.is_last else self._traffic(),
        )

    def _token_ids(self, step: int) -> Tensor:
        """int64 [M B, T+1]."""
        assert self._corpus is not None  # for the type checker: the ends have one
        names = (
            MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)
            for index in range(self._plan.microbatches_per_step)
        )
        return torch.cat([torch.from_numpy(self._corpus.microbatch(name)).long() for name in names])

    def _traffic(self) -> LinkTraffic:
        """Payload of one step: gloo does not count what it sends."""
        plan = self._plan
        values = plan.microbatches_per_step * plan.batch * plan.tokens * self._config.model.hidden_size
        one_way = values * BF16_BYTES
        return LinkTraffic(dense_bytes=2 * one_way, wire_bytes_forward=one_way, wire_bytes_backward=one_way)


def _loss(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return next_token_loss(logits_BTV, targets_BT)


def main() -> None:
    claim_stdout()
    spec = TorchStageSpec.model_validate_json(sys.argv[1])
    os.environ["GLOO_SOCKET_IFNAME"] = interface_of(spec.address)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://{spec.first_address}:{spec.port}", rank=spec.stage, world_size=spec.config.stages
    )
    rank = Rank(spec)
    for step in range(1, spec.config.plan.steps + 1):
        emit(rank.train_step(step))


if __name__ == "__main__":
    main()
