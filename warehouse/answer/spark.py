"""The same queries on Spark: the shipped `.sql` files, translated, over the same Parquet files.

In: a warehouse, a query and its values. Out: an answer that DuckDB reads. sqlglot translates each
statement from DuckDB's SQL; `getvariable` and `$name` become literals. The files are read with the schema
of `moewh.warehouse.files.schema`, so that a run called `007` stays text. Only the views that a query reads are created.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.answer.query import Answer, Query, Value, check_names
from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.errors import MoewhError, UsageError, first_line
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import ANY_RUN, FOLDERS, PATH_VALUES, RUN_FOLDER, SCHEMA_RUN, SEGMENT_FOLDER
from moewh.warehouse.remote.place import Folder
from moewh.warehouse.views.base import table_select
from moewh.warehouse.views.merged import ASK_AGAIN, LACKS, NEITHER, SEALED_LACKS
from moewh.warehouse.views.shipped import derived_views

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession
    from sqlglot import exp

    from moewh.warehouse.remote.published import Readable

DEFAULT_MASTER = "local[*]"
_TYPES = {
    "VARCHAR": "string",
    "BIGINT": "bigint",
    "INTEGER": "int",
    "FLOAT": "float",
    "DOUBLE": "double",
    "BOOLEAN": "boolean",
    "TIMESTAMP": "timestamp_ntz",
    "FLOAT[]": "array<float>",
}
_TABLES = {table.name: table for table in schema.TABLES}


class SparkError(MoewhError):
    """Spark rejected a query or failed to run it."""


@contextmanager
def open_spark(master: str | None) -> Iterator[SparkSession]:
    """Yield the existing Spark session, or a new one that is stopped at the end.

    Raises MoewhError if pyspark, sqlglot or Java is missing.
    """
    try:
        import sqlglot  # noqa: F401 - fails here, before Java is started
        from pyspark.sql import SparkSession
    except ImportError as error:
        raise MoewhError(f"--engine spark needs {error.name}. Install moewh with its extra: moewh[spark].") from error
    if (active := SparkSession.getActiveSession()) is not None:
        yield active
        return
    builder = SparkSession.builder.appName("moewh")
    for name, value in _settings(master).items():
        builder = builder.config(name, value)
    with _errors():
        session = builder.getOrCreate()
    try:
        yield session
    finally:
        session.stop()


def on_this_machine(warehouse: Readable) -> Layout:
    """Return a warehouse with a local path, which Spark needs. Raises UsageError for one at a URL, and MoewhError."""
    warehouse.require()
    if isinstance(warehouse, Layout):
        warehouse.require_whole()
        return warehouse
    if not isinstance(warehouse.place, Folder):
        raise UsageError(
            f"--engine spark needs a warehouse in a folder. Mount or copy {warehouse.root}, and name that folder "
            "with --warehouse."
        )
    return Layout(Path(warehouse.root))


def _settings(master: str | None) -> dict[str, str]:
    """Return the settings that moewh needs in a session."""
    master = master or DEFAULT_MASTER
    settings = {
        "spark.master": master,
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.sources.partitionColumnTypeInference.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "ERROR",
    }
    if master.startswith("local"):
        here = {"spark.driver.host": "127.0.0.1", "spark.driver.bindAddress": "127.0.0.1", "spark.ui.enabled": "false"}
        settings |= {**here, "spark.sql.shuffle.partitions": str(usable_cpus())}
    return settings


def answer(
    session: SparkSession, layout: Layout, query: Query, values: Mapping[str, Value], *, unsafe: bool = False
) -> Answer:
    """Run a query on Spark, collect its rows and return them as an answer like DuckDB's.

    Raises UsageError unless the SQL is a single query, for a user's own SQL without `unsafe` (Spark has no jail: its
    functions can call any Java method), and for parameter names as `moewh query` does; MoewhError for a segment that
    lacks a rollup; SparkError for a query that Spark rejects.
    """
    import duckdb

    if not query.shipped and not unsafe:
        raise UsageError(f"{query.source} would run outside the jail in Spark. Add --unsafe if you trust it.")
    tree = _parse(query.source, query.sql)
    check_names(query, values, _bound_names(tree))
    with _errors():
        create_views(session, layout, tree, values)
        rows = session.sql(to_spark(tree, values)).toArrow()
    connection = duckdb.connect()
    connection.register("answer", rows)
    return Answer(connection, "from answer", {})


def create_views(session: SparkSession, layout: Layout, tree: exp.Expr, values: Mapping[str, Value]) -> None:
    """Create the views that a query reads, directly or through others, in the session. Raises as `answer` does.

    Staging views read a query's variables, so the values are substituted in them too.
    """
    for name in _needed(tree):
        _create_view(session, layout, name, values)


def _create_view(session: SparkSession, layout: Layout, name: str, values: Mapping[str, Value]) -> None:
    if name in _TABLES:
        _read_files(session, layout.require(), _TABLES[name])
    session.sql(to_spark(_definitions()[name], values)).createOrReplaceTempView(name)


def to_spark(tree: exp.Expr, values: Mapping[str, Value]) -> str:
    """Return a parsed DuckDB query as Spark SQL, with its variables replaced by their values."""
    from sqlglot import exp

    def replaced(node: exp.Expr) -> exp.Expr:
        if isinstance(node, exp.Anonymous) and node.name.lower() == "getvariable":
            return _literal(values.get(node.expressions[0].name))
        if isinstance(node, exp.Anonymous) and node.name.lower() == "list_extract":
            return exp.Anonymous(this="try_element_at", expressions=node.expressions)  # both count from 1
        if isinstance(node, exp.Parameter | exp.Placeholder):
            return _literal(values[node.name])
        return node

    return str(tree.transform(replaced).sql(dialect="spark"))


def _literal(value: Value | None) -> exp.Expr:
    """Return a value as a literal of its DuckDB type: Spark would read 0.1 as a decimal."""
    from sqlglot import exp

    if isinstance(value, float):
        return exp.cast(exp.Literal.string(repr(value)), "double")
    return exp.convert(value)


def _parse(source: str, sql: str) -> exp.Expr:
    """Return the one query in the SQL."""
    import sqlglot
    from sqlglot import exp

    try:
        trees = [tree for tree in sqlglot.parse(sql, read="duckdb") if tree is not None]
    except sqlglot.errors.ParseError as error:
        raise UsageError(f"{source}: sqlglot cannot read this SQL: {first_line(error)}") from error
    if len(trees) != 1:
        raise UsageError(f"{source} holds {len(trees)} SQL statements. Give exactly one.")
    if not isinstance(trees[0], exp.Query):
        raise UsageError(f"{source} is not a query; --engine spark runs nothing else.")
    return trees[0]


def _bound_names(tree: exp.Expr) -> frozenset[str]:
    from sqlglot import exp

    return frozenset(node.name for node in tree.find_all(exp.Parameter, exp.Placeholder))


@cache
def _definitions() -> dict[str, exp.Expr]:
    """Return the query of every view by name; a stored table's query reads `files_of_<table>`."""
    import sqlglot

    stored = {name: _parse(name, table_select(table, f"files_of_{name} as stored")) for name, table in _TABLES.items()}
    made = {view.name: sqlglot.parse_one(view.create, read="duckdb").expression for view in derived_views()}
    return stored | made


