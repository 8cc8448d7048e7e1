"""An answer's values as text, so that nothing is lost between DuckDB and a file.

In: an answer. Out: the same answer, with every column cast by DuckDB itself according to its type. Values that Python
cannot represent (TIMESTAMP WITH TIME ZONE, INTERVAL, years before 1) never become Python objects on the way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from moewh.warehouse.answer.query import Answer

if TYPE_CHECKING:
    import duckdb

Row = tuple[str | None, ...]
Cast = Callable[[str, Any], str]
"""Returns the SQL that casts a column, given the SQL that reads it and its type."""

INTEGERS = frozenset(
    f"{sign}{size}" for sign in ("", "u") for size in ("tinyint", "smallint", "integer", "bigint", "hugeint")
)
NUMBERS = INTEGERS | {"float", "double", "decimal"}
_NESTED = frozenset({"list", "array", "struct", "tuple", "map", "union", "variant"})
_DIGITS = 15
"""Decimal digits that every double preserves."""
_BATCH = 10_000
_ANSWER = "moewh_answer"
_BARE = re.compile(r'"(?:[^"\\]|\\.)*"|-?\b(?:nan|inf(?:inity)?)\b|[\r\n]+', re.IGNORECASE)
_MAYBE_BARE = re.compile(r"nan|inf|[\r\n]", re.IGNORECASE)


@dataclass(frozen=True)
class Column:
    """One column of an answer."""

    name: str
    type: duckdb.sqltypes.DuckDBPyType


def as_select(answer: Answer) -> Answer:
    """Return the answer with a statement that can be a subquery; one that cannot (EXPLAIN) is run into a table."""
    import duckdb

    from moewh.warehouse.answer.jail import without_semicolon

    if isinstance(answer.statement, str):
        return answer
    if answer.statement.type == duckdb.StatementType.SELECT:
        return Answer(answer.connection, without_semicolon(answer.statement.query), answer.values)
    answer.relation().create(_ANSWER)
    return Answer(answer.connection, f"from {_ANSWER}", {})


def columns_of(answer: Answer) -> list[Column]:
    """Return the columns of an answer from `as_select` without running it. Their names are unique, ignoring case."""
    sql = f"select * from ({answer.statement}\n) limit 0"
    cursor = answer.connection.execute(sql, dict(answer.values))
    columns = [Column(name, kind) for name, kind, *_ in cursor.description or ()]
    cursor.fetchall()
    return columns


def converted(answer: Answer, columns: Sequence[Column], cast: Cast) -> Answer:
    """Return an answer from `as_select` with `cast` applied to each of its columns."""
    expressions = [f"c{number}" for number in range(len(columns))]
    items = ", ".join(
        f"{cast(expression, column.type)} as {_quoted(column.name)}"
        for expression, column in zip(expressions, columns, strict=True)
    )
    source = f"select * from ({answer.statement}\n)"  # DuckDB renames duplicate columns here
    return Answer(
        answer.connection, f"select {items} from ({source}) as answer({', '.join(expressions)})", dict(answer.values)
    )


def rows_of(answer: Answer) -> Iterator[tuple[Any, ...]]:
    """Run an answer and yield its rows, with one batch in memory at a time."""
    cursor = answer.execute()
    while batch := cursor.fetchmany(_BATCH):
        yield from batch


def text_rows(answer: Answer) -> tuple[list[Column], Iterator[Row]]:
    """Return an answer's columns, and its rows converted by `as_text`; NULL is None."""
    answer = as_select(answer)
    columns = columns_of(answer)
    rows = rows_of(converted(answer, columns, as_text))
    return columns, (_finished(row, columns) for row in rows) if any(map(_is_nested, columns)) else rows


def text_and_json_rows(answer: Answer) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """Yield each row as two dicts by column: its texts, with NULL as `NULL`, and its values as JSON types."""
    answer = as_select(answer)
    if not _has_rows(answer):  # as nearly always: then the columns need not be known
        return
    columns = columns_of(answer)
    names = [column.name for column in columns]
    pairs = converted(answer, columns, lambda sql, kind: f"[{as_text(sql, kind)}, {as_json(sql, kind)}]")
    for row in rows_of(pairs):
        texts, values = zip(*row, strict=True)
        shown = ["NULL" if text is None else text for text in _finished(texts, columns)]
        parsed = [None if value is None else json.loads(strict_json(value)) for value in values]
        yield dict(zip(names, shown, strict=True)), dict(zip(names, parsed, strict=True))


def _has_rows(answer: Answer) -> bool:
    """Return whether an answer from `as_select` has rows. Without any, all values were computed: no error is missed."""
    first = replace(answer, statement=f"select columns(*)::varchar from ({answer.statement}\n) limit 1")
    return first.execute().fetchone() is not None


