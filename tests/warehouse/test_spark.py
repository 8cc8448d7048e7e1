"""Every shipped query gives the same rows on Spark as on DuckDB, over the same files, in one session."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.publish.publish import PublishOptions, publish
from moewh.publish.target import FolderTarget
from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Engine
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.remote.place import Folder, Remote
from moewh.warehouse.remote.published import Published, readable
from moewh.warehouse.trust.check import shipped_checks
from moewh.warehouse.trust.rollups import compare, definition
from moewh.warehouse.views.shipped import QUERIES, view_names
from tests.support.published import publishable
from tests.support.saved_queries import values_of
from tests.support.synthetic import Prompt, Run, Token, random_run, random_warehouse, write_run
from tests.support.traces import WRITERS, config, traced

pyspark = pytest.importorskip("pyspark", reason="pyspark is not installed")
pytest.importorskip("sqlglot", reason="sqlglot is not installed")
if not (shutil.which("java") or os.environ.get("JAVA_HOME")):
    pytest.skip("there is no Java", allow_module_level=True)

from moewh.warehouse.answer import spark  # noqa: E402
from tests.support.two_engines import answered, assert_same, keep_views, on_duckdb, repr_without_floats, same  # noqa: E402

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

Rows = list[tuple[Any, ...]]
AWKWARD = "sp ace [x] {y} ü/layer%3D7/run_id=x/segment=3/Layer=7/TOKENS=1/model=m/domain=d/expert_a=1"
"""Folders above the root: a name that is hard to write, and names of columns."""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """In folders whose names Hadoop would take for patterns or partitions, one run's segments through a link.

    With a run of no segments and one without weights.
    """
    made, _ = random_warehouse(tmp_path_factory.mktemp("spark") / AWKWARD / "wh")
    moved = made.root.with_name("moved")
    made.segments("007").rename(moved)
    made.segments("007").symlink_to(moved)
    write_run(made, Run("none", {0: (2, 1)}, [], {"segments_planned": 2}))
    write_run(made, Run("ids-only", {0: (2, 1)}, [[Prompt([Token(1, {0: [(1, None)]})])]]))
    return made


SHORT_LIVED = (
    "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -XX:MetaspaceSize=512m -XX:ReservedCodeCacheSize=256m "
    "-XX:+UnlockDiagnosticVMOptions -XX:-BytecodeVerificationRemote"
)
"""Options of Java. Each query runs once or twice: compiling it well, or verifying Spark, takes longer than it saves.

What is compiled needs room, or Java goes on without its compiler; a growing metaspace would collect garbage each time.
"""
INTERPRETED = {
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.sql.adaptive.enabled": "false",
}
"""Settings with which Spark compiles no class per query; the cluster below runs with users' settings."""
SMALL = {
    "spark.driver.memory": "2g",
    "spark.driver.extraJavaOptions": "-Xms2g -Xmn1g",
    "spark.buffer.pageSize": "256k",
    "spark.shuffle.compress": "false",
    "spark.broadcast.compress": "false",
}
"""Settings for a few rows: each sort, join and aggregation would clear pages of many megabytes, and fill the memory."""


@pytest.fixture(scope="module")
def session(layout: Layout) -> Iterator[SparkSession]:
    ours = spark._settings
    with pytest.MonkeyPatch.context() as patch:
        keep_views(patch, layout.root)
        patch.setenv("JDK_JAVA_OPTIONS", SHORT_LIVED)
        patch.setattr(spark, "_settings", lambda master: ours(master) | INTERPRETED | SMALL)
        with spark.open_spark("local[2]") as opened:
            yield opened


@pytest.mark.parametrize("name", view_names())
def test_spark_view_equals_duckdb(name: str, layout: Layout, session: SparkSession) -> None:
    query = queries.find_query(name)
    assert_same(layout, session, query, {}, ordered="order by" in query.sql)


@pytest.mark.parametrize("name", queries.saved_names())
def test_spark_saved_query_equals_duckdb(name: str, layout: Layout, session: SparkSession) -> None:
    query, values = queries.find_query(name), values_of(name)
    if "shuffles" in query.variables:
        values["shuffles"] = 3  # each repeats the same SQL
    assert on_duckdb(layout, query, values)[1], "the case has rows to compare"
    assert_same(layout, session, query, values, ordered=True)


@pytest.mark.parametrize("query", shipped_checks(), ids=lambda query: query.source)
def test_spark_check_equals_duckdb(query: Query, layout: Layout, session: SparkSession) -> None:
    assert_same(layout, session, query, {}, ordered=True)


IMPORTED = ("runs", "routes", "expert_load", "co_routing", "layer_transitions", "first_choice_transitions")


