"""JSON documents out of files: one object, a list of them, or one per line, each with its position.

Memory holds one object at a time: the current item of a list, or a single object without the lists that a format reads
item by item.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from typing import IO, Any

from moewh.ingest.traces.brackets import LONGEST, SPACE, item_texts, outline
from moewh.ingest.traces.numbers import take_arrays
from moewh.ingest.traces.trace import TraceFile
from moewh.warehouse.errors import MoewhError


def read_documents(
    file: TraceFile, arrays: Sequence[str] = (), lists: Sequence[str] = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (file and position, object) for every object of a `.json` or `.jsonl` file.

    The fields named in `arrays` are arrays where possible. If the file is one object, its fields named in `lists` are
    iterators if they hold objects; exhaust them before the next step. Raises the file's error, with the position, for
    what is not a JSON object.
    """
    try:
        with file.path.open("rb") as stream:
            start, first = _start(stream)
            if not first:
                raise file.error("is empty.")
            if first == b"[":
                yield from _items(file, stream, start, arrays)
            elif first != b"{":
                yield from _whole(file, stream)
            elif (found := outline(file, stream, start, lists)) and _is_last(stream, found.end):
                yield file.name, _with_lists(file, stream, _record(found.text, file, "document", arrays), found.lists)
            else:
                yield from _lines(file, stream, arrays)
    except OSError as error:
        raise file.error(f"cannot be read: {error.strerror or error}.") from error


def answer_of(document: dict[str, Any], where: str, file: TraceFile) -> dict[str, Any]:
    """Return the answer in a line of OpenAI's batch output, {custom_id, response: {body}, error}; others unchanged.

    Raises the file's error for a request that failed.
    """
    if "custom_id" not in document or "response" not in document:
        return document
    response = document["response"]
    body = response.get("body") if isinstance(response, dict) else None
    if document.get("error") is not None or not isinstance(body, dict):
        raise file.error(f"{where}: the request {document['custom_id']!r} failed. Leave its line out.")
    return body


def _start(stream: IO[bytes]) -> tuple[int, bytes]:
    """Return the offset of the first value and its first byte, which is empty for a file without any.

    A file in another encoding than UTF-8 begins with some other byte than a bracket.
    """
    offset = len(codecs.BOM_UTF8) if stream.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
    stream.seek(offset)
    while piece := stream.read(1 << 16):
        if rest := piece.lstrip(SPACE):
            offset += len(piece) - len(rest)
            stream.seek(offset)
            two = stream.read(2)
            return offset, b"\0" if two[1:] == b"\0" else two[:1]
        offset += len(piece)
    return offset, b""


def _items(
    file: TraceFile, stream: IO[bytes], start: int, arrays: Sequence[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the items of a file that is one list."""
    for number, text in enumerate(item_texts(file, stream, start)):
        yield f"{file.name}, item {number}", _record(text, file, f"item {number}", arrays)
    if not _is_last(stream, stream.tell()):
        raise file.error("its document is not JSON: something follows its list. Write one JSON object per line.")


def _with_lists(file: TraceFile, stream: IO[bytes], record: dict[str, Any], lists: dict[str, int]) -> dict[str, Any]:
    """Return an object with its lists, which were left out of its text."""

    def items(name: str, start: int) -> Iterator[dict[str, Any]]:
        for number, text in enumerate(item_texts(file, stream, start)):
            yield _record(text, file, f"{name} {number}", ())

    return record | {name: items(name, start) for name, start in lists.items()}


def _lines(file: TraceFile, stream: IO[bytes], arrays: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file with one per line, each with its place."""
    stream.seek(0)
    number = 0
    while line := stream.readline(LONGEST + 1):
        number += 1
        if line.strip():
            yield f"{file.name}, line {number}", _record(line, file, f"line {number}", arrays)


def _whole(file: TraceFile, stream: IO[bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the objects of a file that begins with no bracket: of another encoding, or not JSON at all."""
    stream.seek(0)
    data = stream.read(LONGEST + 1)
    try:
        value = _load(data, file, "document")
    except MoewhError:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise file.error("is UTF-16, as PowerShell writes it, and not one document. Save it as UTF-8.") from None
        raise
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield f"{file.name}, item {number}", _object(item, file, f"item {number}")
    else:
        yield file.name, _object(value, file, "document")


def _is_last(stream: IO[bytes], offset: int) -> bool:
    """Return whether only white space follows an offset."""
    stream.seek(offset)
    while piece := stream.read(1 << 16):
        if piece.strip(SPACE):
            return False
    return True


def _record(data: bytes, file: TraceFile, what: str, names: Sequence[str]) -> dict[str, Any]:
    """Parse an object; its fields called `names` become arrays where possible."""
    text, arrays = take_arrays(data, names) if names else (data, {})
    record = _object(_load(text, file, what), file, what)
    if any(record.get(name, "") is not None for name in arrays):  # the text quotes the field somewhere else
        return _object(_load(data, file, what), file, what)
    return record | arrays


def _load(data: bytes, file: TraceFile, what: str) -> Any:
    if len(data) > LONGEST:
        raise file.error(f"its {what} has more than {LONGEST >> 30} GiB. Write one JSON object per line.")
    try:
        return json.loads(data, object_pairs_hook=_distinct)
    except _TwiceError as twice:
        raise file.error(f"its {what} has the key {twice} twice. It is damaged.") from None
    except RecursionError:
        raise file.error(f"its {what} is nested too deeply.") from None
    except UnicodeDecodeError:
        if b"\0" in data:
            raise file.error(
                "is a binary file, not JSON. Check FORMAT; docs/import.md has each format's files."
            ) from None
        raise file.error(f"its {what} is not UTF-8.") from None
    except ValueError as error:
        raise file.error(f"its {what} is not JSON: {error}. The file may be cut off.") from None


class _TwiceError(Exception):
    """A key that an object has twice."""


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object. Raises _TwiceError for a key that it has twice, of which one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise _TwiceError(repr(max(names, key=names.count)))
    return found


def _object(value: Any, file: TraceFile, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise file.error(f"its {what} is not a JSON object.")
    return value
