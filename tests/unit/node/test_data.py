"""The corpus: same text, same tokens, same microbatches; a cache that is whole or is made again."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest

from node import data, token_cache
from node.config import DataConfig, RunConfig, validated
from node.data import Corpus, load_corpus, unigram_entropy
from node.documents import read_documents
from node.errors import DataUnreadable, MachineUnfit
from stage_server.ids import MicrobatchId, MicrobatchKind, StepIndex

BATCH, TOKENS = 3, 16


def config_for(*paths: Path, seed: int = 0, **data_fields: object) -> RunConfig:
    values = {
        "stages": 1,
        "seed": seed,
        "model": {"vocab_size": 300},
        "plan": {"batch": BATCH, "tokens": TOKENS, "evaluation_microbatches": 4},
        "data": {"source": "files", "paths": [str(path) for path in paths], **data_fields},
    }
    return validated(values, "test")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Sixty files of about a kilobyte."""
    folder = tmp_path / "text"
    for number in range(60):
        path = folder / f"part{number % 3}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"file {number}: " + " ".join(str(number * k % 97) for k in range(300)))
    return folder


@pytest.fixture
def corpus(text: Path, tmp_path: Path) -> Corpus:
    return load_corpus(config_for(text), cache=tmp_path / "cache")


def train(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.TRAIN, index)


def evaluate(step: int, index: int) -> MicrobatchId:
    return MicrobatchId(StepIndex(step), MicrobatchKind.EVALUATE, index)


# Microbatches


def test_microbatches_have_the_shape_of_the_run(corpus: Corpus) -> None:
    for name in (train(1, 0), evaluate(1, 3)):
        ids = corpus.microbatch(name)
        assert ids.shape == (BATCH, TOKENS + 1)
        assert ids.dtype == np.int32
        assert 0 <= ids.min() <= ids.max() < 300


def test_a_microbatch_depends_on_seed_step_and_index_alone(text: Path, corpus: Corpus, tmp_path: Path) -> None:
    again = load_corpus(config_for(text), cache=tmp_path / "another cache")
    other_seed = load_corpus(config_for(text, seed=1), cache=tmp_path / "cache")
    first = corpus.microbatch(train(3, 2))
    corpus.microbatch(train(9, 9))
    assert np.array_equal(corpus.microbatch(train(3, 2)), first)
    assert np.array_equal(again.microbatch(train(3, 2)), first)
    for other in (corpus.microbatch(train(4, 2)), corpus.microbatch(train(3, 1)), other_seed.microbatch(train(3, 2))):
        assert not np.array_equal(other, first)


def test_rows_of_a_microbatch_are_windows_of_the_training_text(corpus: Corpus) -> None:
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(corpus.train, dtype=np.int32), TOKENS + 1)
    known = {window.tobytes() for window in windows}
    assert all(row.tobytes() in known for row in corpus.microbatch(train(1, 0)))


def test_validation_is_the_same_at_every_step_and_seed(text: Path, corpus: Corpus, tmp_path: Path) -> None:
    other_seed = load_corpus(config_for(text, seed=1), cache=tmp_path / "cache")
    for index in range(4):
        ids = corpus.microbatch(evaluate(1, index))
        assert np.array_equal(ids, corpus.microbatch(evaluate(50, index)))
        assert np.array_equal(ids, other_seed.microbatch(evaluate(1, index)))


def test_validation_spreads_over_all_of_the_held_out_text(corpus: Corpus) -> None:
    first, last = corpus.microbatch(evaluate(1, 0))[0], corpus.microbatch(evaluate(1, 3))[-1]
    assert np.array_equal(first, corpus.validation[: TOKENS + 1])
    assert np.array_equal(last, corpus.validation[-TOKENS - 1 :])


# Text and tokens


def test_encoding_is_lossless_for_any_text(corpus: Corpus) -> None:
    for sample in ("plain", "tabs\tand\nlines", "Grüße, 世界 🙂", "\x00\x01", " "):
        assert corpus.decode(corpus.encode(sample)) == sample


def test_files_are_held_out_whole_and_never_trained_on(text: Path) -> None:
    documents = read_documents(DataConfig(source="files", paths=(str(text),), validation_fraction=0.2))
    names = {document.name for document in documents.train}, {document.name for document in documents.validation}
    assert names[0].isdisjoint(names[1])
    assert len(names[0] | names[1]) == 60
    assert 4 <= len(names[1]) <= 22


def test_of_a_single_file_the_end_is_held_out(tmp_path: Path) -> None:
    path = tmp_path / "one.txt"
    path.write_text("".join(f"{n} " for n in range(1000)))
    documents = read_documents(DataConfig(source="files", paths=(str(path),), validation_fraction=0.1))
    train_text, validation_text = documents.train[0].text, documents.validation[0].text
    assert train_text + validation_text == path.read_text()
    assert len(validation_text) == pytest.approx(0.1 * len(path.read_text()), rel=0.01)