def test_spark_equals_duckdb_on_imported_runs(tmp_path: Path, session: SparkSession) -> None:
    """Runs without weights, and without the order of a token's experts."""
    root, model = tmp_path / "wh", config(tmp_path / "model")
    for form in ("vllm", "megatron"):
        files = map(str, WRITERS[form][1](tmp_path, traced()))
        arguments = ["import", form, *files, "--model", str(model), "--warehouse", str(root), "--run-id", form]
        assert CliRunner().invoke(main, arguments).exit_code == 0
    for name in IMPORTED:
        assert_same(Layout(root), session, queries.find_query(name), {}, ordered=False)


@pytest.mark.parametrize("table", schema.ROLLUPS, ids=lambda table: table.name)
def test_spark_rollup_definition_equals_duckdb(table: schema.Table, layout: Layout, session: SparkSession) -> None:
    assert_same(layout, session, Query(table.name, definition(table), shipped=True), {}, ordered=False)


def test_spark_leaves_out_what_is_no_segment(tmp_path: Path, session: SparkSession) -> None:
    """A leftover copy beside a segment, as in DuckDB."""
    made, _ = random_warehouse(tmp_path / "wh")
    expected = on_duckdb(made, Query("-", "from expert_load order by all", shipped=True), {})
    for stray in ("segment=old", "segment=00", "segment=0.old"):
        shutil.copytree(made.segment("007", 0), made.segments("007") / stray)
    for sql in ("from expert_load order by all", "select run_id, segment, count(*) as n from routing group by 1, 2"):
        assert_same(made, session, Query("-", sql, shipped=True), {}, ordered="order by" in sql)
    assert on_duckdb(made, Query("-", "from expert_load order by all", shipped=True), {}) == expected


def test_spark_compares_rollups(tmp_path: Path, session: SparkSession) -> None:
    small = Layout(tmp_path)
    small.create()
    write_run(small, Run("r", {0: (2, 1)}, [[Prompt([Token(1, {0: [(1, 0.5)]})])]]))
    wrong = pa.table([["prompt"], [0], [1], [1], [7]], schema=schema.AFFINITY_COUNTS.arrow())
    pq.write_table(wrong, small.segment("r", 0) / schema.AFFINITY_COUNTS.file)
    (fault,) = compare(lambda query, values: spark.answer(session, small, query, values))
    assert (fault.table, fault.stored, fault.expected) == ("affinity_counts", "tokens = 7", "tokens = 1")


def test_spark_run_id_stays_text(layout: Layout, session: SparkSession) -> None:
    query = Query("test", "select distinct run_id from routing where run_id = $run", shipped=True)
    assert answered(lambda q, v: spark.answer(session, layout, q, v), query, {"run": "007"})[1] == [("007",)]


TEXTS = (
    "2.10",
    "1e5",
    "True",
    "7318e52",
    "007",
    "+5",
    "1_000",
    " 5",
    "nan",
    "null",
    "2024-01-15",
    "it's",
    "a\\b",
    "\\",
    "%",
)


@pytest.mark.parametrize("text", TEXTS)
def test_spark_text_stays_text(text: str, layout: Layout, session: SparkSession) -> None:
    ask = Engine(lambda query, values: spark.answer(session, layout, query, values, unsafe=True))
    own = (
        "select $x as bound, getvariable('x') as variable, count(*) as runs from runs where run_id = $x or $x <> '007'"
    )
    _, rows = answered(ask, Query("-c", own), {"x": text})
    assert rows == [(text, text, 1 if text == "007" else 8)]


@pytest.mark.parametrize(
    ("sql", "values", "expected"),
    [
        ("select count(*) as n from experts where run_id = '007' and layer = $x", {"x": "2"}, 6),
        ("select count(*) as n from experts where run_id = '007' and expert > $x", {"x": "3.5"}, 6),
        ("select count(*) as n from (select expert from experts limit $x) as e", {"x": "5"}, 5),
        ("select $x + 1 as n", {"x": "1"}, 2),
        ("select count(*) as n from experts where layer + 0 = $x", {"x": "2.10"}, 0),
    ],
)
def test_spark_numbers_in_own_sql(
    sql: str, values: dict[str, Value], expected: int, layout: Layout, session: SparkSession
) -> None:
    ask = Engine(lambda query, values: spark.answer(session, layout, query, values, unsafe=True))
    assert answered(ask, Query("-c", sql), values)[1] == [(expected,)]


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [
        ("domain_experts", {"run": "7"}, "there is no run '7'"),
        ("expert_paths", {"domain": "proze"}, "there is no domain 'proze'.* Did you mean 'prose'"),
        (
            "expert_top_tokens",
            {"layer": "2", "expert": "6", "run": "007"},
            "there is no expert 6 at layer 2 in run 007",
        ),
        ("token_experts", {"token": " quick"}, "there is no token ' quick'.* Did you mean 'quick'"),
        ("co_routing_where", {"prompt_ids": "0,99"}, "there is no prompt 99"),
        ("transitions_where", {"token_ids": "999"}, "there is no token 999"),
        ("load_drift", {"series": "x"}, "there is no series 'x'"),
        ("changed_tokens", {"run": "step-1", "other_run": "007"}, "do not have the same tokens"),
        ("expert_top_tokens", {"layer": "two", "expert": "6"}, "layer is a whole number"),
    ],
)
def test_spark_names_what_does_not_exist(
    name: str, values: dict[str, Value], says: str, layout: Layout, session: SparkSession
) -> None:
    ask = Engine(lambda query, values: spark.answer(session, layout, query, values))
    with pytest.raises(MoewhError, match=says):
        ask(queries.find_query(name), values)


