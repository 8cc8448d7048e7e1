"""PIVOT without an IN list: its columns are looked up first, so that what runs is one read-only query.

DuckDB itself splits such a PIVOT into two statements: one that creates an enum type of the values, and the query. Here
this is explicit. `name_pivots` gives each `ON` expression the name of a future type, so that the whole query can be
checked. A second, also checked, query then finds the values, and `make_types` creates the types. As in DuckDB, the
values are cast to text and the columns are in the order of that text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from moewh.warehouse.errors import UsageError

if TYPE_CHECKING:
    import duckdb

_PIVOT = frozenset({"PIVOT", "PIVOT_WIDER"})
_QUERY = frozenset({"SELECT", "FROM", "WITH", "PIVOT", "PIVOT_WIDER", "("})
"""Words that can start a query with a PIVOT."""
_ENDS = frozenset({"USING", "GROUP", "ORDER", "LIMIT", "OFFSET", "UNION", "EXCEPT", "INTERSECT", ";"})
"""Words that end the list of a PIVOT's ON expressions."""
_OPEN, _CLOSE = frozenset({"(", "[", "{", "CASE"}), frozenset({")", "]", "}", "END"})
_TEMPLATE = "select 1 as value from range(1)"


@dataclass(frozen=True)
class Pivots:
    """SQL in which every pivot has an IN list or a type; `types` names the added types."""

    sql: str
    types: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Token:
    word: str
    """A word or bracket in upper case; for any other token, its first character."""
    at: int
    """Offset in the SQL's bytes."""


def name_pivots(connection: duckdb.DuckDBPyConnection, source: str, sql: str, *, unsafe: bool = False) -> Pivots:
    """Return SQL in which every PIVOT's ON expression has its values: a list, or `IN` a type that `make_types` creates.

    Raises UsageError, naming `source`, for any other PIVOT. With `unsafe`, SQL that is not a query is left unchanged.
    """
    if re.search("pivot", sql, re.IGNORECASE) is None:
        return Pivots(sql)
    tree = serialised(connection, sql)
    tokens = _tokens(sql)
    if tree is None or not tree["error"] or not any(token.word in _PIVOT for token in tokens):
        return Pivots(sql)
    spans = sorted(set(_expressions(tokens)), key=lambda span: span[1])
    types = tuple(f"moewh_pivot_{os.urandom(6).hex()}" for _ in spans)
    named = _with_types(sql, spans, types)
    if sorted(pivot["pivot_enum"] for pivot, *_ in _pivots(serialised(connection, named))) == sorted(types) != []:
        return Pivots(named, types)
    if unsafe and tokens[0].word not in _QUERY:
        return Pivots(sql)
    raise UsageError(
        f"{source} has a PIVOT whose columns moewh cannot determine. Remove IN, or list values after it, as in "
        "`on expert in (0, 1, 2)`."
    )


def _with_types(sql: str, spans: list[tuple[int, int]], types: tuple[str, ...]) -> str:
    """Return SQL with `IN` a type after each expression, which is put in brackets so that it may be any expression."""
    text = sql.encode()
    edits = [(start, b" (") for start, _ in spans]
    edits += [(stop, f'\n) in "{name}" '.encode()) for (_, stop), name in zip(spans, types, strict=True)]
    for at, what in sorted(edits, key=lambda edit: -edit[0]):
        text = text[:at] + what + text[at:]
    return text.decode()


def make_types(
    connection: duckdb.DuckDBPyConnection,
    pivots: Pivots,
    values: Mapping[str, Any],
    look_into: Callable[[str], str],
) -> None:
    """Create each type from the values in its PIVOT's source, found by a query that `look_into` checks.

    Raises UsageError for more columns than DuckDB's `pivot_limit`.
    """
    if not pivots.types:
        return
    ((limit,),) = connection.execute("select current_setting('pivot_limit')::bigint").fetchall()
    found = {
        pivot["pivot_enum"]: (pivot, source, ctes)
        for pivot, source, ctes in _pivots(serialised(connection, pivots.sql))
    }
    for name in pivots.types:  # in text order: a PIVOT's source comes before its expressions
        query = look_into(_values_query(connection, *found[name]))
        bound = connection.extract_statements(query)[0].named_parameters
        rows = connection.execute(
            f"select distinct value::varchar as value from ({query}) where value is not null order by value",
            {parameter: values[parameter] for parameter in bound},
        ).fetchmany(limit + 1)
        if len(rows) > limit:
            raise UsageError(f"a PIVOT would have more than {limit:,} columns. Give its ON expression an IN list.")
        make_type(connection, name, [value for (value,) in rows])


