"""Output of `moewh query` can be read back: every DuckDB type through every format, in Python and in DuckDB.

The types and their least and greatest values are DuckDB's own (`test_all_types`); missing ones are added here.
"""

from __future__ import annotations

import csv
import io
import json
import os
import pty
import re
import subprocess
import sys
from contextlib import redirect_stdout
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from markdown_it import MarkdownIt

from moewh.cli.main import main
from moewh.warehouse.answer import box
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.answer.texts import Column
from moewh.warehouse.files.layout import Layout
from tests.support.synthetic import random_warehouse

REPOSITORY = Path(__file__).resolve().parent.parent
TEXT_FORMATS = ("csv", "json", "jsonl", "markdown")
NEWEST = duckdb.__version__ >= "2"


def _sql(sql: str) -> duckdb.DuckDBPyRelation:
    relation = duckdb.sql(sql)
    assert relation is not None
    return relation


@dataclass(frozen=True)
class Extra:
    """A value of a type that `test_all_types` lacks."""

    sql: str
    type: str
    via: str | None = None
    """The type to read it as before casting, where DuckDB's JSON reader cannot read its own type."""


HOSTILE = "'a,\"b\"\n|\\' || chr(13) || chr(0) || 'é NaN <b>*_`&amp;'"
EXTRAS = {
    "json": Extra("""'{"a": [1, 2.50, null], "b": "x\\"y"}'::json""", "JSON"),
    "json_of_lines": Extra("""('{"a":' || chr(10) || ' 1}')::json""", "JSON"),
    "null": Extra("null", "INTEGER"),
    "nan": Extra("'nan'::double", "DOUBLE"),
    "infinity": Extra("'inf'::float", "FLOAT"),
    "minus_infinity": Extra("'-inf'::double", "DOUBLE"),
    "minus_zero": Extra("'-0.0'::double", "DOUBLE"),
    "tiny": Extra("5e-324::double", "DOUBLE"),
    "float_tenth": Extra("0.1::float", "FLOAT"),
    "date_infinity": Extra("'-infinity'::date", "DATE"),
    "timestamp_infinity": Extra("'infinity'::timestamp", "TIMESTAMP"),
    "timestamptz": Extra("'2026-01-02 03:04:05.678901+05:30'::timestamptz", "TIMESTAMPTZ"),
    "timestamptz_infinity": Extra("'-infinity'::timestamptz", "TIMESTAMPTZ"),
    "before_christ": Extra("'0044-03-15 (BC) 12:00:00'::timestamp", "TIMESTAMP"),
    "negative_interval": Extra("to_months(-14) + to_days(3) - to_microseconds(1)", "INTERVAL"),
    "decimal_scale_38": Extra("'-0.12345678901234567890123456789012345678'::decimal(38, 38)", "DECIMAL(38, 38)"),
    "decimal_of_15": Extra("999999999999.999::decimal(15, 3)", "DECIMAL(15, 3)"),
    "decimal_of_16": Extra("9999999999999.999::decimal(16, 3)", "DECIMAL(16, 3)"),
    "hugeint_of_38": Extra("99999999999999999999999999999999999999::hugeint", "HUGEINT"),
    "sum": Extra("(select sum(range) from range(100000))", "HUGEINT"),
    "enum": Extra("'a,\"b\"'::enum('a,\"b\"', 'c')", "ENUM('a,\"b\"', 'c')"),
    "every_byte": Extra("unhex('00ff22270a0d2c5c7c')", "BLOB", "VARCHAR"),
    "hostile": Extra(HOSTILE, "VARCHAR"),
    "hostile_list": Extra(f"[{HOSTILE}, '', null, 'NULL', ' x ']", "VARCHAR[]"),
    "hostile_struct": Extra(f"""{{'a b': {HOSTILE}, 'q"r': 'Infinity'}}""", 'STRUCT("a b" VARCHAR, "q""r" VARCHAR)'),
    "hostile_map": Extra(f"map {{{HOSTILE}: [1], 'NaN': null}}", "MAP(VARCHAR, INTEGER[])"),
    "map_of_numbers": Extra("map {1.5::double: 'x', 'nan'::double: 'y'}", "MAP(DOUBLE, VARCHAR)"),
    "map_of_lists": Extra(
        "map {[1, 2]: {'a': 1}}", "MAP(INTEGER[], STRUCT(a INTEGER))", "MAP(VARCHAR, STRUCT(a INTEGER))"
    ),
    "deep": Extra(
        "[{'a': map {'k': [{'d': 1.5::decimal(38, 20), 'f': 'nan'::float}]}}]",
        "STRUCT(a MAP(VARCHAR, STRUCT(d DECIMAL(38, 20), f FLOAT)[]))[]",
    ),
    "nested_bytes": Extra(
        f"{{'z': unhex('00ff22'), 'b': '0101'::bit, 'n': 10::bignum, 'h': '-{2**127}'::hugeint}}",
        "STRUCT(z BLOB, b BIT, n BIGNUM, h HUGEINT)",
        "STRUCT(z VARCHAR, b VARCHAR, n VARCHAR, h HUGEINT)",
    ),
    "nested_times": Extra(
        "[{'t': '2026-01-02 03:04:05+00'::timestamptz, 'i': interval 14 months, 'z': '01:02:03+04'::timetz}]",
        "STRUCT(t TIMESTAMPTZ, i INTERVAL, z TIMETZ)[]",
    ),
    "nested_json": Extra("""[{'j': '{"a": [1]}'::json}]""", "STRUCT(j JSON)[]"),
    "nested_union": Extra(
        "[union_value(n := 1), union_value(s := '1')::union(n integer, s varchar)]", "UNION(n INTEGER, s VARCHAR)[]"
    ),
    "variant_number": Extra("1::variant", "VARIANT"),
    "variant_list": Extra("['a', 'b\"']::variant", "VARIANT"),
    "variant_struct": Extra("{'a': 1, 'b': [true]}::variant", "VARIANT"),
    "tuple": Extra(
        "row(1, 'a')", "TUPLE(INTEGER, VARCHAR)" if NEWEST else "STRUCT(element1 INTEGER, element2 VARCHAR)"
    ),
    "empty_list": Extra("[]", "INTEGER[]"),
    "empty_map": Extra("map()", "MAP(VARCHAR, VARCHAR)"),
}
_BUG = "" if NEWEST else " exclude (timestamp_tz)"  # DuckDB 1.5 prints the greatest a millisecond off
ALL_TYPES = f"select row_number() over () as row_key, *{_BUG} from test_all_types()"
ALL_EXTRAS = "select 1 as row_key, " + ", ".join(f'{extra.sql} as "{name}"' for name, extra in EXTRAS.items())
CASES = {
    **{row[0]: (ALL_TYPES, row[1], None) for row in _sql(f"describe {ALL_TYPES}").fetchall() if row[0] != "row_key"},
    **{f"extra {name}": (ALL_EXTRAS, extra.type, extra.via) for name, extra in EXTRAS.items()},
}
AS_TEXT = ("BIT", "BIGNUM", "BLOB")
"""Types that DuckDB's JSON reader cannot read, but casts from text."""
NESTED = re.compile(r"STRUCT|MAP|UNION|TUPLE|VARIANT|.*\]$")


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("formats") / "wh")[0]


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"MOEWH_WAREHOUSE": str(layout.root)})


