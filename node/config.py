"""The run file: everything that decides what a run trains, as one frozen value.

A run file is TOML. Every problem in it becomes a typed error that names the key's path: unknown keys, wrong types and
numbers out of range are `ConfigInvalid` (E102), numbers that contradict each other are `ConfigImpossible` (E103).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from node import toml_text
from node.errors import ConfigImpossible, ConfigInvalid, ConfigUnreadable
from stage_server.codec_names import CodecName
from stage_server.config import DilocoConfig, Fraction, Frozen, StageConfig
from stage_server.ids import RunId

BYTE_LEVEL_VOCABULARY = 257
"""256 byte values and the document separator: no byte-level tokenizer is smaller."""

FILE_HEADER = """\
# A run of resbm-node. Every key is part of the run's identity: change one and it is another run.
# Publish it: resbm-node coordinator --run FILE. Train it in one process: resbm-node reference --run FILE.
"""


class DataConfig(Frozen):
    """The text that is trained on."""

    source: Literal["stdlib", "files"] = Field(
        "stdlib", description="stdlib: the Python standard library's own source; files: what paths names"
    )
    paths: tuple[str, ...] = Field((), description="UTF-8 text files and folders of them, on the machine of stage 0")
    validation_fraction: Fraction = Field(0.05, description="share of the files held out for validation")
    max_bytes: int = Field(0, ge=0, description="use at most about this many bytes of text; 0: all of it")

    @model_validator(mode="after")
    def _source_fits(self) -> DataConfig:
        if self.source == "files" and not self.paths:
            raise ValueError('data.source = "files" needs at least one entry in data.paths')
        if self.source == "stdlib" and self.paths:
            raise ValueError('data.paths has entries but data.source = "stdlib" reads none; set source = "files"')
        if not 0.0 < self.validation_fraction < 1.0:
            raise ValueError(
                f"data.validation_fraction = {self.validation_fraction} leaves no text to train on or to validate with"
            )
        return self


class ReplicasConfig(Frozen):
    """How the peers that serve one stage work together."""

    averaging: Literal["none", "sync", "diloco"] = Field(
        "none",
        description="none: one peer serves each stage; sync: any number do and add up their gradients every step: "
        "the training is that of one process, whoever comes, goes or dies; diloco: they average what they have learned "
        "every few steps, for links too slow for that: the training is another one",
    )
    common_every: int = Field(
        10,
        ge=1,
        description="every so many checkpoints (plan.checkpoint_every) one is kept for longer, by all stages, and "
        "copied to peers of the next stage: where the run goes back to when all that serve a stage are gone for good",
    )
    diloco: DilocoConfig = DilocoConfig()

    @property
    def wire(self) -> Literal["fp16", "fp32"]:
        """How sums travel between the replicas of a stage."""
        return self.diloco.wire if self.averaging == "diloco" else "fp32"

    @property
    def max_replicas(self) -> int | None:
        """How many peers may serve a stage; None: any number."""
        return 1 if self.averaging == "none" else None


class RunConfig(StageConfig):
    """One training run. Equal configs have equal run ids; peers of one run hold equal configs."""

    name: str = Field("run", max_length=64, pattern=r"^[\w.-]+$", description="what people call the run")
    data: DataConfig = DataConfig()
    replicas: ReplicasConfig = ReplicasConfig()

    @model_validator(mode="after")
    def _vocabulary_fits(self) -> RunConfig:
        if self.model.vocab_size < BYTE_LEVEL_VOCABULARY:
            raise ValueError(
                f"model.vocab_size = {self.model.vocab_size} is less than {BYTE_LEVEL_VOCABULARY}: "
                "256 byte values and the document separator"
            )
        return self

    @model_validator(mode="after")
    def _replicas_meet(self) -> RunConfig:
        inner_steps = self.replicas.diloco.inner_steps
        if self.replicas.averaging == "diloco" and inner_steps > self.plan.steps:
            raise ValueError(
                f"replicas.diloco.inner_steps = {inner_steps} is more than plan.steps = {self.plan.steps}: "
                "replicas would not average before the end"
            )
        return self

    @property
    def run_id(self) -> RunId:
        """First 16 hex digits of the sha256 of the canonical JSON of every field."""
        return RunId(hashlib.sha256(canonical_json(self).encode()).hexdigest()[:16])

    def with_overrides(
        self,
        *,
        stages: int | None = None,
        steps: int | None = None,
        microbatches: int | None = None,
        codec: CodecName | None = None,
        seed: int | None = None,
    ) -> RunConfig:
        """The run with what the command line changes; None leaves a value. `codec` sets both directions.

        Raises:
            ConfigInvalid, ConfigImpossible: as for a run file.
        """
        values = self.model_dump()
        changes = {
            ("stages",): stages,
            ("seed",): seed,
            ("plan", "steps"): steps,
            ("plan", "microbatches_per_step"): microbatches,
            ("codec", "forward"): codec,
            ("codec", "backward"): codec,
        }
        for path, value in changes.items():
            if value is not None:
                _at(values, path[:-1])[path[-1]] = value
        return validated(values, "command line")


def canonical_json(config: RunConfig) -> str:
    """Sorted keys, no spaces, shortest float forms: the same text on every machine."""
    return json.dumps(config.model_dump(), sort_keys=True, separators=(",", ":"), allow_nan=False)


def load(path: Path) -> RunConfig:
    """Reads a run file. Raises ConfigUnreadable, ConfigInvalid, ConfigImpossible."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigUnreadable(f"{path} is not UTF-8 text") from error
    except OSError as error:
        raise ConfigUnreadable(f"{path}: {error.strerror}") from error
    return load_toml(text, str(path))