def make_type(connection: duckdb.DuckDBPyConnection, name: str, labels: list[str]) -> None:
    """Create one enum type, which may have no labels."""
    listed = ", ".join("'" + label.replace("'", "''") + "'" for label in labels) or "select '' where false"
    connection.execute(f'create temporary type "{name}" as enum ({listed})')


def serialised(connection: duckdb.DuckDBPyConnection, sql: str) -> dict[str, Any] | None:
    """Return DuckDB's parse tree of a query; a tree with an error if it is not a query; None if it cannot be parsed."""
    import duckdb

    try:
        answer = connection.execute("select json_serialize_sql($sql)", {"sql": sql}).fetchall()
    except duckdb.ParserException:
        return None
    tree: dict[str, Any] = json.loads(answer[0][0])
    return tree


def _values_query(
    connection: duckdb.DuckDBPyConnection, pivot: dict[str, Any], source: dict[str, Any], ctes: list[Any]
) -> str:
    """Return SQL for the values of a pivot's expression over its source, with the CTEs in scope."""
    (expression,) = pivot["pivot_expressions"]
    tree = serialised(connection, _TEMPLATE)
    assert tree is not None
    node = tree["statements"][0]["node"]
    node["select_list"] = [expression | {"alias": "value"}]
    node["from_table"] = source
    node["cte_map"] = {"map": ctes}
    ((sql,),) = connection.execute("select json_deserialize_sql($tree::json)", {"tree": json.dumps(tree)}).fetchall()
    return str(sql)


def _pivots(node: Any, ctes: tuple[Any, ...] = ()) -> Iterator[tuple[dict[str, Any], dict[str, Any], list[Any]]]:
    """Yield each ON expression that names a type, with its PIVOT's source and the CTEs in scope."""
    if isinstance(node, list):
        for child in node:
            yield from _pivots(child, ctes)
    elif isinstance(node, dict):
        for cte in node.get("cte_map", {}).get("map", []):
            yield from _pivots(cte["value"], ctes)
            ctes = (*(other for other in ctes if other["key"] != cte["key"]), cte)
        if node.get("type") == "PIVOT":
            for pivot in node["pivots"]:
                if pivot["pivot_enum"] and len(pivot["pivot_expressions"]) == 1:
                    yield pivot, node["source"], list(ctes)
        for name, child in node.items():
            if name != "cte_map":
                yield from _pivots(child, ctes)


def _tokens(sql: str) -> list[_Token]:
    import duckdb

    text, tokens = sql.encode(), []
    for at, kind in duckdb.tokenize(sql):
        if kind == duckdb.token_type.comment:
            continue
        word = re.match(rb"[A-Za-z_][A-Za-z0-9_]*", text[at:]) if kind != duckdb.token_type.string_const else None
        tokens.append(_Token(word[0].decode().upper() if word else chr(text[at]), at))
    return [*tokens, _Token("", len(text))]


def _expressions(tokens: list[_Token]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of each ON expression without IN, for every PIVOT in the text."""
    for number, token in enumerate(tokens):
        if token.word in _PIVOT:
            yield from _without_in(list(_level(tokens[number + 1 :])))


def _level(tokens: list[_Token]) -> Iterator[_Token]:
    """Yield the tokens up to the bracket that closes the first token's level, without those in nested brackets."""
    depth = 0
    for token in tokens:
        depth -= token.word in _CLOSE
        if depth == 0 or token.word == "":
            yield token
        if depth < 0 or token.word == "":
            return
        depth += token.word in _OPEN


def _without_in(level: list[_Token]) -> Iterator[tuple[int, int]]:
    """Yield the bounds of the expressions after the last ON of a level; earlier ONs belong to joins."""
    ons = [number for number, token in enumerate(level) if token.word == "ON"]
    if not ons:
        return
    listed = level[ons[-1] + 1 :]
    stop = next((number for number, token in enumerate(listed) if token.word in _ENDS), len(listed) - 1)
    cuts = [-1, *(number for number, token in enumerate(listed[:stop]) if token.word == ","), stop]
    for before, after in pairwise(cuts):
        if after > before + 1 and all(token.word != "IN" for token in listed[before + 1 : after]):
            yield listed[before + 1].at, listed[after].at
