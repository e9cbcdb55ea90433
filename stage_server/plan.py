"""What a run consists of: which microbatches belong to which step, in which order. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from stage_server.config import PlanConfig
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex


@dataclass(frozen=True, slots=True)
class Plan:
    """The order of work of every stage.

    Step k (1-based) starts from the weights of k-1 commits. Its evaluation microbatches, if it has any, come first;
    then its training microbatches; then the commit. After the last step a closing step, `steps` + 1, holds only the
    final evaluation and no commit.
    """

    steps: int
    microbatches_per_step: int
    evaluation_microbatches: int
    evaluate_every: int

    @classmethod
    def of(cls, config: PlanConfig) -> Plan:
        return cls(config.steps, config.microbatches_per_step, config.evaluation_microbatches, config.evaluate_every)

    @property
    def last_step(self) -> StepIndex:
        """The last step with any work: the closing step, or `steps` when nothing is evaluated."""
        return StepIndex(self.steps + 1 if self.evaluation_microbatches else self.steps)

    def commits(self, step: int) -> bool:
        """Whether the step ends with an optimizer step; the closing step does not."""
        return step <= self.steps

    def evaluates(self, step: int) -> bool:
        """Whether the weights that the step starts from are evaluated."""
        if not self.evaluation_microbatches:
            return False
        at_ends = step in (1, self.steps + 1)
        return at_ends or bool(self.evaluate_every and (step - 1) % self.evaluate_every == 0)

    def microbatches(self, step: int) -> tuple[MicrobatchId, ...]:
        """All microbatches of a step in the order in which every stage computes them."""
        return _microbatches(self, step)

    def position(self, name: MicrobatchId) -> int:
        """Place of a microbatch within its step, from 0: what replicas number microbatches by."""
        evaluations = self.evaluation_microbatches if self.evaluates(name.step) else 0
        return name.index + (0 if name.kind is MicrobatchKind.EVALUATE else evaluations)

    def contains(self, name: MicrobatchId) -> bool:
        """Whether the run has a microbatch of this name."""
        if not 1 <= name.step <= self.last_step or name.index < 0:
            return False
        if name.kind is MicrobatchKind.EVALUATE:
            return self.evaluates(name.step) and name.index < self.evaluation_microbatches
        return self.commits(name.step) and name.index < self.microbatches_per_step


@lru_cache(maxsize=256)
def _microbatches(plan: Plan, step: int) -> tuple[MicrobatchId, ...]:
    num_evaluations = plan.evaluation_microbatches if plan.evaluates(step) else 0
    num_train = plan.microbatches_per_step if plan.commits(step) else 0
    index = StepIndex(step)
    evaluations = (MicrobatchId(index, MicrobatchKind.EVALUATE, i) for i in range(num_evaluations))
    train = (MicrobatchId(index, MicrobatchKind.TRAIN, i) for i in range(num_train))
    return (*evaluations, *train)
