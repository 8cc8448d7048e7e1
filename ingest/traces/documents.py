"""JSON documents out of files: one object, a list of them, or one a line, each with where it stands."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from moewh.ingest.traces.numbers import take_arrays
from moewh.ingest.traces.trace import TraceFile

_LONGEST = 1 << 30
"""Bytes of one document, or one line."""


def read_documents(file: TraceFile, arrays: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and position, object) for every object of a `.json` or `.jsonl` file.

    Of a file with an object per line, the fields called `arrays` come as arrays where they can. Raises the file's
    error, with the line, for what is no JSON object.
    """
    try:
        with file.path.open("rb") as stream:
            first = stream.readline(_LONGEST + 1)
            if not first.strip():
                raise file.error("is empty.")
            if not stream.peek(1).strip() or _is_part(first):
                yield from _one_document(file, first + stream.read(_LONGEST + 1))
                return
            yield f"{file.name}, line 1", _line(first, file, 1, arrays)
            number = 1
            while line := stream.readline(_LONGEST + 1):
                number += 1
                if line.strip():
                    yield f"{file.name}, line {number}", _line(line, file, number, arrays)
    except OSError as error:
        raise file.error(f"cannot be read: {error.strerror or error}.") from error


def _one_document(file: TraceFile, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file that is one JSON value."""
    value = _load(data, file, "document")
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield f"{file.name}, item {index}", _object(item, file, f"item {index}")
    else:
        yield file.name, _object(value, file, "document")


def _is_part(line: bytes) -> bool:
    """Tell whether a line is no JSON value by itself, but may begin one."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _line(data: bytes, file: TraceFile, number: int, names: Sequence[str]) -> dict[str, Any]:
    text, arrays = take_arrays(data, names) if names else (data, {})
    record = _object(_load(text, file, f"line {number}"), file, f"line {number}")
    if any(record.get(name, "") is not None for name in arrays):  # the text quotes the field somewhere else
        return _object(_load(data, file, f"line {number}"), file, f"line {number}")
    return record | arrays


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
