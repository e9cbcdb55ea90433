"""The corpus of a run: text made into tokens once, kept in a cache, cut into microbatches for ever the same.

A microbatch is a pure function of the run's seed and of its own name, so that any process can make it again.
Shapes: B sequences of T+1 tokens (inputs are the first T, targets the last T).
"""

from __future__ import annotations

import fcntl
import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from node import folders, token_cache
from node.config import RunConfig
from node.documents import read_documents
from node.errors import DataUnreadable, MachineUnfit
from node.token_cache import TokenFiles
from stage_server.ids import MicrobatchId, MicrobatchKind

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Progress = Callable[[str, float], None]
"""Called with what is being done and the share of it that is done, 0 to 1."""


@dataclass(frozen=True, slots=True, eq=False)
class Corpus:
    """Tokens of a run and the cut into microbatches."""

    batch: int
    tokens: int
    seed: int
    num_evaluations: int  # microbatches of one validation: its windows are spread for that many
    digest: str
    unigram_entropy: float  # nats per token of the validation text under the training text's token frequencies
    train: NDArray[np.unsignedinteger]
    validation: NDArray[np.unsignedinteger]
    tokenizer: Tokenizer

    @property
    def num_train_tokens(self) -> int:
        return len(self.train)

    def microbatch(self, name: MicrobatchId) -> NDArray[np.int32]:
        """Token ids [B, T+1] of the microbatch `name`. Those of a validation depend on the index alone."""
        stream = self.train if name.kind is MicrobatchKind.TRAIN else self.validation
        window = np.arange(self.tokens + 1)
        starts = np.array([self._start(name, row) for row in range(self.batch)])
        token_ids: NDArray[np.int32] = stream[starts[:, None] + window].astype(np.int32)
        return token_ids

    def encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text).ids)

    def decode(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids))

    def _start(self, name: MicrobatchId, row: int) -> int:
        """Where in the stream a row begins: anywhere in training, evenly spread in validation."""
        if name.kind is MicrobatchKind.TRAIN:
            place = hashlib.sha256(f"{self.seed}/{name.step}/{name.index}/{row}".encode()).digest()
            return int.from_bytes(place[:8]) % (len(self.train) - self.tokens)
        last = len(self.validation) - self.tokens - 1
        num_rows = max(1, self.num_evaluations) * self.batch
        return (name.index * self.batch + row) % num_rows * last // max(1, num_rows - 1)


def load_corpus(config: RunConfig, progress: Progress | None = None, cache: Path | None = None) -> Corpus:
    """The corpus of a run. The first call for a text and a vocabulary trains the tokenizer and fills the cache.

    Several processes may call at once: one works, the others wait for it. `cache` is a folder; default: the user's.

    Raises:
        DataUnreadable: the text cannot be read, or is less than one sequence for training or for validation.
        MachineUnfit: the cache cannot be written.
    """
    report = progress or (lambda _text, _fraction: None)
    report("reading text", 0.0)
    documents = read_documents(config.data)
    key = token_cache.key_of(documents, config)
    folder = (cache or folders.cache_folder()) / "tokens" / key
    files = token_cache.load(folder)
    if files is None:
        try:
            with _exclusive(folder.with_suffix(".lock"), report):
                files = token_cache.load(folder) or token_cache.build(folder, documents, config, report)
        except OSError as error:
            raise MachineUnfit(
                f"the cache cannot be written: {error.filename or folder}: {error.strerror}",
                remedy="free disk space, or point XDG_CACHE_HOME at a folder that can be written",
            ) from error
    _check_length(files, config)
    report("text ready", 1.0)
    return Corpus(
        batch=config.plan.batch,
        tokens=config.plan.tokens,
        seed=config.seed,
        num_evaluations=config.plan.evaluation_microbatches,
        digest=documents.digest,
        unigram_entropy=unigram_entropy(files.train, files.validation, config.model.vocab_size),
        train=files.train,
        validation=files.validation,
        tokenizer=files.tokenizer,
    )


def unigram_entropy(
    train: NDArray[np.unsignedinteger], validation: NDArray[np.unsignedinteger], vocab_size: int
) -> float:
    """Nats per token of `validation` under token frequencies of `train`: the loss of the best model without context.

    Every token is counted once more than it was seen, so that one never seen costs much but not everything.
    """
    seen = np.bincount(train, minlength=vocab_size) + 1.0
    used = np.bincount(validation, minlength=vocab_size)
    return float(math.log(seen.sum()) - (used @ np.log(seen)) / used.sum())


def _check_length(files: TokenFiles, config: RunConfig) -> None:
    needed = config.plan.tokens + 1
    for name, stream in (("training", files.train), ("validation", files.validation)):
        if len(stream) < needed:
            raise DataUnreadable(
                f"the {name} text holds {len(stream)} tokens; one sequence needs {needed}",
                remedy="name more text under [data] paths, raise data.max_bytes, or lower plan.tokens",
            )


@contextmanager
def _exclusive(path: Path, report: Progress) -> Iterator[None]:
    """Holds the lock file `path`; the lock ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another process that prepares the text", 0.0)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
