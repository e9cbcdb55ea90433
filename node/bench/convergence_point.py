"""What the convergence benchmark and its cells' processes tell each other. Imports no torch: the parent needs none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stage_server.config import Frozen


class CellSpec(Frozen):
    """All that a cell's process is told."""

    variant: str
    rate: float
    seed: int
    run: dict[str, Any]
    state_file: Path  # safetensors: where to go on from
    threads: int


class Point(Frozen):
    """One evaluation of one cell: one line of the result file."""

    event: str = "evaluation"
    variant: str
    rate: float
    seed: int
    run_id: str
    step: int
    tokens: int
    val_loss: float
    train_loss: float | None  # mean since the evaluation before; None before the first step
    strange_loss: float | None = None  # validation with latents of another text; at the last step, of several stages
    wire_compression: float | None  # of the frames of the last step; None with one stage
    wire_bytes_per_token: float | None  # one link, both directions
    parameters: int
