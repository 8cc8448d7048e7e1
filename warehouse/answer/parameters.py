"""Types of a query's parameters: the type comes from the parameter, never from how a value is spelled.

A query declares its parameters in its header as `name (kind): meaning`, one per line; every shipped query does. In a
user's own SQL, a parameter that is compared only with a run_id, series, domain, layer or expert has that kind. Any
other is a number if DuckDB casts it to one everywhere, and text otherwise: 2.10 never becomes 2.1 in a text comparison.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from moewh.warehouse.answer.placement import placement_text
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.errors import UsageError, brief

if TYPE_CHECKING:
    import duckdb


@dataclass(frozen=True)
class Kind:
    """The kind of a parameter: the type of its values, and their valid form."""

    type: Literal["VARCHAR", "INTEGER", "DOUBLE"]
    wants: str = "a text"
    least: float = -math.inf
    most: float = math.inf
    ids: bool = False
    """True for a text of whole numbers separated by commas."""
    placement: bool = False
    """True for a placement of experts, or the path of its file."""


_INT32 = 2**31 - 1
KINDS = {
    "run": Kind("VARCHAR"),
    "run of the same experts": Kind("VARCHAR"),
    "run of the same tokens": Kind("VARCHAR"),
    "complete run of the same tokens": Kind("VARCHAR"),
    "series": Kind("VARCHAR"),
    "domain": Kind("VARCHAR"),
    "token": Kind("VARCHAR"),
    "text": Kind("VARCHAR"),
    "prompt ids": Kind("VARCHAR", "a list of whole numbers such as 3,17,256", ids=True),
    "token ids": Kind("VARCHAR", "a list of whole numbers such as 3,17,256", ids=True),
    "placement": Kind("VARCHAR", "the name of a Parquet or JSON file", placement=True),
    "layer": Kind("INTEGER", "a whole number", -_INT32, _INT32),
    "expert": Kind("INTEGER", "a whole number", -_INT32, _INT32),
    "count": Kind("INTEGER", f"a whole number from 0 to {_INT32}", 0, _INT32),
    "whole number": Kind("INTEGER", f"a whole number from {-_INT32} to {_INT32}", -_INT32, _INT32),
    "share": Kind("DOUBLE", "a number from 0 to 1", 0, 1),
    "ratio": Kind("DOUBLE", "a number from 0", 0),
    "number": Kind("DOUBLE", "a number"),
}
COLUMNS = {"run_id": "run", "series": "series", "domain": "domain", "layer": "layer", "expert": "expert"}
"""Columns of the views, and the kind of a parameter that a user's own SQL compares with them."""

_DECLARED = r"(?m)(?:^|[Pp]arameters:)[ \t]*(\w+)[ \t]*\(([^)\n]*)\)[ \t]*(?::|$)"
_WHOLE = r"[+-]?[0-9]{1,38}"
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_IDS = r"\s*[0-9]{1,18}\s*(,\s*[0-9]{1,18}\s*)*"
_NUMERIC = re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?|FLOAT|DOUBLE|DECIMAL")
_MARK = "moewh:a value"
_CAST = r"(?:\s*::\s*\w+\b)*"
_OPERATORS = r"-+*/%|&^~"
_ALONE = rf"(?:^|(?<=\w)\s|[^{_OPERATORS}\w\s.])\s*"
"""What stands before the first operand of a comparison that is not part of a larger expression (`1 + layer = $x`)."""
_COMPLETE = rf"(?!\s*[{_OPERATORS}:\[(.])"
"""What follows the second operand of such a comparison."""


def kinds_of(query: Query) -> dict[str, str]:
    """Return the kind of each parameter that the header declares.

    For a user's own SQL, also those inferred from comparisons, and those declared by the staging views that it reads.
    """
    declared = _declared(query.header)
    if query.shipped:
        return declared
    staged = {name: kind for view in query.staging for name, kind in _declared(view.header).items()}
    return {**staged, **compared_kinds(query), **declared}


def _declared(header: str) -> dict[str, str]:
    return {name: kind for name, kind in _declarations(header) if kind in KINDS}


