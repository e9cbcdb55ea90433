"""How much memory activations take, and whether the next microbatch's may be kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor


class ActivationMeter:
    """Measures the activations of the first microbatch; all others have the same shapes, so they take the same.

    Args:
        parameters: not activations, although autograd saves them too.
        budget_bytes: activations that may be kept between forward and backward.
    """

    def __init__(self, parameters: Iterable[Tensor], budget_bytes: int) -> None:
        self._parameters = {_storage(parameter) for parameter in parameters}
        self.budget_bytes = budget_bytes
        self.microbatch_bytes = 0  # 0: not measured yet
        self.peak_bytes = 0

    def may_keep(self, num_kept: int) -> bool:
        """Whether one more microbatch fits the budget beside those kept; before the first is measured: any budget."""
        return self.budget_bytes > 0 and (num_kept + 1) * self.microbatch_bytes <= self.budget_bytes

    def held(self, num_microbatches: int) -> None:
        """Note how many microbatches' activations are held at once."""
        self.peak_bytes = max(self.peak_bytes, num_microbatches * self.microbatch_bytes)

    @contextlib.contextmanager
    def measuring(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """Around a forward pass: measures it if none is measured yet and autograd records it.

        Gives a function that counts a tensor which is held besides those that autograd saves.
        """
        if self.microbatch_bytes or not torch.is_grad_enabled():
            yield lambda tensor: tensor
            return
        sizes: dict[int, int] = {}  # by storage, so that views are counted once

        def note(tensor: Tensor) -> Tensor:
            sizes[_storage(tensor)] = tensor.untyped_storage().nbytes()
            return tensor  # autograd keeps it, so no storage address is used twice

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            yield note
        self.microbatch_bytes = sum(size for storage, size in sizes.items() if storage not in self._parameters)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
