"""docs/errors.md tells every code, and the error classes of all rooms use codes that exist."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from resbm_pb.errors_pb2 import ErrorCode

from node.errors import CodedError, as_event, describe

PAGE = Path(__file__).parents[3] / "docs" / "errors.md"
ROOMS = ("node.errors", "stage_server.errors", "coordinator.errors")


def documented() -> dict[int, tuple[str, str]]:
    """Code -> (name, paragraph) as the page has them."""
    sections = re.findall(r"^### E(\d+) (\w+)\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    return {int(number): (name, text.strip()) for number, name, text in sections}


def defined() -> dict[int, str]:
    """Code -> name as proto/errors.proto has them."""
    return {value: name.removeprefix("ERROR_CODE_") for name, value in ErrorCode.items() if value}


def error_classes() -> Iterator[type[Exception]]:
    for room in ROOMS:
        for value in vars(importlib.import_module(room)).values():
            if isinstance(value, type) and issubclass(value, Exception) and value.__module__ == room:
                yield value


def test_page_and_contract_name_the_same_codes() -> None:
    assert {code: name for code, (name, _) in documented().items()} == defined()


def test_page_is_in_order_of_the_codes() -> None:
    assert list(documented()) == sorted(documented())


@pytest.mark.parametrize("code", sorted(defined()))
def test_each_code_has_a_paragraph(code: int) -> None:
    assert len(documented()[code][1]) > 80


def test_error_classes_have_a_code_with_a_remedy() -> None:
    codes = defined()
    leaves = [kind for kind in error_classes() if not kind.__subclasses__()]
    assert len(leaves) > 30
    for kind in leaves:
        assert kind.code in codes, kind  # type: ignore[attr-defined]
        assert kind.remedy, kind  # type: ignore[attr-defined]


def test_errors_of_every_room_are_told_alike() -> None:
    for room, name in (("node", "ConfigInvalid"), ("stage_server", "WrongShape"), ("coordinator", "TicketInvalid")):
        error = getattr(importlib.import_module(f"{room}.errors"), name)("the cause")
        assert isinstance(error, CodedError)
        assert describe(error).splitlines() == [f"error E{error.code}: the cause", f"  remedy: {error.remedy}"]
        assert as_event(error) == {
            "event": "error",
            "code": int(error.code),
            "cause": "the cause",
            "remedy": error.remedy,
        }


def test_other_exceptions_are_no_coded_errors() -> None:
    assert not isinstance(ValueError("x"), CodedError)
