"""Where training text comes from, and which of it is held out for validation. No tokens here."""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from node.config import DataConfig
from node.errors import DataUnreadable

FOREIGN_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__"})
MACHINE_PREFIXES = ("_sysconfigdata", "config-")
"""Files and folders of the standard library that hold this machine's paths, not text that all have."""


@dataclass(frozen=True, slots=True)
class Document:
    """One file's text under a name that is the same on every machine."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Documents:
    """All text of a run, in order of name."""

    train: tuple[Document, ...]
    validation: tuple[Document, ...]
    digest: str


def read_documents(config: DataConfig) -> Documents:
    """Reads and splits the text that `config` names.

    Files that are not UTF-8 are left out of a folder. Whole files are held out, chosen by the hash of their names;
    where that would leave either side empty (a single file, say) the end of every file is held out instead.

    Raises:
        DataUnreadable: a path is missing or unreadable, or there is no text at all.
    """
    files = _stdlib_files() if config.source == "stdlib" else _named_files(config.paths)
    documents = sorted(_capped(_readable(files), config.max_bytes), key=lambda document: document.name)
    if not documents:
        where = "the standard library's folder" if config.source == "stdlib" else ", ".join(config.paths)
        raise DataUnreadable(f"no UTF-8 text in {where}")
    held_out = {document.name for document in documents if _share(document.name, "split") < config.validation_fraction}
    if 0 < len(held_out) < len(documents):
        train = tuple(document for document in documents if document.name not in held_out)
        validation = tuple(document for document in documents if document.name in held_out)
    else:
        train, validation = _split_each(documents, config.validation_fraction)
    return Documents(train, validation, _digest(documents))


def _stdlib_files() -> Iterator[tuple[str, Path]]:
    return _files_below(Path(sysconfig.get_path("stdlib")), "*.py")


def _named_files(paths: tuple[str, ...]) -> Iterator[tuple[str, Path]]:
    """Each file once. Names carry the position of their entry, so that two folders may hold equal names."""
    for position, entry in enumerate(paths):
        path = Path(entry).expanduser()
        if path.is_dir():
            for name, file in _files_below(path, "*"):
                yield f"{position}/{name}", file
        elif path.exists():
            _check_text(path)
            yield f"{position}/{path.name}", path
        else:
            raise DataUnreadable(f"{path} does not exist")


def _files_below(folder: Path, pattern: str) -> Iterator[tuple[str, Path]]:
    for file in folder.rglob(pattern):
        relative = file.relative_to(folder)
        foreign = FOREIGN_FOLDERS.intersection(relative.parts)
        if not foreign and not relative.name.startswith(".") and not relative.parts[0].startswith(MACHINE_PREFIXES):
            yield relative.as_posix(), file


def _check_text(path: Path) -> None:
    """A file that was named by itself must not be left out in silence."""
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataUnreadable(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise DataUnreadable(f"{path}: {error.strerror}") from error


def _readable(files: Iterator[tuple[str, Path]]) -> list[tuple[str, Path]]:
    return [(name, path) for name, path in files if path.is_file() and os.access(path, os.R_OK)]


def _capped(files: list[tuple[str, Path]], max_bytes: int) -> Iterator[Document]:
    """The text of the files; under a cap, of a sample of them that depends on their names alone."""
    left = max_bytes or float("inf")
    for name, path in sorted(files, key=lambda file: _share(file[0], "sample")):
        if left <= 0:
            return
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # the standard library has files in other encodings, for its own tests
        except OSError as error:
            raise DataUnreadable(f"{path}: {error.strerror}") from error
        if text:
            left -= path.stat().st_size
            yield Document(name, text)


def _split_each(
    documents: list[Document], validation_fraction: float
) -> tuple[tuple[Document, ...], tuple[Document, ...]]:
    cuts = [round(len(document.text) * (1 - validation_fraction)) for document in documents]
    train = (Document(d.name, d.text[:cut]) for d, cut in zip(documents, cuts, strict=True))
    validation = (Document(d.name, d.text[cut:]) for d, cut in zip(documents, cuts, strict=True))
    return tuple(train), tuple(validation)


def _share(name: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the name and the purpose alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{name}".encode()).digest()[:8]) / 2**64


def _digest(documents: list[Document]) -> str:
    digest = hashlib.sha256()
    for document in documents:
        name, text = document.name.encode(), document.text.encode()
        digest.update(f"{len(name)}:{len(text)}:".encode() + name + text)
    return digest.hexdigest()
