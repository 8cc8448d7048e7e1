"""PIVOT without an IN list: `moewh query` gives the same as DuckDB, and runs nothing that the jail forbids."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import duckdb
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.answer.query import Query, prepare
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.synthetic import random_warehouse

Answer = tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]
TABLE = "create table t as from (values (10, 'b', 10), (1, 'b', 20), (2, 'a', 5), (null, null, 3)) v(layer, expert, n)"
PIVOTS = [
    "pivot t on layer using sum(n) group by expert",
    "pivot t on layer",
    "pivot t on layer group by expert",
    "pivot t on layer, expert using sum(n), count(*) as rows_",
    "pivot_wider t on expert using sum(n);",
    "PIVOT t ON n / 3 USING count(*)",
    "pivot t on expert || 'é''\"x' using count(*)",
    "pivot t on case when layer in (1, 2) then 'low' else 'high' end using count(*)",
    "pivot t on (layer, expert) using count(*)",
    "pivot t on {'a': layer} using count(*)",
    "pivot t on layer::varchar, (expert) using count(*)",
    "pivot t on list_contains([1, 2], layer) using count(*)",
    "pivot (select true as b, date '2020-01-01' as d, 1.50 as z, timestamp '2020-01-01 01:02:03' as s) on b, d, z, s",
    "pivot t on expert -- said on\n",
    "pivot t /* on x using y */ on expert -- in (1)\n using -- z\n sum(n)",
    "pivot t as u on layer using count(*) order by all limit 2",
    "pivot t on expert using sum(n) order by layer",
    "pivot t on expert, layer in (1, 2) using sum(n)",
    "pivot t on layer in (1, 2), expert using sum(n)",
    "pivot t join (select 10 as ten, 'k' as z) as u on t.layer = u.ten on z using count(*)",
    "pivot t join (select 10 as layer, 'k' as z) as u using (layer) on z using count(*) order by all",
    "pivot (from t join t as u using (layer)) on layer using count(*)",
    "pivot (from t where layer > 1) on layer % 2 using count(*)",
    "pivot (from t where false) on layer using sum(n) group by expert",
    "from (pivot t on expert using sum(n))",
    "with x as (pivot t on expert using sum(n)) from x",
    "with a as (from t) pivot a on expert using sum(n)",
    "with t as (select 'shadow' as expert) pivot t on expert using count(*)",
    "with a as (select 1 as x), b as (with a as (select 'in' as y) from a) pivot b on y using count(*)",
    "with recursive r as (select 1 as i union all select i + 1 from r where i < 3) pivot r on i using count(*)",
    "with x as (pivot t on expert using sum(n) group by layer), y as (select layer, 'on' as k from x) "
    "pivot y on k, layer in (1, 2) using count(*)",
    "pivot (pivot t on layer using sum(n) group by expert) on expert using count(*)",
    "select * from (pivot t on expert using sum(n)) a join (pivot t on layer using sum(n)) b on true",
    "select 'é' as e, * from (pivot t on expert using first(n order by n))",
    "describe pivot t on layer using sum(n) group by expert",
    "summarize pivot t on layer using sum(n)",
    "unpivot (pivot t on layer using sum(n) group by expert) on columns(* exclude expert)",
    "pivot t on layer using count(*) union all by name select 1 as z",
    "from t pivot (sum(n) for layer in (1, 2))",
    "select 'pivot t on x' as text",
    'select "pivot" from (select 1 as "pivot") as a join t on a."pivot" = t.layer',
]


@pytest.fixture
def connection() -> duckdb.DuckDBPyConnection:
    made = duckdb.connect()
    made.execute(TABLE)
    return made


def rows_of(cursor: duckdb.DuckDBPyConnection) -> Answer:
    names = [(name, str(kind)) for name, kind, *_ in cursor.description or ()]
    return names, sorted(cursor.fetchall(), key=repr)


@pytest.mark.parametrize("unsafe", [False, True], ids=["jailed", "unsafe"])
@pytest.mark.parametrize("sql", PIVOTS)
def test_pivot_gives_what_duckdb_gives(sql: str, unsafe: bool, connection: duckdb.DuckDBPyConnection) -> None:
    expected = rows_of(connection.execute(sql))
    answer = prepare(connection, Query("-c", sql), {}, unsafe=unsafe)
    assert answer is not None
    assert rows_of(answer.execute()) == expected
    assert answer.relation().columns == [name for name, _ in expected[0]]


@pytest.mark.parametrize("unsafe", [False, True], ids=["jailed", "unsafe"])
def test_pivot_with_values_and_variables(unsafe: bool, connection: duckdb.DuckDBPyConnection) -> None:
    """Parameters of `-p` are also bound where the columns are looked up."""
    sql = "pivot (from t where layer > $least and expert = getvariable('expert')) on layer using sum(n) group by expert"
    answer = prepare(connection, Query("-c", sql), {"least": 1, "expert": "b"}, unsafe=unsafe)
    assert answer is not None
    assert rows_of(answer.execute()) == ([("expert", "VARCHAR"), ("10", "HUGEINT")], [("b", 10)])


@pytest.mark.parametrize(
    "sql",
    [
        "pivot t on expert in (select 'a') using sum(n)",
        "pivot t on columns('l.*') using count(*)",
        "pivot t on expert using sum(n); select 1",
        "select 1; pivot t on expert using sum(n)",
        "pivot t using sum(n) on",
        "pivot nothing on expert using sum(n)",
        "pivot t on nothing using sum(n)",
        "pivot t on expert using nothing(n)",
        "create table u as pivot t on expert using sum(n)",
    ],
)
def test_pivot_of_another_kind_is_refused(sql: str, connection: duckdb.DuckDBPyConnection) -> None:
    with pytest.raises((MoewhError, duckdb.Error)):
        answer = prepare(connection, Query("-c", sql), {})
        assert answer is not None
        answer.execute()
    assert connection.execute("select table_name from duckdb_tables()").fetchall() == [("t",)]


def test_pivot_with_too_many_columns_is_refused(connection: duckdb.DuckDBPyConnection) -> None:
    connection.execute("set pivot_limit = 10")
    with pytest.raises(MoewhError, match="more than 10 columns"):
        prepare(connection, Query("-c", "pivot (from range(11)) on range using count(*)"), {})
    assert prepare(connection, Query("-c", "pivot (from range(10)) on range using count(*)"), {}) is not None


# ------------------------------------------------------------------------------------------ in the command


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("pivot") / "wh")[0]


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"MOEWH_WAREHOUSE": str(layout.root)})


MATRIX = "pivot (from expert_load where run_id = '007') on expert using sum(tokens) group by layer order by layer"


def test_pivot_is_the_matrix_people_want(layout: Layout, tmp_path: Path) -> None:
    """Layers down, experts across, as `-c` and as a file; as a check it has rows, which are faults."""
    done = moewh(layout, "query", "-c", MATRIX, "--format", "csv")
    assert (done.exit_code, done.stderr) == (0, "")
    lines = [line.split(",") for line in done.stdout.splitlines()]
    found = {(line[0], expert): n for line in lines[1:] for expert, n in zip(lines[0][1:], line[1:], strict=True)}
    load = moewh(layout, "query", "-c", "from expert_load where run_id = '007'", "--format", "csv")
    rows = csv.DictReader(load.stdout.splitlines())
    assert found == {(row["layer"], row["expert"]): row["tokens"] for row in rows}
    file = tmp_path / "matrix.sql"
    file.write_text(f"-- the load as a matrix; on every layer\n{MATRIX};\n")
    assert moewh(layout, "query", str(file), "--format", "csv").stdout == done.stdout
    assert "layer  INTEGER" in moewh(layout, "query", str(file), "--describe").stdout
    checked = moewh(layout, "check", str(file))
    assert (checked.exit_code, "3 faults" in checked.stdout) == (1, True)


def test_pivot_in_every_format(layout: Layout, tmp_path: Path) -> None:
    for form in ("table", "csv", "json", "markdown"):
        assert moewh(layout, "query", "-c", MATRIX, "--format", form).exit_code == 0
    output = tmp_path / "matrix.parquet"
    assert moewh(layout, "query", "-c", MATRIX, "-o", str(output)).exit_code == 0
    assert len(duckdb.read_parquet(str(output)).fetchall()) == 3