def _declarations(header: str) -> list[tuple[str, str]]:
    """Return each name and the word in parentheses after it, from where the header mentions parameters."""
    begins = re.search("parameters", header, re.IGNORECASE)
    return re.findall(_DECLARED, header[begins.start() :]) if begins else []


def check_declared(query: Query, names: AbstractSet[str]) -> None:
    """Raise UsageError if a user's header declares one of its parameters with a kind that does not exist."""
    for name, kind in _declarations(query.header):
        if name in names and kind not in KINDS:
            raise UsageError(
                f"{query.source} declares {name} ({kind}), which is not a kind. Kinds: {', '.join(KINDS)}."
            )


def compared_kinds(query: Query) -> dict[str, str]:
    """Return the kind of each parameter whose every use is a comparison with one of COLUMNS by `=` or `in (…)`.

    Tests for null are ignored. A parameter or column inside a larger expression (`layer = $x + 1`) is no such use.
    """
    found = {}
    for name in {*query.variables, *re.findall(r"\$(\w+)", query.code)}:
        value = _reference(name)
        for column, kind in COLUMNS.items():
            whole = rf'(?:(?:\w+|"[^"]*")\.)*{column}'
            equal = rf"{_ALONE}(?:{whole}\s*=\s*{value}{_CAST}|{value}{_CAST}\s*=\s*{whole}\b){_COMPLETE}"
            equal += rf"|{_ALONE}{whole}\s+in\s*\((?:(?:[^()]|\('\w+'\))*,)?\s*{value}\s*(?=[,)])"
            without = re.sub(rf"(?i){value}\s+is\s+(?:not\s+)?null", "", query.code)
            others = re.sub(rf"(?i){equal}", "", without)
            if others != without and not re.search(rf"(?i){value}", others):
                found[name] = kind
    return found


def typed(query: Query, kinds: Mapping[str, str], values: Mapping[str, Value]) -> dict[str, Value]:
    """Return the values in the types of their parameters.

    Raises UsageError for a value that does not fit its type, UnicodeEncodeError for a text that is not Unicode.

    Values of a shipped query's parameters without a kind are unchanged: moewh's own code sets them.
    """
    numbers = {} if query.shipped else numeric_parameters(query, {*filter(_may_be_number(kinds, values), values)})
    made: dict[str, Value] = {}
    for name, value in values.items():
        if name in kinds:
            made[name] = _of_kind(name, KINDS[kinds[name]], value)
        else:
            made[name] = _number(name, value) if name in numbers and isinstance(value, str) else value
        if numbers.get(name) == {"FLOAT"}:
            made[name] = _single(made[name])
    for text in made.values():
        if isinstance(text, str):
            text.encode()  # a text that is not Unicode is named by the error
    return made


def _may_be_number(kinds: Mapping[str, str], values: Mapping[str, Value]) -> Callable[[str], bool]:
    """Return whether a parameter's value is a text that its use may make a number, and of which precision."""
    return lambda name: isinstance(values[name], str) and (name not in kinds or KINDS[kinds[name]].type == "DOUBLE")


def _single(value: Value) -> Value:
    """Return a number rounded as DuckDB rounds a text that it compares with a FLOAT: equal values stay equal."""
    if not isinstance(value, float):
        return value
    try:
        return float(struct.unpack("f", struct.pack("f", value))[0])
    except OverflowError:
        return value


def about_no_rows(query: Query, given: Collection[str]) -> str:
    """Return a line about a shipped query's answer without rows: the thresholds left at their defaults, if any."""
    name = query.source.removesuffix(".sql")
    thresholds = re.findall(r"(?m)^(min_\w+) \([^)]*\): default ([\d.]*\d)", query.header)
    if left := [f"{threshold}={value}" for threshold, value in thresholds if threshold not in given]:
        return (
            f"{name} has no rows with the default {' and '.join(left)}. Lower it with -p; "
            f"`moewh query {name} --describe` explains it."
        )
    return f"{name} has no rows. `moewh query {name} --describe` explains what it counts."


def id_list(text: str) -> list[int]:
    """Return the numbers that a value of kind `prompt ids` or `token ids` lists."""
    return [int(part) for part in text.split(",")]


