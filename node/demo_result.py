"""What a swarm has trained: the weights of all its stages, their digest, and what the model writes."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from node.unsplit import UnsplitModel, weights_digest
from stage_server.fetch import fetch_state

if TYPE_CHECKING:
    from node.config import RunConfig
    from node.data import Corpus

Weights = dict[str, Tensor]
"""By global name, of all stages."""

PROMPT = "def __init__(self, "
SAMPLE_TOKENS = 100
TEMPERATURE = 0.6
_PARAMETER = "parameter."


async def gather_weights(endpoints: Sequence[str], run_id: str, folder: Path) -> Weights:
    """The final weights of every stage, from the peers that serve them ("host:port", one per stage).

    Raises:
        LinkLost, CheckpointInvalid: as stage_server.fetch says.
    """
    weights: Weights = {}
    for stage, endpoint in enumerate(endpoints):
        place = folder / f"stage-{stage}"
        tensors = (await fetch_state([endpoint], run_id, place)).tensors
        weights |= {
            name.removeprefix(_PARAMETER): tensor.clone()  # a copy: the files are mapped into memory, and go now
            for name, tensor in tensors.items()
            if name.startswith(_PARAMETER)
        }
        shutil.rmtree(place)
    return weights


def digest_of(weights: Weights) -> str:
    """SHA-256 over all weights, as `resbm-node reference` computes it."""
    return weights_digest(weights.items())


def write_sample(config: RunConfig, weights: Weights, corpus: Corpus) -> str:
    """Prompt and what the trained model adds to it."""
    model = UnsplitModel(config, config.run_id)
    model.load(weights)
    prompt = corpus.encode(PROMPT)
    return corpus.decode(prompt + model.generate(prompt, SAMPLE_TOKENS, TEMPERATURE, config.seed))