def test_spark_refuses_a_segment_without_a_rollup(tmp_path: Path, session: SparkSession) -> None:
    small = Layout(tmp_path)
    small.create()
    write_run(small, random_run("r", 1, {0: (4, 2)}))
    (small.segment("r", 1) / "pair_counts.parquet").unlink()
    with pytest.raises(MoewhError, match=r"segment=1 lacks pair_counts.parquet"):
        spark.answer(session, small, queries.find_query("co_routing"), {})
    spark.answer(session, small, queries.find_query("expert_load"), {})


WRONG: list[tuple[str, dict[str, Value], str]] = [
    ("select getvariable('layer')", {}, "needs the parameter layer"),
    ("select 1", {"layer": 1}, "does not use the parameter 'layer'"),
    ("select 1; select 2", {}, "holds 2 SQL statements"),
    ("create table t as select 1", {}, "is not a query"),
    ("select from where", {}, "cannot read this SQL"),
]


@pytest.mark.parametrize(("sql", "values", "says"), WRONG)
def test_spark_wrong_use(sql: str, values: dict[str, Value], says: str, layout: Layout, session: SparkSession) -> None:
    with pytest.raises(UsageError, match=says):
        spark.answer(session, layout, Query("test", sql), values, unsafe=True)


def test_spark_own_sql_needs_unsafe(layout: Layout, session: SparkSession) -> None:
    query = Query("mine.sql", "select java_method('java.lang.System', 'getProperty', 'user.home') as home")
    with pytest.raises(UsageError, match=r"outside the jail in Spark. Add --unsafe"):
        spark.answer(session, layout, query, {})
    with pytest.raises(MoewhError, match=r"Spark: .*nothing_here"):
        spark.answer(session, layout, Query("mine.sql", "select nothing_here from routes"), {}, unsafe=True)


# Traps: SQL that is invalid or means something else in Spark unless it is written or translated with care.
TRAPS = {
    "two unnest, one a SELECT": (
        "with a as (select token_id, list(expert) as e from routing where layer = 0 group by token_id), "
        "b as (select token_id, e, unnest(e) as x from a), c as (select token_id, x, unnest(e) as y from b) "
        "select x, y, count(*)::bigint as n from c group by x, y"
    ),
    "log2 and ln, never log": "select log2(8.0::double) as a, ln(8.0::double) as b",
    "integer division": "select 7::bigint::double / 2 as half",
    "nulls last": "select domain from prompts group by domain order by domain desc",
    "list_extract counts from 1": (
        "select token_id, list_extract(logits, 1)::double as one, list_extract(logits, 99)::double as none "
        "from router_logits"
    ),
    "text in order": (
        "select token_id, string_agg(expert::varchar, '-' order by layer, rank) as path from routing "
        "where run_id = '007' group by token_id order by token_id"
    ),
    "booleans and null": "select getvariable('x') is null as missing, coalesce(getvariable('x'), 0.1)::double as x",
}


@pytest.mark.parametrize("trap", TRAPS)
def test_spark_trap(trap: str, layout: Layout, session: SparkSession) -> None:
    assert_same(layout, session, Query("trap", TRAPS[trap], shipped=True), {}, ordered="order by" in TRAPS[trap])


@pytest.mark.parametrize("word", ["log(", "unnest(", "macro", "list_", "isinf(", "isfinite("])
def test_shipped_sql_avoids_what_engines_read_differently(word: str) -> None:
    """log(x) has base 10 in DuckDB and e in Spark; two unnests in one SELECT go in step, or make all pairs."""
    for path in sorted(QUERIES.rglob("*.sql")):
        code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("--"))
        code = code.replace("list_extract(", "")  # translated
        for select in code.split("select"):
            assert select.count(word) <= (1 if word == "unnest(" else 0), path