def test_digest_depends_on_text_and_names_but_not_on_the_place(text: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return read_documents(DataConfig(source="files", paths=(str(folder),))).digest

    moved = tmp_path / "moved"
    before = digest(text)
    text.rename(moved)
    assert digest(moved) == before
    (moved / "part0" / "0.txt").write_text("changed")
    assert digest(moved) != before


def test_a_cap_takes_a_sample_of_whole_files(text: Path) -> None:
    documents = read_documents(DataConfig(source="files", paths=(str(text),), max_bytes=10_000))
    size = sum(len(document.text) for document in (*documents.train, *documents.validation))
    assert 10_000 <= size < 12_000


def test_the_standard_library_has_no_installed_packages() -> None:
    documents = read_documents(DataConfig(max_bytes=300_000))
    names = [document.name for document in (*documents.train, *documents.validation)]
    assert len(names) > 5
    assert all(name.endswith(".py") and "site-packages" not in name for name in names)


def test_undecodable_files_of_a_folder_are_left_out(text: Path) -> None:
    (text / "image.bin").write_bytes(b"\xff\xfe\x00")
    documents = read_documents(DataConfig(source="files", paths=(str(text),)))
    assert len(documents.train) + len(documents.validation) == 60


def test_unigram_entropy_of_known_frequencies() -> None:
    train_ids = np.array([0] * 29_999 + [1] * 9_999, dtype=np.uint16)  # one more of each is counted: 3 to 1
    validation_ids = np.array([0, 1], dtype=np.uint16)
    expected = -(math.log(0.75) + math.log(0.25)) / 2
    assert unigram_entropy(train_ids, validation_ids, 2) == pytest.approx(expected, rel=1e-4)


def test_unigram_entropy_of_a_token_never_seen_is_finite() -> None:
    ids = np.zeros(10, dtype=np.uint16), np.array([5], dtype=np.uint16)
    assert unigram_entropy(*ids, 300) == pytest.approx(math.log(310))


# Refusals


def test_missing_and_undecodable_paths_are_named(tmp_path: Path) -> None:
    binary = tmp_path / "b.bin"
    binary.write_bytes(b"\xff\xfe")
    empty = tmp_path / "empty"
    empty.mkdir()
    for path, words in ((tmp_path / "none", "does not exist"), (binary, "not UTF-8"), (empty, "no UTF-8 text")):
        with pytest.raises(DataUnreadable, match=words):
            load_corpus(config_for(path), cache=tmp_path / "cache")


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("only a few words")
    with pytest.raises(DataUnreadable, match="one sequence needs 17"):
        load_corpus(config_for(path), cache=tmp_path / "cache")


def test_a_cache_that_cannot_be_written_is_refused(text: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineUnfit, match="cache cannot be written"):
        load_corpus(config_for(text), cache=tmp_path / "file")


# The cache


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were built, in order."""
    built: list[Path] = []
    build = token_cache.build

    def counted(folder: Path, *arguments: object) -> token_cache.TokenFiles:
        built.append(folder)
        return build(folder, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(data.token_cache, "build", counted)
    return built


def test_text_is_encoded_once(text: Path, tmp_path: Path, builds: list[Path]) -> None:
    first = load_corpus(config_for(text), cache=tmp_path / "cache")
    second = load_corpus(config_for(text, seed=5), cache=tmp_path / "cache")
    assert len(builds) == 1
    assert np.array_equal(first.train, second.train)
    assert isinstance(second.train, np.memmap)


@pytest.mark.parametrize("name", ["train.npy", "validation.npy", "tokenizer.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_cache_is_made_again(text: Path, tmp_path: Path, builds: list[Path], name: str, damage: str) -> None:
    before = np.array(load_corpus(config_for(text), cache=tmp_path / "cache").train)
    path = builds[0] / name
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    after = load_corpus(config_for(text), cache=tmp_path / "cache")
    assert len(builds) == 2
    assert np.array_equal(after.train, before)


def test_a_manifest_of_another_kind_is_no_cache(tmp_path: Path) -> None:
    for content in ([], 3, {"train.npy": 1}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        assert token_cache.load(tmp_path) is None


def test_a_failed_build_leaves_nothing(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(token_cache.np, "save", full)
    with pytest.raises(MachineUnfit, match="No space left"):
        load_corpus(config_for(text), cache=tmp_path / "cache")
    assert [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.suffix != ".lock"] == []


def test_several_at_once_build_once(text: Path, tmp_path: Path, builds: list[Path]) -> None:
    results: list[Corpus] = []
    threads = [
        threading.Thread(target=lambda: results.append(load_corpus(config_for(text), cache=tmp_path / "cache")))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 4
    assert len(builds) == 1


def test_progress_is_told(text: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    load_corpus(config_for(text), lambda words, share: told.append((words, share)), tmp_path / "cache")
    assert [words for words, _ in told][:2] == ["reading text", "training the tokenizer"]
    assert told[-1] == ("text ready", 1.0)
    assert all(0.0 <= share <= 1.0 for _, share in told)
