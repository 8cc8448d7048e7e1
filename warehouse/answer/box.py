"""Tables in the style of DuckDB's box: complete, or cut to fit a terminal.

DuckDB's own box stops at 10,000 rows and does not report how many it left out. Here a complete table is drawn in two
passes over its rows: the first finds the widths, and many rows are kept in a file in between.
"""

from __future__ import annotations

import marshal
import re
import tempfile
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import IO, TextIO

from moewh.warehouse.answer.texts import NUMBERS, Column, Row
from moewh.warehouse.errors import escaped

_IN_MEMORY = 64 << 20
"""Bytes of rows that are kept in memory; beyond this they go to a file."""
_BATCH = 10_000
SHOWN = 40
"""Rows shown on a terminal."""
LIMIT = 10_000
"""Rows are counted up to this number on a terminal."""
_LEAST = 20
"""On a terminal, columns are narrowed to this many characters before any is left out."""
_INTEGER_NAMES = {
    f"{sign}{size}INT": f"{'u' if sign else ''}int{bits}"
    for sign in ("", "U")
    for size, bits in {"TINY": 8, "SMALL": 16, "BIG": 64, "HUGE": 128}.items()
} | {"INTEGER": "int32", "UINTEGER": "uint32"}
_LISTS = re.compile(r"(?:\[\d*\])+$")


def write_whole(columns: Sequence[Column], rows: Iterable[Row], stream: TextIO) -> int:
    """Write every row and column, with no cell cut. Returns the number of rows."""
    heads = _heads(columns)
    widths = [max(map(width_of, head)) for head in heads]
    with tempfile.SpooledTemporaryFile(_IN_MEMORY) as spool:
        count = 0
        waiting = iter(rows)
        while batch := [[_cell(value) for value in row] for row in islice(waiting, _BATCH)]:
            widths = [
                max(width, *map(width_of, cells)) for width, cells in zip(widths, zip(*batch, strict=True), strict=True)
            ]
            marshal.dump(batch, spool)
            count += len(batch)
        spool.seek(0)
        for line in _drawn(heads, _right_aligned(columns), widths, _loaded(spool, count)):
            stream.write(f"{line}\n")
    if not count or count >= 10:
        stream.write(f"  {_count(count, 'row')}; {_count(len(columns), 'column')}\n")
    return count


def write_cut(columns: Sequence[Column], rows: Sequence[Row], room: int, stream: TextIO) -> None:
    """Write what fits in `room` characters per line and SHOWN rows, and a line that reports what is left out.

    `rows` holds all rows, or the first LIMIT + 1 if there are more.
    """
    head, tail, notes = _cut_rows(len(rows))
    heads = _heads(columns)
    body = [[_cell(value) for value in row] for row in (*rows[:head], *rows[len(rows) - tail :])]
    full = [max(map(width_of, texts)) for texts in zip(*zip(*heads, strict=True), *body, strict=True)]
    kept, widest = _fit(full, room)
    heads = [(_shortened(heads[index][0], widest), _shortened(heads[index][1], widest)) for index in kept]
    body = [[_shortened(cells[index], widest) for index in kept] for cells in body]
    widths = [min(full[index], widest) for index in kept]
    right_aligned = [_right_aligned(columns)[index] for index in kept]
    if len(kept) < len(columns):
        notes.append(f"{len(kept)} of {len(columns)} columns")
        gap = (len(kept) + 1) // 2  # position of the left-out columns
        for row in body:
            row.insert(gap, "…")
        heads.insert(gap, ("…", "…"))
        widths.insert(gap, 1)
        right_aligned.insert(gap, False)
    if any(full[index] > widest for index in kept):
        notes.append(f"cells cut to {widest} characters")
    if head < len(rows):
        body[head:head] = [["·"] * len(widths)] * 3
    for line in _drawn(heads, right_aligned, widths, body):
        stream.write(f"{line}\n")
    if notes:
        stream.write(f"  {'; '.join(notes)}. Use a pipe or -o FILE for all.\n")
    elif not rows:
        stream.write("  0 rows\n")