@pytest.mark.usefixtures("session")
def test_moewh_query_on_spark(layout: Layout) -> None:
    arguments = ["query", "load_balance", "--engine", "spark", "--format", "csv", "--warehouse", str(layout.root)]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "run_id,layer,entropy,normalized_entropy,cv,gini,max_over_mean,dead_experts"
    assert lines[1].startswith("007,0,")
    assert len(lines) == 1 + 3 + 3 + 2 + 3 * 3 + 1 + 1


SPARK_TYPES = """
select true as b, cast(1 as tinyint) as i8, cast(2 as bigint) as i64, cast(1.5 as float) as f,
    cast('nan' as double) as d,
    cast('1234567890123456789.123456789' as decimal(38, 9)) as e, 'a,"b"' as s, cast('a' as binary) as z,
    date '2026-01-02' as day, cast('2026-01-02 03:04:05' as timestamp) as t, array(1, null) as l,
    struct('x' as a, array('q"r') as c) as st, null as n
"""


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize("form", FORMATS)
def test_spark_types_in_every_format(form: str, layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "x"
    arguments = ["query", "-c", SPARK_TYPES, "--engine", "spark", "--unsafe", "--format", form, "-o", str(file)]
    done = CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])
    assert done.exit_code == 0, done.stderr
    if form == "json":
        (row,) = json.loads(file.read_text())
        instant = row.pop("t")
        assert datetime.fromisoformat(instant).astimezone(UTC).isoformat() == "2026-01-02T03:04:05+00:00"
        assert row == {
            "b": True, "i8": 1, "i64": 2, "f": 1.5, "d": "nan", "e": "1234567890123456789.123456789", "s": 'a,"b"',
            "z": "a", "day": "2026-01-02", "l": [1, None], "st": {"a": "x", "c": ['q"r']}, "n": None,
        }  # fmt: skip
    elif form == "parquet":
        assert pq.read_table(file).column("e").to_pylist() == [Decimal("1234567890123456789.123456789")]
    else:
        assert "1234567890123456789.123456789" in file.read_text(encoding="utf-8")


@pytest.mark.usefixtures("session")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--engine", "spark", "--timeout", "3"], "for --engine duckdb"),
        (["--master", "local[2]"], "for --engine spark"),
    ],
)
def test_moewh_query_options_of_the_other_engine(arguments: list[str], says: str, layout: Layout) -> None:
    done = CliRunner().invoke(main, ["query", "load_balance", *arguments, "--warehouse", str(layout.root)])
    assert done.exit_code == 2
    assert says in done.stderr


CLUSTER = """
import sys
from pathlib import Path
from tests.support.two_engines import assert_same
from moewh.warehouse.answer import query, spark
from moewh.warehouse.files.layout import Layout
ours = spark._settings
FEW_ROWS = {"spark.sql.shuffle.partitions": "4", "spark.buffer.pageSize": "256k"}  # not 200, and 16 MB
spark._settings = lambda master: ours(master) | FEW_ROWS
with spark.open_spark("local-cluster[2,1,1024]") as session:
    for name in sys.argv[2:]:
        assert_same(Layout(Path(sys.argv[1])), session, query.find_query(name), {}, ordered=False)
        print(name)
    hosts = session.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
    print("executors", len(hosts) - 1)
"""


def test_spark_cluster_of_two_workers_equals_duckdb(layout: Layout) -> None:
    """Two workers in separate processes, as on a cluster with a shared file system."""
    names = ["co_routing", "domain_experts"]
    environment = os.environ | {"SPARK_HOME": str(Path(pyspark.__file__).parent), "JDK_JAVA_OPTIONS": SHORT_LIVED}
    command = [sys.executable, "-c", CLUSTER, str(layout.root), *names]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.stdout.splitlines() == [*names, "executors 2"], done.stderr


def test_spark_reads_a_published_folder(tmp_path: Path, session: SparkSession) -> None:
    """By its path; a URL is refused."""
    source = publishable(tmp_path / "wh")
    publish(source, FolderTarget(tmp_path / "out"), PublishOptions())
    there = spark.on_this_machine(readable(str(tmp_path / "out")))
    for name in ("runs", "routes", "co_routing", "expert_token_affinity"):
        query = queries.find_query(name)
        expected = on_duckdb(source, query, {})
        found = answered(Engine(lambda q, v: spark.answer(session, there, q, v)), query, {})
        assert found[0] == expected[0]
        assert len(found[1]) == len(expected[1]) > 0
        for row, wanted in zip(*(sorted(rows, key=repr_without_floats) for _, rows in (found, expected)), strict=True):
            assert all(same(value, target) for value, target in zip(row, wanted, strict=True)), (row, wanted)
    with pytest.raises(UsageError, match="needs a warehouse in a folder"):
        spark.on_this_machine(Published(Remote("s3://bucket/wh", None), Published(Folder(there.root)).listing))