def _needed(tree: exp.Expr) -> list[str]:
    """Return the views that a query reads, each after the views that it depends on."""
    from sqlglot import exp

    names: list[str] = []
    for table in tree.find_all(exp.Table):
        if table.name in _definitions() and table.name not in names:
            names += [name for name in _needed(_definitions()[table.name]) if name not in names]
            names.append(table.name)
    return names


def _read_files(session: SparkSession, layout: Layout, table: schema.Table) -> None:
    """Create the view `files_of_<table>`: every file of a table, with the types of the schema."""
    files = _merged_files(session, layout, table) if table in schema.MERGED else _every_file(session, layout, table)
    files.createOrReplaceTempView(f"files_of_{table.name}")


def _merged_files(session: SparkSession, layout: Layout, table: schema.Table) -> DataFrame:
    """Return the rows of a table that sealing merges: from sealed sets, and from the segments of all other runs."""
    from pyspark.sql.functions import lit

    sealed, open_runs = _states(layout)
    for run_id in sealed:
        must = table.counted is None or (layout.segment(run_id, 0) / table.counted).is_file()
        if must and not (layout.sealed(run_id) / table.file).is_file():
            raise MoewhError(f"run {run_id}{SEALED_LACKS.format(file=table.file)}")
    if table.rollup:
        _require_in_every_segment(layout, open_runs, table)
    files = _every_file(session, layout, schema.sealed(table))
    for column in (column for column in table.path_columns if column.name not in files.columns):
        files = files.withColumn(column.name, lit(None).cast(_TYPES[column.type]))
    # Spark raises an error for a pattern that matches nothing.
    counted = [run_id for run_id in open_runs if any(layout.segments(run_id).glob(f"{SEGMENT_FOLDER}*/{table.file}"))]
    if counted:
        files = files.unionByName(_files(session, layout, table, counted))
    if _states(layout) != (sealed, open_runs):
        raise MoewhError(f"a run was sealed, unsealed or begun while its files were listed. {ASK_AGAIN}")
    return files