def _of_kind(name: str, kind: Kind, value: Value) -> Value:
    if not isinstance(value, str | int | float | Decimal | os.PathLike):
        raise UsageError(f"{name} is {brief(value)}. Give {kind.wants}.")
    text = str(value)
    if kind.type == "VARCHAR":
        fits = not kind.ids or re.fullmatch(_IDS, text) is not None
    else:
        fits = re.fullmatch(_WHOLE if kind.type == "INTEGER" else _NUMBER, text) is not None
        fits = fits and kind.least <= float(text) <= kind.most and math.isfinite(float(text))
    if not fits:
        raise UsageError(f"-p {name}={text}: {name} is {kind.wants}.")
    if kind.placement:
        return placement_text(text)
    if kind.type == "VARCHAR":
        return text
    return int(text) if kind.type == "INTEGER" else float(text)


def _number(name: str, text: str) -> Value:
    """Return the number in a text; if there is none, the text itself, for which DuckDB raises the error.

    Raises UsageError for a number that no DOUBLE holds.
    """
    if re.fullmatch(_WHOLE, text):
        return int(text)
    if not re.fullmatch(_NUMBER, text):
        return text
    if not math.isfinite(float(text)):
        raise UsageError(f"-p {name}={text}: the number is too large. Give one below 1.8e308.")
    return float(text)


def _reference(name: str) -> str:
    """Return a pattern that matches a read of the parameter in SQL, cast to text or not."""
    return rf"(?:getvariable\s*\(\s*'{name}'\s*\)|\${name}\b)(?:\s*::\s*(?:varchar|text)\b)?"


def numeric_parameters(query: Query, names: AbstractSet[str]) -> dict[str, set[str]]:
    """Return those of a user's parameters that DuckDB casts to numbers in every place, each with the types it casts to.

    DuckDB plans the SQL over empty tables with a text for the parameter, and the plan shows the types that the text is
    cast to. Where a text is not valid (after LIMIT, in `layer + $n`), a number is tried, and no type is known.
    """
    numeric: dict[str, set[str]] = {}
    for name in names:

        def plan(literal: str, name: str = name) -> Any:
            sql = _with_literal(query, name, literal)
            rows = (
                _planner(os.getpid())
                .cursor()
                .execute("select json_serialize_plan($sql, optimize := false)", {"sql": sql})
            )
            return json.loads(rows.fetchall()[0][0])

        planned = plan(f"'{_MARK}'")
        if planned["error"]:
            if not plan("1")["error"]:
                numeric[name] = set()
        elif (types := set(_cast_types(planned))) and all(_NUMERIC.fullmatch(type_) for type_ in types):
            numeric[name] = types
    return numeric


@cache
def _planner(_process: int) -> duckdb.DuckDBPyConnection:
    """Return this process's connection that only plans SQL over empty tables; each thread needs a cursor of it."""
    from moewh.warehouse.answer.catalog import empty_warehouse

    return empty_warehouse()


def _with_literal(query: Query, name: str, literal: str) -> str:
    """Return the SQL with a literal in place of one parameter and null in place of all others."""

    def replaced(match: re.Match[str]) -> str:
        return literal if name in (match["variable"], match["bound"]) else "null"

    pattern = r"(?i)getvariable\s*\(\s*'(?P<variable>\w+)'\s*\)|\$(?P<bound>[a-z_]\w*)\b"
    return re.sub(pattern, replaced, query.code)


def _cast_types(node: Any, parent: str = "", cast: str = "VARCHAR") -> Iterator[str]:
    """Yield the type that each occurrence of the marked text is cast to in a serialised plan."""
    if isinstance(node, list):
        for child in node:
            yield from _cast_types(child, parent, cast)
    elif isinstance(node, dict):
        value = node.get("value")
        if isinstance(value, dict) and value.get("value") == _MARK:
            if parent not in ("OPERATOR_IS_NULL", "OPERATOR_IS_NOT_NULL"):
                yield cast
            return
        kind = str(node.get("type"))
        inner = node["return_type"]["id"] if kind == "OPERATOR_CAST" else "VARCHAR"
        for child in node.values():
            yield from _cast_types(child, kind if isinstance(node.get("expression_class"), str) else parent, inner)