def _finished(row: Row, columns: Sequence[Column]) -> Row:
    """Convert the cells with JSON text to strict JSON."""
    return tuple(
        strict_json(cell) if cell is not None and _is_nested(column) else cell
        for cell, column in zip(row, columns, strict=True)
    )


def _is_nested(column: Column) -> bool:
    return column.type.id in _NESTED


def as_text(expression: str, kind: Any) -> str:
    """Return SQL for a value as text that casts back to its type; nested values are JSON for `strict_json`."""
    if kind.id in _NESTED:
        return as_json(expression, kind)
    if kind.id == "float":  # all digits: a reader that parses '0.1' as a double gets another number
        return f"{expression}::double::varchar"
    return f"{expression}::varchar"


def as_shown(expression: str, kind: Any) -> str:  # noqa: ARG001 - a Cast
    """Return SQL for a value as DuckDB shows it; nested values are in DuckDB's notation."""
    return f"{expression}::varchar"


def as_json(expression: str, kind: Any) -> str:
    """Return SQL for a value as JSON text, except `NaN`, `Infinity` and line ends, which `strict_json` fixes.

    Integers, doubles and decimals of up to 15 digits are numbers, BOOLEAN is true or false, JSON is unchanged, and
    every other value is a string that casts back to its type.
    """
    if str(kind) == "JSON":  # to_json would convert its numbers to doubles
        return f"{expression}::varchar"
    return f"to_json({expression}::{_json_type(kind)})::varchar"


def strict_json(text: str) -> str:
    """Return JSON text on one line, with NaN and infinities as the strings "nan", "inf" and "-inf"."""
    return _BARE.sub(_mended, text) if _MAYBE_BARE.search(text) else text


def _mended(match: re.Match[str]) -> str:
    found = match[0]
    if found[0] == '"':
        return found
    return f'"{found.lower().replace("inity", "")}"' if found.strip() else " "


def as_parquet(integers: str) -> Cast:
    """Return a cast to types that Parquet preserves; 128-bit integers become `integers`."""

    def leaf(kind: Any) -> str:
        if kind.id in ("hugeint", "uhugeint"):
            return integers
        # Parquet has only UTC times, only millisecond intervals, and no struct without fields.
        return "VARCHAR" if kind.id in ("time with time zone", "interval", "struct") else str(kind)

    def cast(expression: str, kind: Any) -> str:
        target = _rebuilt(kind, leaf, arrays=False)  # pyarrow cannot read a column of DuckDB arrays with a NULL
        return expression if target == _rebuilt(kind, str) else f"{expression}::{target}"

    return cast


def holds_large_integers(kind: Any) -> bool:
    """Return whether a type is, or contains, a 128-bit integer."""
    return "HUGEINT" in _rebuilt(kind, lambda leaf: "HUGEINT" if leaf.id in ("hugeint", "uhugeint") else "INTEGER")


def _json_type(kind: Any) -> str:
    """Return the type whose `to_json` preserves every digit of a value."""

    def leaf(kind: Any) -> str:
        if kind.id in INTEGERS or kind.id == "boolean" or str(kind) == "JSON":
            return str(kind)
        if kind.id in ("float", "double"):
            return "DOUBLE"
        if kind.id == "decimal" and dict(kind.children)["precision"] <= _DIGITS:
            return str(kind)
        if kind.id == "variant":
            return "JSON"
        return str(kind) if kind.id == "struct" else "VARCHAR"

    return _rebuilt(kind, leaf)


def _rebuilt(kind: Any, leaf: Callable[[Any], str], *, arrays: bool = True) -> str:
    """Return a type as SQL, with `leaf` applied to each type that has no inner type, including a struct without fields.

    Without `arrays`, fixed-length lists become ordinary lists.
    """
    if kind.id not in _NESTED - {"variant"}:
        return leaf(kind)
    children = (
        [(name, child) for name, child in kind.children if name != "size"] if kind.id == "array" else kind.children
    )
    if kind.id == "union":
        children = children[1:]  # the first is the tag
    inner = [_rebuilt(child, leaf, arrays=arrays) for _, child in children]
    match kind.id:
        case "list":
            return f"{inner[0]}[]"
        case "array":
            return f"{inner[0]}[{dict(kind.children)['size'] if arrays else ''}]"
        case "map" | "tuple":
            return f"{kind.id}({', '.join(inner)})"
    if not children:
        return leaf(kind)
    names = [name or f"element{number}" for number, (name, _) in enumerate(children, 1)]  # tuples of 1.5 have no names
    return f"{kind.id}({', '.join(f'{_quoted(name)} {part}' for name, part in zip(names, inner, strict=True))})"


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
