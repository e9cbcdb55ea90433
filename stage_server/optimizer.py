"""The optimizer step of one stage: Muon for hidden matrices, AdamW for the rest, one schedule of the global step.

Clipping is per stage, at clip_norm / sqrt(S): the norm of the whole model would cost a round trip through the swarm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stage_server.config import OptimizerConfig
from stage_server.errors import CheckpointInvalid, NotFinite

_BOUNDARIES = "boundaries."
_NOT_HIDDEN = ("model.embed_tokens.", "anchors.", "contexts.", "lm_head.")


@dataclass(frozen=True, slots=True)
class CommitReport:
    """What one optimizer step did."""

    gradient_norm: float  # of this stage, before clipping
    clipped: bool


def schedule(step: int, steps: int, warmup_fraction: float, final_fraction: float) -> float:
    """Share of the peak learning rate in step 1 to `steps`: linear warm-up to 1, then linear decay to the final share.

    Past the last step (a run that was made longer by hand) the rate stays at its final share.
    """
    warmup = math.ceil(warmup_fraction * steps)
    if step <= warmup:
        return step / warmup
    remaining = max(0.0, (steps - step) / max(1, steps - warmup))
    return final_fraction + (1.0 - final_fraction) * remaining


def is_hidden_matrix(name: str, parameter: Tensor) -> bool:
    """Whether Muon may train it: 2-D and neither a table of tokens nor the head."""
    return parameter.ndim == 2 and not name.startswith(_NOT_HIDDEN)


class StageOptimizer:
    """Optimizers, clipping and schedule over the parameters of one stage.

    Args:
        parameters: by global name.
        config: the run's.
        num_stages: S.
        steps: optimizer steps of the whole run.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, num_stages: int, steps: int
    ) -> None:
        self._parameters = dict(sorted(parameters.items()))
        self._config, self._steps = config, steps
        self._num_stages = num_stages
        self._norm_limit = config.clip_norm / math.sqrt(num_stages)
        self._optimizers = _build(self._parameters, config)
        self._peaks = [[group["lr"] for group in optimizer.param_groups] for _, optimizer in self._optimizers]

    def step(self, step: int) -> CommitReport:
        """Clip, update the parameters and drop the gradients.

        Raises:
            NotFinite: a gradient holds NaN or infinity; nothing has changed.
        """
        gradients = [p.grad for p in self._parameters.values() if p.grad is not None]
        norm = _total_norm(gradients)
        if not math.isfinite(norm):
            raise NotFinite(f"gradient norm of step {step} is {norm}")
        clipped = 0.0 < self._norm_limit < norm
        if clipped:
            torch._foreach_mul_(gradients, self._norm_limit / norm)
        scale = schedule(step, self._steps, self._config.warmup_fraction, self._config.final_fraction)
        for (_, optimizer), peaks in zip(self._optimizers, self._peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * scale
            optimizer.step()
        self.zero_gradients()
        return CommitReport(norm, clipped)

    @torch.no_grad()
    def scale_gradients(self, factor: float) -> None:
        """Multiplies all gradients."""
        if factor != 1.0:
            torch._foreach_mul_([p.grad for p in self._parameters.values() if p.grad is not None], factor)

    def weights_after(self, step: int, gradient_factor: float = 1.0) -> dict[str, Tensor]:
        """What `scale_gradients` and `step` would make of the parameters, by name. Nothing changes here.

        Raises:
            NotFinite: as `step` would.
        """
        twins = {name: nn.Parameter(p.detach().clone()) for name, p in self._parameters.items()}
        twin = StageOptimizer(twins, self._config, self._num_stages, self._steps)
        twin.load_state_tensors(self.state_tensors())
        for name, parameter in self._parameters.items():
            twins[name].grad = None if parameter.grad is None else parameter.grad.clone()
        twin.scale_gradients(gradient_factor)
        twin.step(step)
        return {name: parameter.detach() for name, parameter in twins.items()}

    def zero_gradients(self) -> None:
        """Forget all gradients and free their memory."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def state_tensors(self) -> dict[str, Tensor]:
        """The live state by stable name, `optimizer.<kind>.<parameter>.<field>`; empty before the first step."""
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        return {
            f"optimizer.{kind}.{names[parameter]}.{field}": value
            for kind, optimizer in self._optimizers
            for parameter, fields in optimizer.state.items()
            for field, value in fields.items()
        }

    def load_state_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the state by copies of the tensors.

        Raises:
            CheckpointInvalid: a name or shape that this stage has no place for; nothing has changed.
        """
        places: list[tuple[torch.optim.Optimizer, nn.Parameter, str, Tensor]] = []
        for full_name, value in tensors.items():
            _, kind, rest = full_name.split(".", 2)
            name, field = rest.rsplit(".", 1)
            parameter, optimizer = self._parameters.get(name), dict(self._optimizers).get(kind)
            if parameter is None or optimizer is None or value.shape not in (parameter.shape, torch.Size([])):
                raise CheckpointInvalid(f"{full_name} with shape {list(value.shape)} does not belong to this stage")
            places.append((optimizer, parameter, field, value))
        for _, optimizer in self._optimizers:
            optimizer.state.clear()
        for optimizer, parameter, field, value in places:
            # AdamW keeps its step count, a scalar, on the CPU
            device = parameter.device if value.ndim else "cpu"
            optimizer.state[parameter][field] = value.detach().to(device, copy=True)

    def state_bytes(self) -> int:
        """Memory of the state."""
        return sum(value.nbytes for value in self.state_tensors().values())


def _build(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> list[tuple[str, torch.optim.Optimizer]]:
    layers: list[nn.Parameter] = []
    projections: list[nn.Parameter] = []
    tables: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in parameters.items():
        if is_hidden_matrix(name, parameter):
            (projections if name.startswith(_BOUNDARIES) else layers).append(parameter)
        else:
            (tables if parameter.ndim >= 2 else vectors).append(parameter)
    rate = config.muon_lr if config.hidden == "muon" else config.adamw_lr
    decay = config.weight_decay
    hidden = _groups((layers, rate, decay), (projections, rate * config.boundary_rate, decay))
    others = _groups((tables, config.adamw_lr, decay), (vectors, config.adamw_lr, 0.0))
    if config.hidden == "adamw":
        hidden, others = [], hidden + others
    optimizers: list[tuple[str, torch.optim.Optimizer]] = []
    if hidden:
        muon = torch.optim.Muon(hidden, momentum=config.muon_momentum, nesterov=True, adjust_lr_fn="match_rms_adamw")
        optimizers.append(("muon", muon))
    if others:
        optimizers.append(("adamw", torch.optim.AdamW(others, betas=config.adamw_betas)))
    return optimizers


def _groups(*groups: tuple[list[nn.Parameter], float, float]) -> list[dict[str, Any]]:
    """Parameters, peak learning rate and weight decay as torch wants them; without those that have no parameters."""
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]


def _total_norm(gradients: Iterable[Tensor]) -> float:
    """Euclidean norm of all gradients together; NaN and infinity are handed on."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0
