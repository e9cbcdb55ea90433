"""The arithmetic of a stage whose replicas average seldom: DiLoCo (arXiv 2311.08105).

Each replica takes every step by itself, with the mean gradient of the microbatches that are its share of the step.
After every `inner_steps` steps, and after the last one, an outer step follows (`outer.py`): what each replica has moved
by since the outer step before is added up over the replicas, weighted by microbatches, and all go on from the same
weights.

An outer step may come to nothing because somebody died in the middle. So what goes into it is computed beside the
stage's weights and optimizer, which change only when it is agreed on.

Shapes: N values of all parameters together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor

from stage_server.config import DilocoConfig
from stage_server.errors import CheckpointInvalid
from stage_server.optimizer import CommitReport
from stage_server.outer import OuterOptimizer
from stage_server.replica_trainer import Agreed, ReplicaTrainer
from stage_server.trainer import MemoryReport

_OUTER: Final = "outer."
_TRAINED: Final = "outer.trained"


class DilocoTrainer(ReplicaTrainer):
    """See the module's text. Takes what `StageTrainer` takes, and `diloco`."""

    def __init__(self, *args: Any, diloco: DilocoConfig, **options: Any) -> None:
        super().__init__(*args, **options)
        self._diloco = diloco
        self._outer = OuterOptimizer(dict(self.parameters_fp32()), diloco.outer_lr, diloco.outer_momentum)
        self._trained = 0  # microbatches that have moved this replica's weights since the newest outer step

    @property
    def replicas_are_equal(self) -> bool:
        """Between outer steps each has weights of its own, and optimizer state always."""
        return False

    # -- sums ---------------------------------------------------------------------------------------------------

    def exchanges(self, step: int) -> bool:
        """Whether an outer step follows."""
        return step % self._diloco.inner_steps == 0 or step == self.config.plan.steps

    def can_be_whole(self, weight: int) -> bool:
        """At least the step's own microbatches. What came before may have died with somebody, or, where a lost stage
        was restored from copies of one state, be there twice.
        """
        return weight >= self.config.plan.microbatches_per_step

    @torch.no_grad()
    def write_contribution(self, step: int, num_microbatches: int, out_N: Tensor) -> int:
        """w (θ − θ_i) as it will be after the step, and w. Nothing changes here."""
        moved = dict(self.parameters_fp32())
        if num_microbatches:
            moved = self._optimizer.weights_after(step, self._scale(num_microbatches))
        trained = self._trained + num_microbatches
        for name, part in self._parts(out_N):
            part.copy_((self._outer.weights[name] - moved[name]) * trained)
        return trained

    # -- commit -------------------------------------------------------------------------------------------------

    def commit_agreed(self, step: int, agreed: Agreed) -> CommitReport:
        """The inner step, unless the share is empty; and the outer step if one is due."""
        if agreed.num_microbatches:
            self._optimizer.scale_gradients(self._scale(agreed.num_microbatches))
        else:
            self.drop_sum()
        report = self.commit(step)
        self._trained += agreed.num_microbatches
        if self.exchanges(step):
            self._outer.step(self._mean_of(agreed))
            self._start_from_outer()
        return report

    def _scale(self, num_microbatches: int) -> float:
        """From the gradient sum, which is made for a mean over the whole step, to the mean over so many."""
        return self.config.plan.microbatches_per_step / num_microbatches

    @torch.no_grad()
    def _mean_of(self, agreed: Agreed) -> dict[str, Tensor]:
        """By parameter: what the replicas have moved by, on average; a replica that is alone is the average."""
        if agreed.total_N is None:
            return {name: self._outer.weights[name] - weight for name, weight in self.parameters_fp32()}
        mean_N = agreed.total_N / agreed.weight  # where the total is: a GPU would multiply by a rounded 1 / weight
        return {name: part.to(self.device) for name, part in self._parts(mean_N)}

    @torch.no_grad()
    def _start_from_outer(self) -> None:
        for name, parameter in self.parameters_fp32():
            parameter.copy_(self._outer.weights[name])
        self._trained = 0

    # -- state --------------------------------------------------------------------------------------------------

    def take_over(self, tensors: Mapping[str, Tensor]) -> None:
        """What the replicas have in common, and the other's optimizer state. Its own way since then stays its own:
        this replica starts from the newest outer step, so that nothing is averaged twice.
        """
        self.load_state_tensors(tensors)
        self._start_from_outer()

    def state_tensors(self) -> dict[str, Tensor]:
        """As `ReplicaTrainer.state_tensors`, and the outer step's."""
        outer = {_OUTER + name: tensor for name, tensor in self._outer.state_tensors().items()}
        return super().state_tensors() | outer | {_TRAINED: torch.tensor(self._trained)}

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """As `ReplicaTrainer.load_state_tensors`, and the outer step's. Raises CheckpointInvalid."""
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OUTER)}
        outer = {name.removeprefix(_OUTER): t for name, t in tensors.items() if name.startswith(_OUTER)}
        trained = outer.pop(_TRAINED.removeprefix(_OUTER), None)
        if trained is None or trained.numel() != 1 or int(trained) < 0:
            raise CheckpointInvalid(f"{_TRAINED} is missing, or no number of microbatches")
        self._outer.check(outer)
        super().load_state_tensors(others)
        self._outer.load_state_tensors(outer)
        self._trained = int(trained)

    def memory(self) -> MemoryReport:
        """As `StageTrainer.memory`; the outer step's state counts as the optimizer's."""
        report = super().memory()
        outer_bytes = sum(tensor.nbytes for tensor in self._outer.state_tensors().values())
        return replace(report, optimizer_bytes=report.optimizer_bytes + outer_bytes)