def _every_file(session: SparkSession, layout: Layout, table: schema.Table) -> DataFrame:
    """Return the rows of a table's files, of all runs; no rows in a warehouse older than the table."""
    if table.may_lack_files and not layout.has_table(table):
        return session.createDataFrame([], _columns(table))
    return _files(session, layout, table, ["*"])


def _states(layout: Layout) -> tuple[list[str], list[str]]:
    """Return the runs that are sealed, and those whose segments are counted one by one."""
    sealed, linked, known = (
        sorted(folder.name.removeprefix(RUN_FOLDER) for folder in example.parent.glob(f"{RUN_FOLDER}*"))
        for example in (layout.sealed("x"), layout.unsealed("x"), layout.run("x"))
    )
    if lost := sorted(set(known) - {*sealed, *linked}):
        raise MoewhError(f"run {lost[0]} {NEITHER}")
    return sealed, [run_id for run_id in linked if run_id not in sealed or run_id == SCHEMA_RUN]


def _files(session: SparkSession, layout: Layout, table: schema.Table, runs: list[str]) -> DataFrame:
    """Return the rows of a table's files, of some runs or of all (`*`), in one scan, with the types of the schema."""
    top, _, pattern = FOLDERS[table.level].partition("/")
    base = layout.root / top
    # As text first: with types, Spark would fail on a folder such as `segment=0.old`, which is left out.
    texts = [f"`{column.name}` {_TYPES[column.type]}" for column in table.stored]
    texts += [f"`{column.name}` string" for column in table.path_columns]
    read = session.read.schema(", ".join(texts)).option("basePath", str(base))
    files = read.parquet(
        *(f"{_escaped(base)}/{pattern.replace(ANY_RUN, f'{RUN_FOLDER}{run_id}')}/{table.file}" for run_id in runs)
    )
    for column in table.path_columns:
        files = files.where(files[column.name].rlike(f"^({PATH_VALUES[column.name]})$"))
        files = files.withColumn(column.name, files[column.name].cast(_TYPES[column.type]))
    return files


def _columns(table: schema.Table) -> str:
    return ", ".join(f"`{column.name}` {_TYPES[column.type]}" for column in (*table.stored, *table.path_columns))


def _require_in_every_segment(layout: Layout, runs: list[str], table: schema.Table) -> None:
    """Raise MoewhError for a segment that lacks a rollup's file, as the views do in DuckDB."""
    for segment in (folder for run_id in runs for folder in sorted(layout.segments(run_id).glob(f"{SEGMENT_FOLDER}*"))):
        needed = segment / (table.counted or schema.SEGMENTS.file)
        if needed.is_file() and not (segment / table.file).is_file():
            raise MoewhError(f"segment {segment}{LACKS.format(file=table.file)}")


def _escaped(path: Path) -> str:
    """Return a Hadoop pattern that matches only this path."""
    return re.sub(r"([{}\[\]*?\\])", r"\\\1", str(path))


@contextmanager
def _errors() -> Iterator[None]:
    """Turn an exception of Spark or Java into a one-line SparkError."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        yield
    except (PySparkException, Py4JError) as error:
        raise SparkError(f"Spark: {first_line(error)}") from error