def _cut_rows(count: int) -> tuple[int, int, list[str]]:
    """Return how many first and last rows are shown, and a note on the others."""
    if count <= SHOWN:
        return count, 0, []
    if count <= LIMIT:
        return SHOWN // 2, SHOWN // 2, [f"{SHOWN} of {count:,} rows"]
    return SHOWN, 0, [f"{SHOWN} of more than {LIMIT:,} rows"]


def _fit(widths: Sequence[int], room: int) -> tuple[list[int], int]:
    """Return the indices of the columns that are shown in `room` characters per line, and the maximum cell width."""
    kept = list(range(len(widths)))
    while True:
        gap = 4 if len(kept) < len(widths) else 0  # the column that replaces those left out
        free = room - 1 - gap - 3 * len(kept)
        widest = _level([widths[index] for index in kept], free)
        if widest >= _LEAST or len(kept) == 1:
            return kept, max(widest, 2)
        del kept[len(kept) // 2]


def _level(widths: Sequence[int], free: int) -> int:
    """Return the largest cell width at which the columns fit in `free` characters."""
    rest = sorted(widths)
    for number, width in enumerate(rest):
        if width * (len(rest) - number) > free:
            return free // (len(rest) - number)
        free -= width
    return max(*widths, _LEAST)


def _heads(columns: Sequence[Column]) -> list[tuple[str, str]]:
    return [(_cell(column.name), _cell(_type_name(column.type))) for column in columns]


def _right_aligned(columns: Sequence[Column]) -> list[bool]:
    return [column.type.id in NUMBERS for column in columns]


def _drawn(
    heads: Sequence[tuple[str, str]],
    right_aligned: Sequence[bool],
    widths: Sequence[int],
    rows: Iterable[Sequence[str]],
) -> Iterator[str]:
    """Yield the lines of a box."""
    bars = ["─" * (width + 2) for width in widths]
    yield f"┌{'┬'.join(bars)}┐"
    for texts in zip(*heads, strict=True):
        yield f"│{'│'.join(f' {_centred(text, width)} ' for text, width in zip(texts, widths, strict=True))}│"
    first = True
    for row in rows:
        if first:
            yield f"├{'┼'.join(bars)}┤"
            first = False
        yield f"│{'│'.join(f' {_padded(*cell)} ' for cell in zip(row, widths, right_aligned, strict=True))}│"
    yield f"└{'┴'.join(bars)}┘"


def _loaded(spool: IO[bytes], count: int) -> Iterator[list[str]]:
    for _ in range(0, count, _BATCH):
        yield from marshal.load(spool)


def _padded(text: str, width: int, right: bool) -> str:
    gap = " " * (width - width_of(text))
    return gap + text if right else text + gap


def _centred(text: str, width: int) -> str:
    gap = width - width_of(text)
    return f"{' ' * (gap // 2)}{text}{' ' * (gap - gap // 2)}"


def _shortened(text: str, width: int) -> str:
    if width_of(text) <= width:
        return text
    while width_of(text) > width - 1:
        text = text[: max(width - 1, 0)] if len(text) > width - 1 else text[:-1]
    return f"{text}…"


def _cell(value: str | None) -> str:
    return "NULL" if value is None else escaped(value)


def width_of(text: str) -> int:
    """Return how many terminal columns a text takes."""
    if text.isascii():
        return len(text)
    return sum(_character_width(character) for character in text)


def _character_width(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _type_name(kind: object) -> str:
    """Return a type's name as in DuckDB's box: int32 for INTEGER, enum without its values."""
    name = str(kind)
    lists = "".join(_LISTS.findall(name))
    name = name.removesuffix(lists)
    if name.startswith("ENUM("):
        return f"enum{lists}"
    return _INTEGER_NAMES.get(name, name.lower().strip('"')) + lists