def load_toml(text: str, origin: str = "run file") -> RunConfig:
    """Parses the text of a run file; `origin` names it in errors. Raises as `load` does."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigUnreadable(f"{origin} is not TOML: {error}") from error
    return validated(values, origin)


def dump_toml(config: RunConfig) -> str:
    """The run file of `config`, with a comment at each key. Reading it back gives an equal config."""
    return FILE_HEADER + "\n" + toml_text.commented(config, first="name")


def preset_names() -> list[str]:
    """Names of the shipped run files."""
    entries = resources.files("node.presets").iterdir()
    return sorted(entry.name.removesuffix(".toml") for entry in entries if entry.name.endswith(".toml"))


def preset(name: str) -> RunConfig:
    """A shipped run. Raises ConfigInvalid for an unknown name."""
    names = preset_names()
    if name not in names:
        raise ConfigInvalid(
            f"there is no preset {name!r}{_did_you_mean(name, names)}", remedy=f"choose one of: {', '.join(names)}"
        )
    text = resources.files("node.presets").joinpath(f"{name}.toml").read_text(encoding="utf-8")
    return load_toml(text, f"preset {name}")


def validated(values: Mapping[str, Any], origin: str) -> RunConfig:
    """The config of parsed values. Raises ConfigInvalid, ConfigImpossible."""
    try:
        config = RunConfig.model_validate(values)
    except ValidationError as error:
        raise _explain(error, origin) from error
    try:
        canonical_json(config)
    except (
        TypeError,
        ValueError,
    ) as error:  # only `model.extra` is free-form: TOML has dates, nan and inf, JSON has not
        raise ConfigInvalid(f"{origin}: model.extra holds a value that JSON cannot ({error})") from error
    return config


def _explain(error: ValidationError, origin: str) -> ConfigInvalid | ConfigImpossible:
    """One error for all problems of a file; contradictions are told only when each value by itself is fine."""
    problems = error.errors(include_url=False)
    invalid = [problem for problem in problems if problem["type"] != "value_error"]
    if invalid:
        lines: dict[str, str] = {}  # by key: a bad value of a union is reported once for each of its branches
        for problem in invalid:
            path = _key_path(problem)
            lines[path] = f"{lines[path]}, or {_expectation(problem)}" if path in lines else _sentence(problem)
        return ConfigInvalid(f"{origin}: " + "; ".join(lines.values()))
    return ConfigImpossible(f"{origin}: " + "; ".join(str(problem["ctx"]["error"]) for problem in problems))


def _sentence(problem: ErrorDetails) -> str:
    path, kind = _key_path(problem), problem["type"]
    if kind == "extra_forbidden":
        section, _, key = path.rpartition(".")
        return f"unknown key {path}{_did_you_mean(key, _known_keys(section))}"
    if kind == "missing":
        return f"{path} is missing"
    return f"{path} = {problem['input']!r} should be {_expectation(problem)}"


def _expectation(problem: ErrorDetails) -> str:
    """What pydantic wants, in the words of the file."""
    if problem["type"] == "model_type":
        return "a table"
    if problem["type"] == "string_pattern_mismatch":
        return f"text of the form {problem['ctx']['pattern']}"
    expected = problem.get("ctx", {}).get("expected")
    return str(expected) if expected else problem["msg"].partition(" should be ")[2] or problem["msg"]


def _key_path(problem: ErrorDetails) -> str:
    """The key as it is written in the file: without pydantic's names for the branches of a union."""
    parts: list[str] = []
    section: type[BaseModel] | None = RunConfig
    for part in problem["loc"]:
        parts.append(str(part))
        field = section.model_fields.get(str(part)) if section else None
        section = _section_type(field.annotation) if field else None
        if field and section is None and problem["type"] != "extra_forbidden":
            break
    return ".".join(parts) or "the file"


def _known_keys(section: str) -> list[str]:
    model: type[BaseModel] | None = RunConfig
    for part in filter(None, section.split(".")):
        model = _section_type(model.model_fields[part].annotation) if model else None
    return list(model.model_fields) if model else []


def _section_type(annotation: object) -> type[BaseModel] | None:
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


def _did_you_mean(word: str, known: list[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def _at(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    for part in path:
        values = values[part]
    return values
