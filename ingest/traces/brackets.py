"""Large JSON documents by their brackets: a file in, the text of one item after the other out.

A file that is one document may be larger than memory, and a parser would make all of it. Its brackets alone say where
each item of a list ends, so items are read and parsed one by one. Brackets within texts do not count.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO

from moewh.ingest.traces.trace import TraceFile

SPACE = b" \t\r\n"
LONGEST = 1 << 30
"""Bytes of one item, one line, or what surrounds a document's lists."""
_PIECE = 1 << 20
"""Bytes searched at once."""
_DEEPEST = 900
"""Levels of nesting: about as many as Python's parser takes."""
_PLAIN = rb'[^\[\]{}"]*+'
_MARKS = re.compile(
    rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|\[%b(?:\[%b\]%b)*+\]|["\[\]{}]' % (_PLAIN, _PLAIN, _PLAIN), re.DOTALL
)
"""A whole text; a whole list of numbers, or of lists of them; otherwise a single quotation mark or bracket."""
_WITHIN_TEXT = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)
_KEY = re.compile(rb'"([^"\\]*)"\s*:\s*\Z')
_OPENING = {ord("]"): ord("["), ord("}"): ord("{")}


@dataclass(frozen=True)
class Outline:
    """An object without some of its lists, which are read separately."""

    text: bytes
    """The object as JSON, with null in place of these lists."""
    lists: dict[str, int]
    """Field → where its list begins."""
    end: int
    """Offset just after the object."""


def outline(file: TraceFile, stream: IO[bytes], start: int, names: Collection[str]) -> Outline:
    """Return the object that begins at an offset; its lists called `names` are left out if they hold objects.

    Raises the file's error for brackets that do not match, and for a list that occurs twice.
    """
    text, lists, kept, offset = bytearray(), dict[str, int](), start, start
    name: str | None = None
    with file.path.open("rb") as reading:
        for offset, byte, depth in _brackets(file, stream, start):
            if name is None and byte == ord("[") and depth == 2:
                text += _between(file, reading, kept, offset)
                kept = offset
                found = _KEY.search(text[-256:])
                field = "" if found is None else found[1].decode(errors="replace")
                if field in lists:
                    raise file.error(f"has {field} twice. It is damaged.")
                if field in names:
                    name = field
                    lists[field] = offset
            elif name is not None and depth == 1:
                text += b"null"
                kept, name = offset + 1, None
        text += _between(file, reading, kept, offset + 1)
    return Outline(bytes(text), lists, offset + 1)


def item_texts(file: TraceFile, stream: IO[bytes], start: int) -> Iterator[bytes]:
    """Yield the text of each item of the list that begins at an offset; all items must be containers.

    Afterwards the stream is just after the list.
    """
    with file.path.open("rb") as reading:
        number, behind = 0, start + 1
        for offset, byte, depth in _brackets(file, stream, start):
            if byte in _OPENING.values() and depth == 2:
                if _between(file, reading, behind, offset).strip(SPACE) != (b"," if number else b""):
                    raise file.error(f"its item {number} is not a JSON object, or there is no comma before it.")
                behind = offset
            elif depth == 1 and byte in _OPENING:
                behind, text = offset + 1, _between(file, reading, behind, offset + 1)
                yield text
                number += 1
            elif depth == 0:
                if _between(file, reading, behind, offset).strip(SPACE):
                    raise file.error(f"its item {number} is not a JSON object.")
                stream.seek(offset + 1)


def _brackets(file: TraceFile, stream: IO[bytes], start: int) -> Iterator[tuple[int, int, int]]:
    """Yield (offset, bracket, depth after it) for the container that begins at an offset, to its end.

    Lists of numbers, and lists of such lists, may be left out.
    """
    opened = bytearray()
    stream.seek(start)
    offset, held, in_text = start, b"", False
    while fresh := stream.read(_PIECE):
        piece = held + fresh
        at, held = 0, b""
        if in_text:
            at, held, in_text = _end_of_text(piece, 0)
        while not in_text and (mark := _MARKS.search(piece, at)):
            begin, at = mark.span()
            byte = piece[begin]
            if byte == ord('"'):
                if at - begin == 1:
                    at, held, in_text = _end_of_text(piece, at)
            elif at - begin == 1 or not opened:
                at = begin + 1
                _take_bracket(file, opened, byte, offset + begin)
                yield offset + begin, byte, len(opened)
                if not opened:
                    return
        offset += len(piece) - len(held)
    raise file.error("its document is not JSON: it ends before its last bracket. The file may be cut off.")


def _end_of_text(piece: bytes, at: int) -> tuple[int, bytes, bool]:
    """Find the end of a text that contains offset `at`.

    Returns the offset after it, the bytes to put before the next piece, and whether the text continues there.
    """
    within = _WITHIN_TEXT.match(piece, at)
    assert within is not None  # it also matches the empty string
    end = within.end()
    if piece[end : end + 1] == b'"':
        return end + 1, b"", False
    return len(piece), piece[end:], True  # a backslash whose next byte is in the next piece, or nothing


def _take_bracket(file: TraceFile, opened: bytearray, byte: int, offset: int) -> None:
    """Push or pop a bracket. Raises the file's error if it closes nothing, or if too many are open."""
    if byte not in _OPENING:
        opened.append(byte)
        if len(opened) > _DEEPEST:
            raise file.error("its document is nested too deeply.")
    elif not opened or opened.pop() != _OPENING[byte]:
        raise file.error(f"its document is not JSON: byte {offset:,} closes what is not open. The file may be damaged.")


def _between(file: TraceFile, reading: IO[bytes], start: int, end: int) -> bytes:
    if end - start > LONGEST:
        raise file.error(
            f"its document has more than {LONGEST >> 30} GiB in one piece. Write one JSON object per line."
        )
    reading.seek(start)
    return reading.read(end - start)
