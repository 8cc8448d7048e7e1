"""JSON documents out of files: one object, a list of them, or one a line, each with where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from moewh.ingest.traces.trace import TraceFile

_LONGEST = 1 << 30
"""Bytes of one document, or one line."""


def read_documents(file: TraceFile) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and position, object) for every object of a `.json` or `.jsonl` file.

    Raises the file's error, with the line, for what is no JSON object.
    """
    try:
        with file.path.open("rb") as stream:
            first = stream.readline(_LONGEST + 1)
            if not first.strip():
                raise file.error("is empty.")
            if (only := _parsed(first)) is None or stream.peek(1).strip() == b"":
                yield from _one_document(file, first + stream.read(_LONGEST + 1), only)
                return
            yield f"{file.name}, line 1", _object(only, file, "line 1")
            number = 1
            while line := stream.readline(_LONGEST + 1):
                number += 1
                if line.strip():
                    yield (
                        f"{file.name}, line {number}",
                        _object(_load(line, file, f"line {number}"), file, f"line {number}"),
                    )
    except OSError as error:
        raise file.error(f"cannot be read: {error.strerror or error}.") from error


def _one_document(file: TraceFile, data: bytes, parsed: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file that is one JSON value."""
    value = _load(data, file, "document") if parsed is None else parsed
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield f"{file.name}, item {place}", _object(item, file, f"item {place}")
    else:
        yield file.name, _object(value, file, "document")


def _parsed(line: bytes) -> Any:
    """Return the JSON value that a line is; None if it is only the beginning of one."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _load(data: bytes, file: TraceFile, what: str) -> Any:
    if len(data) > _LONGEST:
        raise file.error(f"its {what} has more than {_LONGEST >> 30} GiB. Write one JSON object per line.")
    try:
        return json.loads(data)
    except RecursionError:
        raise file.error(f"its {what} is nested too deeply.") from None
    except UnicodeDecodeError:
        raise file.error(f"its {what} is not UTF-8.") from None
    except ValueError as error:
        raise file.error(f"its {what} is no JSON: {error}. The file may be cut off.") from None


def _object(value: Any, file: TraceFile, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise file.error(f"its {what} is no JSON object.")
    return value