def query(layout: Layout, sql: str, *arguments: str) -> str:
    result = moewh(layout, "query", "-c", sql, *arguments)
    assert result.exit_code == 0, result.stderr or result.exception
    return result.stdout


@pytest.fixture(scope="module")
def written(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Both queries in every format."""
    folder = tmp_path_factory.mktemp("written")
    files = {
        (sql, form): folder / f"{number}.{form}"
        for number, sql in enumerate((ALL_TYPES, ALL_EXTRAS))
        for form in FORMATS
    }
    for (sql, form), file in files.items():
        assert query(layout, sql, "--format", form, "-o", str(file)) == ""
    return files


def values(sql: str, expression: str) -> list[Any]:
    return [row[0] for row in _sql(f"select {expression} from ({sql}) order by row_key").fetchall()]


def assert_same_in_duckdb(sql: str, name: str, reader: str, back: str) -> None:
    """Compare a column with a file's content, in DuckDB; `back` is SQL over the column `found`.

    JSON is compared without its spaces, which DuckDB's readers remove.
    """
    made = "made"
    if "JSON" in back:
        made, back = "to_json(made)", f"to_json({back})"
    same = _sql(
        f"""
        with made as (select row_key, "{name}" as made from ({sql})),
        read as (select row_key::bigint as row_key, "{name}" as found from {reader})
        select count(*), bool_and({made} is not distinct from {back})
        from made join read using (row_key)
        """
    ).fetchall()
    assert same == [(len(values(sql, "row_key")), True)]


@pytest.mark.parametrize("case", CASES)
def test_csv_reads_back_in_duckdb(case: str, written: dict[tuple[str, str], Path]) -> None:
    sql, kind, via = CASES[case]
    name = case.removeprefix("extra ")
    reader = f"read_csv('{written[sql, 'csv']}', header = true, all_varchar = true, allow_quoted_nulls = false)"
    back = f"found::json::{via or kind}::{kind}" if NESTED.match(kind) else f"found::{kind}"
    assert_same_in_duckdb(sql, name, reader, back)


@pytest.mark.parametrize("form", ["json", "jsonl"])
@pytest.mark.parametrize("case", CASES)
def test_json_reads_back_in_duckdb(case: str, form: str, written: dict[tuple[str, str], Path]) -> None:
    sql, kind, via = CASES[case]
    name = case.removeprefix("extra ")
    read_as = via or ("VARCHAR" if kind.startswith(AS_TEXT) else "JSON" if kind == "VARIANT" else kind)
    quoted = read_as.replace("'", "''")
    reader = f"""read_json('{written[sql, form]}', columns = {{'row_key': 'BIGINT', '{name}': '{quoted}'}})"""
    assert_same_in_duckdb(sql, name, reader, f"found::{kind}")


@pytest.mark.parametrize("case", CASES)
def test_parquet_reads_back(case: str, written: dict[tuple[str, str], Path]) -> None:
    sql, kind, _ = CASES[case]
    name = case.removeprefix("extra ")
    assert_same_in_duckdb(sql, name, f"read_parquet('{written[sql, 'parquet']}')", f"found::{kind}")
    column = pq.read_table(written[sql, "parquet"], columns=[name]).column(name)
    assert len(column) == len(values(sql, "row_key"))
    assert [item.is_valid for item in column] == values(sql, f'"{name}" is not null')


def csv_rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_csv_reads_back_in_python(case: str, written: dict[tuple[str, str], Path]) -> None:
    sql, kind, _ = CASES[case]
    name = case.removeprefix("extra ")
    cells = [row[name] for row in csv_rows(written[sql, "csv"])]
    if NESTED.match(kind):
        objects = json.loads(written[sql, "json"].read_text(encoding="utf-8"), parse_constant=pytest.fail)
        assert [json.loads(cell, parse_constant=pytest.fail) if cell else None for cell in cells] == [
            row[name] for row in objects
        ]
    elif kind == "FLOAT":
        assert [float(cell) if cell else None for cell in cells] == values(sql, f'"{name}"')
    else:
        assert cells == values(sql, f"coalesce(\"{name}\"::varchar, '')")


@pytest.mark.parametrize("form", ["json", "jsonl"])
@pytest.mark.parametrize("case", CASES)
def test_json_reads_back_in_python(case: str, form: str, written: dict[tuple[str, str], Path]) -> None:
    """Using only JSON's types: values that are not numbers are text, and so are those that a double cannot hold."""
    sql, kind, _ = CASES[case]
    name = case.removeprefix("extra ")
    text = written[sql, form].read_text(encoding="utf-8")
    lines = text.splitlines() if form == "jsonl" else [text]
    rows = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    cells = [row[name] for row in (rows if form == "jsonl" else rows[0])]
    if kind == "JSON":
        assert cells == [json.loads(value) for value in values(sql, f'"{name}"::varchar')]
    elif kind.startswith("DECIMAL"):
        assert [None if cell is None else Decimal(str(cell)) for cell in cells] == values(sql, f'"{name}"')
    elif kind in ("FLOAT", "DOUBLE"):
        assert list(map(str, [None if cell is None else float(cell) for cell in cells])) == list(
            map(str, values(sql, f'"{name}"'))
        )
    elif kind in ("BOOLEAN", "INTEGER", "UINTEGER") or kind.endswith("INT"):
        assert cells == values(sql, f'"{name}"')
    elif not NESTED.match(kind):
        assert cells == values(sql, f'"{name}"::varchar')


PLAIN_NESTED = {
    "[1, null, 3]": [1, None, 3],
    "{'a': {'b': [{'c': 1.5::double}]}}": {"a": {"b": [{"c": 1.5}]}},
    "map {'x': 1, 'y': null}": {"x": 1, "y": None},
    "[[1.25::decimal(4, 2)], []]": [[1.25], []],
    "[0.1::decimal(38, 20)]": ["0.10000000000000000000"],
    "['nan'::double, 'inf', '-inf', 1]": ["nan", "inf", "-inf", 1.0],
    "['NaN, -Infinity', 'null']": ["NaN, -Infinity", "null"],
    "{'a': 'it''s \"so\"\\'}": {"a": 'it\'s "so"\\'},
    "union_value(n := 7)": {"n": 7},
    "['2026-01-02'::date]": ["2026-01-02"],
    "[9007199254740993]": [9007199254740993],
    "[0.1::float]": [0.10000000149011612],
}


@pytest.mark.parametrize("sql", PLAIN_NESTED)
def test_nested_values_are_json(sql: str, layout: Layout) -> None:
    ((head, cell),) = zip(*csv.reader(io.StringIO(query(layout, f"select {sql} as x", "--format", "csv"))), strict=True)
    (row,) = json.loads(query(layout, f"select {sql} as x", "--format", "json"))
    assert (head, json.loads(cell), row) == ("x", PLAIN_NESTED[sql], {"x": PLAIN_NESTED[sql]})


@pytest.mark.parametrize("form", ["csv", "json", "jsonl"])
def test_json_keeps_every_digit(form: str, layout: Layout) -> None:
    sql = """select '{"a":  -12345678901234567890.12345678901234567890}'::json as x"""
    assert "-12345678901234567890.12345678901234567890}" in query(layout, sql, "--format", form)


@pytest.mark.parametrize("form", FORMATS)
def test_a_type_is_written_as_its_name(form: str, layout: Layout, tmp_path: Path) -> None:
    """TYPE is the only type that DuckDB itself casts to text only."""
    query(layout, "select get_type([1.5]) as x", "--format", form, "-o", str(tmp_path / "x"))
    if form == "parquet":
        assert pq.read_table(tmp_path / "x").to_pylist() == [{"x": "DECIMAL(2,1)[]"}]
    else:
        assert "DECIMAL(2,1)[]" in (tmp_path / "x").read_text()


def test_null_the_empty_text_and_the_text_null_differ(layout: Layout, tmp_path: Path) -> None:
    sql = "select unnest([1, 2, 3, 4]) as i, unnest([null, '', 'NULL', 'null']) as s order by i"
    text = query(layout, sql, "--format", "csv")
    assert text == 'i,s\n1,\n2,""\n3,NULL\n4,null\n'
    (tmp_path / "x.csv").write_text(text)
    read = _sql(f"select s from read_csv('{tmp_path / 'x.csv'}', allow_quoted_nulls = false)").fetchall()
    assert [value for (value,) in read] == [None, "", "NULL", "null"]
    rows = json.loads(query(layout, sql, "--format", "json"))
    assert [row["s"] for row in rows] == [None, "", "NULL", "null"]


def test_null_and_the_empty_text_differ_in_an_answer_of_one_column(layout: Layout, tmp_path: Path) -> None:
    text = query(layout, "select unnest(['a', null, '']) as s", "--format", "csv")
    (tmp_path / "x.csv").write_text(text)
    read = _sql(f"from read_csv('{tmp_path / 'x.csv'}', header = true, allow_quoted_nulls = false)").fetchall()
    assert read == [("a",), (None,), ("",)]
    assert list(csv.reader(io.StringIO(text))) == [["s"], ["a"], [], [""]]


NAMES = ["a b", 'q"r', "x,y", "line\nend", "é日", "%s", "{0}", "select", " ", "a|b", "null", "'", "c0", "answer"]


@pytest.mark.parametrize("form", ["csv", "json", "jsonl", "parquet"])
def test_any_column_name_comes_through(form: str, layout: Layout, tmp_path: Path) -> None:
    items = ", ".join('{} as "{}"'.format(number, name.replace('"', '""')) for number, name in enumerate(NAMES))
    file = tmp_path / f"x.{form}"
    query(layout, f"select {items}", "-o", str(file))
    read: list[dict[str, Any]]
    if form == "csv":
        read = list(csv_rows(file))
    elif form == "parquet":
        read = pq.read_table(file).to_pylist()
    else:
        parsed = json.loads(file.read_text(encoding="utf-8"))
        read = parsed if form == "json" else [parsed]
    assert [{name: int(value) for name, value in row.items()} for row in read] == [
        {name: number for number, name in enumerate(NAMES)}
    ]


@pytest.mark.parametrize("unsafe", [[], ["--unsafe"]], ids=["jailed", "unsafe"])
@pytest.mark.parametrize("form", [*TEXT_FORMATS, "table", "parquet"])
def test_equal_names_are_made_different(form: str, unsafe: list[str], layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "x"
    query(layout, "select 11 as a, 22 as A, 33 as a", "-o", str(file), "--format", form, *unsafe)
    if form == "parquet":
        assert pq.read_table(file).to_pylist() == [{"a": 11, "A_1": 22, "a_2": 33}]
    else:
        text = file.read_text()
        assert re.findall(r"\b(?:11|22|33)\b", text) == ["11", "22", "33"]
        assert all(name in text for name in ("A_1", "a_2"))


@pytest.mark.parametrize("form", FORMATS)
def test_an_answer_without_rows(form: str, layout: Layout, tmp_path: Path) -> None:
    for number, sql in enumerate((ALL_TYPES, ALL_EXTRAS)):
        file = tmp_path / f"{number}.{form}"
        query(layout, f"from ({sql}) where row_key < 0", "--format", form, "-o", str(file))
        names = _sql(sql).columns
        if form == "parquet":
            assert (pq.read_table(file).num_rows, pq.read_table(file).column_names) == (0, names)
        elif form == "csv":
            assert list(csv.reader(io.StringIO(file.read_text()))) == [names]
        else:
            text = file.read_text()
            assert {"json": text == "[]\n", "jsonl": text == ""}.get(form, True)
            assert len(text.splitlines()) == {"json": 1, "jsonl": 0, "markdown": 2, "table": 5}[form]


STATEMENTS = {
    "explain select 1": None,
    "show tables": None,
    "pragma database_list": None,
    "call pragma_version()": None,
    "values (1, 'a'), (2, null);": [{"col0": 1, "col1": "a"}, {"col0": 2, "col1": None}],
    "select $n + 1 as m -- a comment": [{"m": 8}],
    "from range(2) t(i) ; -- the end": [{"i": 0}, {"i": 1}],
    "create or replace table made as select 1; ": [],
}


@pytest.mark.parametrize("form", [*FORMATS])
@pytest.mark.parametrize("sql", STATEMENTS)
def test_unsafe_statements_of_any_kind(sql: str, form: str, layout: Layout, tmp_path: Path) -> None:
    parameters = ["-p", "n=7"] if "$n" in sql else []
    file = tmp_path / "x"
    query(layout, sql, "--unsafe", "--format", form, "-o", str(file), *parameters)
    rows = STATEMENTS[sql]
    if form == "json" and rows:
        read = json.loads(file.read_text())
        assert [{key: int(str(value)) if key == "m" else value for key, value in row.items()} for row in read] == rows
    assert file.is_file() == (rows != [])


# ------------------------------------------------------------------------------------------ Markdown


def markdown_rows(text: str) -> list[list[str]]:
    """Return the cells of the one table in a text, as markdown-it shows them."""
    rows: list[list[str]] = []
    tokens = MarkdownIt("commonmark").enable("table").enable("strikethrough").parse(text)
    assert [token.type for token in tokens if token.level == 0] == ["table_open", "table_close"]
    for token in tokens:
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline":
            assert {child.type for child in token.children or []} <= {"text", "html_inline", "text_special"}
            rows[-1].append("".join("\n" if c.type == "html_inline" else c.content for c in token.children or []))
    return rows


def shown(text: str) -> str:
    """Return a text as far as Markdown can hold it: one kind of line end, no NUL, no space at the ends."""
    return re.sub(r"\r\n|[\n\r\v\f\x1c-\x1e\x85\u2028\u2029]", "\n", text).replace("\0", "\ufffd").strip(" \t\n")


@pytest.mark.parametrize("sql", [ALL_TYPES, ALL_EXTRAS], ids=["types", "extras"])
def test_markdown_shows_every_value_in_its_cell(sql: str, written: dict[tuple[str, str], Path]) -> None:
    head, *rows = markdown_rows(written[sql, "markdown"].read_text(encoding="utf-8"))
    expected = csv_rows(written[sql, "csv"])
    assert head == list(expected[0])
    assert [list(map(str.strip, row)) for row in rows] == [list(map(shown, row.values())) for row in expected]


MARKS = [
    "a|b", "a\\|b", "\\", "`a|b`", "``", "*x*", "**x**", "_x_", "a_b_c", "__x__", "<b>x</b>", "<!-- x -->", "<|end|>",
    "&amp;", "&#35;", "&", "[x](y)", "![x](y)", "[x][y]", "~~x~~", "# x", "- x", "1. x", "> x", "a\nb", "a\r\nb",
    "a\vb", "a\u2028b", "a\u0085b", "http://x.y", "---", "| --- |", "$x$", "\\*", "a\\", "<br>", "x\ty", "'\"",
]  # fmt: skip


@pytest.mark.parametrize("mark", MARKS, ids=repr)
def test_markdown_shows_marks_as_they_are(mark: str, layout: Layout) -> None:
    sql = "select $x as x, getvariable('x') as y"
    rows = markdown_rows(query(layout, sql, "-p", f"x={mark}", "--format", "markdown"))
    assert [[cell.strip() for cell in row] for row in rows] == [["x", "y"], [shown(mark)] * 2]


# ------------------------------------------------------------------------------------------ tables


def duckdbs_box(sql: str) -> list[str]:
    with redirect_stdout(io.StringIO()) as stream:
        _sql(sql).show(max_width=100_000, max_rows=100_000, max_col_width=100_000)
    return stream.getvalue().rstrip("\n").splitlines()


BOXES = [
    "select 1 as i, 2.5::double as d, 'x' as s, true as b, null::date as n, 1.50::decimal(9, 2) as e",
    "select range as i, repeat('é', range::integer) as s from range(7)",
    "select '日本' as wide, 'a' || chr(10) || 'b' || chr(9) || chr(27) as controls",
    "select [1, null] as l, {'a': 'x y', 'b': [1.5]} as s, map {'k': 1} as m, 'x'::blob as z",
    "select 1::tinyint as a, 2::smallint as b, 3::uinteger as c, 4::hugeint as d, 5::ubigint as e, [6::utinyint] as f",
    "select '2026-01-02'::date as d, '2026-01-02 03:04:05'::timestamp as t, '2026-01-02'::timestamptz as z",
    "select 1 as a_name_that_is_longer_than_its_values, 'a value that is longer than its name' as v",
]


@pytest.mark.parametrize("sql", BOXES)
def test_a_table_is_drawn_as_duckdb_draws_it(sql: str, layout: Layout) -> None:
    assert query(layout, sql).splitlines() == duckdbs_box(sql)


@pytest.mark.parametrize("to_file", [False, True], ids=["pipe", "-o"])
@pytest.mark.parametrize("rows", [0, 1, 41, 12_345])
def test_a_table_is_whole(rows: int, to_file: bool, layout: Layout, tmp_path: Path) -> None:
    """All of its rows, its columns and every character of its cells."""
    wide = ", ".join(f"repeat('x', 60) || '{number}' as c{number}" for number in range(12))
    sql = f"select range as i, {wide} from range({rows})"
    file = tmp_path / "x.txt"
    text = query(layout, sql, *(["-o", str(file)] if to_file else []))
    lines = (file.read_text(encoding="utf-8") if to_file else text).splitlines()
    body = [line for line in lines[3:] if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in body]
    assert cells == [[str(row), *(f"{'x' * 60}{number}" for number in range(12))] for row in range(rows)]
    assert not any(mark in line for mark in "·…" for line in lines)
    assert (lines[-1] == f"  {rows:,} rows; 13 columns") == (rows == 0 or rows >= 10)


def columns(sql: str) -> tuple[list[Column], list[tuple[str | None, ...]]]:
    described = duckdb.execute(sql).description or []
    texts = duckdb.execute(f"select columns(*)::varchar from ({sql})").fetchall()
    return [Column(name, kind) for name, kind, *_ in described], texts


CUTS = [
    ("select range as i from range(40)", 80, None),
    ("select range as i from range(41)", 80, "40 of 41 rows"),
    ("select range as i from range(192)", 80, "40 of 192 rows"),
    ("select range as i from range(10000)", 80, "40 of 10,000 rows"),
    ("select range as i from range(10001)", 80, "40 of more than 10,000 rows"),
    (f"select {', '.join(f'{n} as c{n}' for n in range(8))}", 80, None),
    (f"select {', '.join(f'1234567 as c{n}' for n in range(8))}", 80, "7 of 8 columns"),
    ("select repeat('x', 76) as s", 80, None),
    ("select repeat('x', 77) as s", 80, "cells cut to 76 characters"),
    ("select repeat('日', 39) as s", 80, "cells cut to 76 characters"),
    ("select repeat('x', 60) as s, repeat('y', 10) as t", 80, None),
    ("select repeat('x', 70) as s, repeat('y', 10) as t", 80, "cells cut to 63 characters"),
    (f"select {', '.join(f'repeat(chr(120), 30) as c{n}' for n in range(8))} from range(50)", 80, "of 50 rows; 3 of 8"),
    ("select 'x' as a", 3, "cells cut to 2 characters"),
]


@pytest.mark.parametrize(("sql", "room", "says"), CUTS, ids=[str(says) for *_, says in CUTS])
def test_what_a_terminal_leaves_out_is_reported(sql: str, room: int, says: str | None) -> None:
    stream = io.StringIO()
    named, rows = columns(sql)
    box.write_cut(named, rows, room, stream)
    lines = stream.getvalue().splitlines()
    drawn = [line for line in lines if not line.startswith("  ")]
    if room >= 20:
        assert {box.width_of(line) for line in drawn} <= set(range(room + 1))
    assert len({box.width_of(line) for line in drawn}) == 1
    said = lines[len(drawn) :]
    assert (says is None and not said) or (says is not None and says in said[0] and len(said) == 1)
    full = len(rows) <= 40 and "columns" not in str(says) and "cells" not in str(says)
    assert any("…" in line or "·" in line for line in drawn) != full or room < 20
    if "rows" in str(says):
        assert len([line for line in drawn[4:-1] if "·" not in line]) == 40


def on_a_terminal(arguments: list[str], layout: Layout) -> str:
    """Run moewh with its output on a terminal; return what it shows."""
    program = [sys.executable, "-c", "from moewh.cli.main import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "MOEWH_WAREHOUSE": str(layout.root), "COLUMNS": "80"}
    ours, its = pty.openpty()
    shown = b""
    with subprocess.Popen(program, stdout=its, stdin=subprocess.DEVNULL, env=environment) as process:
        os.close(its)
        try:
            while part := os.read(ours, 65536):
                shown += part
        except OSError:  # Linux's end of a terminal
            pass
        assert process.wait() == 0
    os.close(ours)
    return shown.decode().replace("\r\n", "\n")


def test_a_table_on_a_terminal_is_cut_and_says_so(layout: Layout, tmp_path: Path) -> None:
    sql = f"select {', '.join(f'repeat(chr(120), 25) as c{number}' for number in range(8))} from range(192)"
    lines = on_a_terminal(["query", "-c", sql], layout).splitlines()
    assert lines[-1] == "  40 of 192 rows; 3 of 8 columns; cells cut to 22 characters. Use a pipe or -o FILE for all."
    assert len(lines) == 4 + 40 + 3 + 1 + 1
    assert max(map(len, lines[:-1])) <= 80
    whole = on_a_terminal(["query", "-c", sql, "--format", "csv"], layout)
    assert whole == query(layout, sql, "--format", "csv")
    assert on_a_terminal(["query", "-c", sql, "-o", str(tmp_path / "x.txt")], layout) == ""
    assert (tmp_path / "x.txt").read_text(encoding="utf-8") == query(layout, sql)


# ------------------------------------------------------------------------------------------ runs, checks


@pytest.mark.parametrize("form", FORMATS)
def test_runs_in_every_format(form: str, layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "x"
    result = moewh(layout, "runs", "--format", form, "-o", str(file))
    assert (result.exit_code, result.stdout) == (0, "")
    names = ["run_id", "status", "segments", "model", "revision", "created_at", "train_step", "prompts", "tokens"]
    if form == "parquet":
        read = pq.read_table(file).to_pylist()
    elif form == "csv":
        read = list(csv_rows(file))
    elif form in ("json", "jsonl"):
        text = file.read_text()
        read = json.loads(text) if form == "json" else list(map(json.loads, text.splitlines()))
    else:
        text = file.read_text(encoding="utf-8")
        assert all(name in text for name in names)
        assert text == moewh(layout, "runs", "--format", form).stdout
        return
    assert list(read[0]) == names
    assert len(read) == 6
    assert {row["run_id"] for row in read} == {"007", "mixed", "step-1", "step-20", "step-30", "wide.v-1"}


def test_runs_on_a_narrow_terminal(layout: Layout) -> None:
    heads = on_a_terminal(["runs"], layout).splitlines()[1]
    assert {"run_id", "status", "segments", "tokens"} <= set(heads.replace("│", " ").split())


def test_runs_of_an_empty_warehouse(tmp_path: Path) -> None:
    empty = Layout(tmp_path / "wh")
    assert moewh(empty, "refresh").exit_code == 0
    assert moewh(empty, "runs", "--format", "json").stdout == "[]\n"
    assert moewh(empty, "runs", "--format", "jsonl").stdout == ""
    assert len(moewh(empty, "runs", "--format", "csv").stdout.splitlines()) == 1
    assert moewh(empty, "runs").stdout.endswith("  0 rows; 9 columns\n")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--format", "parquet"], "Name a file with -o"),
        (["-o", "x.what"], "Add --format"),
        (["-o", "/no/such/place/x.csv"], "there is no directory"),
        (["--delete", "007", "--yes", "--format", "csv"], "Leave them out with --delete"),
        (["--delete", "007", "--yes", "-o", "x.csv"], "Leave them out with --delete"),
    ],
)
def test_runs_refuses_what_cannot_be_written(arguments: list[str], says: str, layout: Layout) -> None:
    result = moewh(layout, "runs", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert says in result.stderr


@pytest.mark.parametrize("form", ["text", "json", "junit"])
@pytest.mark.parametrize("sql", [ALL_TYPES, ALL_EXTRAS], ids=["types", "extras"])
def test_check_reports_rows_of_every_type(
    sql: str, form: str, layout: Layout, tmp_path: Path, written: dict[tuple[str, str], Path]
) -> None:
    (tmp_path / "mine.sql").write_text(sql)
    result = moewh(layout, "check", str(tmp_path / "mine.sql"), "--format", form)
    assert result.exit_code == 1, result.stderr
    rows = csv_rows(written[sql, "csv"])
    assert f"{len(rows)} fault" in result.stdout or form == "json"
    if form == "json":
        (report,) = json.loads(result.stdout)
        assert report["rows"] == json.loads(written[sql, "json"].read_text(encoding="utf-8"))
    elif form == "text":
        cells = {name: cell.replace("\n", r"\n") for name, cell in rows[0].items() if cell and name != "hostile"}
        assert all(f"{name} = {cell}" in result.stdout for name, cell in cells.items())
