"""Writes a pydantic model as commented TOML: each key with its meaning, so that the file explains itself.

Reading the text back gives an equal model.
"""

from __future__ import annotations

import enum
import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo

LINE_LENGTH = 110
"""Longer lines have their comment above the key."""


def commented(model: BaseModel, first: str = "") -> str:
    """The TOML text of `model`, with the description of each field as a comment at its key; key `first` leads."""
    return "\n".join(_section(model, (), first))


def _section(model: BaseModel, path: tuple[str, ...], first: str = "") -> list[str]:
    """The lines of one table: its own keys first, then the tables inside it."""
    lines, tables = [], []
    if path:
        doc = (type(model).__doc__ or "").strip().splitlines()[0]
        lines += [f"# {doc}", f"[{'.'.join(path)}]"]
    for name, field in sorted(type(model).model_fields.items(), key=lambda item: item[0] != first):
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            tables += _section(value, (*path, name))
        else:
            lines += _key(f"{name} = {toml_value(value)}", _comment(field))
    return [*lines, "", *tables]


def _key(assignment: str, comment: str) -> list[str]:
    line = f"{assignment}  # {comment}" if comment else assignment
    return [line] if len(line) <= LINE_LENGTH else [f"# {comment}", assignment]


def _comment(field: FieldInfo) -> str:
    words = field.description or ""
    allowed = [toml_value(value) for value in _choices(field.annotation)]
    if allowed:
        words = f"{' | '.join(allowed)}: {words}"
    return words


def _choices(annotation: object) -> list[Any]:
    """The values that a Literal, an enum or a union with one allows; none for open types."""
    origin = typing.get_origin(annotation)
    if origin is Literal:
        return list(typing.get_args(annotation))
    if origin in (typing.Union, types.UnionType):
        return [choice for part in typing.get_args(annotation) for choice in _choices(part)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return [member.value for member in annotation]
    return []


def toml_value(value: Any) -> str:
    """One value on one line. Raises TypeError for what TOML has no form for."""
    if isinstance(value, enum.Enum):
        return toml_value(value.value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{_bare(str(key))} = {toml_value(item)}" for key, item in value.items())
        return f"{{ {inside} }}" if inside else "{}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    raise TypeError(f"no TOML form for {type(value).__name__}")


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _string(key)


def _string(text: str) -> str:
    """A basic string: JSON's escapes are TOML's too, but for DEL, which TOML wants escaped."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
