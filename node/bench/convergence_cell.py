"""One training of the convergence benchmark, in a process of its own: `python -m node.bench.convergence_cell`.

Reads one `CellSpec` line on stdin; prints one JSON line an evaluation (`Point`), and now and then how far it is. It
trains with the stages, codec and optimizer that a swarm runs, chained in memory, and counts the bytes of the frames
that a swarm would send. Killed at any moment, it goes on from its last evaluation and ends with the same numbers.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from node.bench.chain import Chain
from node.bench.convergence_point import CellSpec, Point
from node.bench.frames import FrameCounter
from node.config import RunConfig, validated
from node.data import Corpus, load_corpus

PROGRESS_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Told:
    """Where lines go."""

    point: Callable[[Point], None]
    progress: Callable[[int], None]


def train(spec: CellSpec, told: Told) -> None:
    """Trains the cell to its end, or from where it stopped to its end."""
    config = validated(spec.run, spec.variant)
    corpus = load_corpus(config)
    training = _Training(spec, config, corpus, told)
    training.run()


class _Training:
    def __init__(self, spec: CellSpec, config: RunConfig, corpus: Corpus, told: Told) -> None:
        self._spec, self._config, self._corpus, self._told = spec, config, corpus, told
        self._chain = Chain(config)
        self._parameters = self._chain.num_parameters()

    def run(self) -> None:
        plan = self._config.plan
        every = plan.evaluate_every or plan.steps
        first = self._resumed()
        losses: list[float] = []
        said = time.monotonic()
        for step in range(first, plan.steps + 1):
            is_evaluated = step % every == 0 or step == plan.steps
            counter = FrameCounter(self._config) if is_evaluated and self._config.stages > 1 else None
            losses.append(self._chain.step(step, self._corpus.microbatch, [counter] if counter else []))
            if time.monotonic() - said >= PROGRESS_SECONDS:
                said = time.monotonic()
                self._told.progress(step)
            if is_evaluated:
                self._evaluate(step, sum(losses) / len(losses), counter)
                losses.clear()

    def _resumed(self) -> int:
        """Takes over what an earlier process of this cell left, if anything; the first step to train."""
        from safetensors import safe_open

        path = self._spec.state_file
        if not path.exists():
            self._told.point(self._point(0, self._chain.evaluate(self._corpus.microbatch), None, None))
            return 1
        with safe_open(path, framework="pt") as file:
            self._chain.load_state_tensors({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - a file, no mapping
            return int(file.metadata()["step"]) + 1

    def _evaluate(self, step: int, train_loss: float, counter: FrameCounter | None) -> None:
        point = self._point(step, self._chain.evaluate(self._corpus.microbatch), train_loss, counter)
        self._told.point(point)
        if step < self._config.plan.steps:
            self._save(step)  # after it is told: killed in between, the cell tells it once more, with the same numbers

    def _point(self, step: int, val_loss: float, train_loss: float | None, counter: FrameCounter | None) -> Point:
        spec, plan = self._spec, self._config.plan
        traffic = counter.traffic if counter else None
        is_last = step == plan.steps and self._config.stages > 1
        return Point(
            variant=spec.variant,
            rate=spec.rate,
            seed=spec.seed,
            run_id=self._config.run_id,
            step=step,
            tokens=step * plan.microbatches_per_step * plan.batch * plan.tokens,
            val_loss=val_loss,
            train_loss=train_loss,
            strange_loss=self._chain.evaluate_with_strange_latents(self._corpus.microbatch) if is_last else None,
            wire_compression=traffic.compression if traffic else None,
            wire_bytes_per_token=(
                (traffic.forward.total + traffic.backward.total) / traffic.num_tokens if traffic else None
            ),
            parameters=self._parameters,
        )

    def _save(self, step: int) -> None:
        from safetensors.torch import save_file

        path = self._spec.state_file
        part = path.with_name(path.name + ".part")
        tensors = {name: tensor.detach().contiguous() for name, tensor in self._chain.state_tensors().items()}
        save_file(tensors, part, metadata={"step": str(step)})
        part.replace(path)


def main() -> None:
    """The process: one spec in, JSON lines out."""
    spec = CellSpec.model_validate_json(sys.stdin.readline())
    import torch

    torch.set_num_threads(spec.threads)
    os.nice(5)  # whoever sits at this machine comes first

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201

    train(
        spec,
        Told(
            point=lambda point: say(point.model_dump_json()),
            progress=lambda step: say(json.dumps({"event": "progress", "step": step})),
        ),
    )


if __name__ == "__main__":
    main()
