"""Encoded text on disk: a tokenizer and two memory-mapped token streams, written all at once or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from node.config import RunConfig
from node.documents import Document, Documents

FORMAT = 1
SEPARATOR = "<|endoftext|>"  # after each document
TOKENIZER_TEXT_BYTES = 8_000_000  # the tokenizer learns from a sample of about this much; more changes little
DOCUMENTS_AT_ONCE = 64  # encoded together, on all cores

Progress = Callable[[str, float], None]
TokenStream = NDArray[np.unsignedinteger]


@dataclass(frozen=True, slots=True)
class TokenFiles:
    """What a cache folder holds."""

    tokenizer: Tokenizer
    train: TokenStream
    validation: TokenStream


def key_of(documents: Documents, config: RunConfig) -> str:
    """Name of the cache folder: everything that decides its content."""
    parts = (FORMAT, documents.digest, config.model.vocab_size, config.data.validation_fraction)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def load(folder: Path) -> TokenFiles | None:
    """The files in `folder`, memory-mapped; None if they are missing, damaged or half-written."""
    try:
        hashes = json.loads((folder / "manifest.json").read_text())
        if any(_sha256(folder / name) != value for name, value in hashes.items()):
            return None
        return TokenFiles(
            Tokenizer.from_file(str(folder / "tokenizer.json")),
            np.load(folder / "train.npy", mmap_mode="r"),
            np.load(folder / "validation.npy", mmap_mode="r"),
        )
    except (OSError, ValueError, AttributeError):  # AttributeError: the manifest is JSON but no object
        return None


def build(folder: Path, documents: Documents, config: RunConfig, report: Progress) -> TokenFiles:
    """Trains the tokenizer, encodes all text and puts it at `folder`, in place of anything damaged there.

    Raises:
        OSError: the disk is full or refuses to be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover, ignore_errors=True)  # of a process that died; we hold the lock
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        report("training the tokenizer", 0.0)
        tokenizer = train_tokenizer(documents.train, config.model.vocab_size)
        tokenizer.save(str(temporary / "tokenizer.json"))
        total = sum(len(document.text) for document in (*documents.train, *documents.validation))
        done = 0
        for name, part in (("train", documents.train), ("validation", documents.validation)):
            pieces = []
            for ids, num_characters in _encoded(tokenizer, part):
                pieces.append(ids)
                done += num_characters
                report("encoding text", done / max(1, total))
            np.save(temporary / f"{name}.npy", np.concatenate(pieces))
        hashes = {path.name: _sha256(path) for path in sorted(temporary.iterdir())}
        (temporary / "manifest.json").write_text(json.dumps(hashes))
        _sync(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    files = load(folder)
    if files is None:
        raise OSError(5, "what was written cannot be read back", str(folder))
    return files


def train_tokenizer(documents: tuple[Document, ...], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; it can encode any text."""
    total = sum(len(document.text) for document in documents)
    every = max(1, round(total / TOKENIZER_TEXT_BYTES))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document.text for document in documents[::every]), trainer)
    return tokenizer


def _encoded(tokenizer: Tokenizer, documents: tuple[Document, ...]) -> Iterator[tuple[TokenStream, int]]:
    """Token ids of some documents at a time, and their length in characters."""
    dtype = np.uint16 if tokenizer.get_vocab_size() <= 2**16 else np.uint32
    separator = tokenizer.token_to_id(SEPARATOR)
    rest = iter(documents)
    while chunk := tuple(islice(rest, DOCUMENTS_AT_ONCE)):
        encodings: list[Any] = tokenizer.encode_batch_fast([document.text for document in chunk])
        ids = [np.array([*encoding.ids, separator], dtype=dtype) for encoding in encodings]
        yield np.concatenate(ids), sum(len(document.text) for document in chunk)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    """A power cut must not leave a folder that looks whole."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
