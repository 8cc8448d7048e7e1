"""The views: one per stored table, generated from the schema, and the canned ones of `queries/views/`.

The staging views of `queries/staging/` come between the two: several canned views, saved queries, rollups and checks
share them. They are created like the others but listed nowhere.

`moewh.warehouse.views.opening` creates them in memory for moewh's own use; `moewh.warehouse.views.publishing` writes
the same statements, with comments and a guard against newer rows, to the file that a DuckDB shell opens. The views are
bound to zero-row files when they are created, so opening takes the same time for any number of segments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.errors import require_utf8
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import (
    ANY_RUN,
    ANY_SEGMENT,
    FOLDERS,
    MARK,
    PATH_VALUES,
    SCHEMA_RUN,
    STRAYS,
    THROUGH_UNSEALED,
    UNSEALED,
    UNSEALED_LINK,
    Layout,
    glob_literal,
)
from moewh.warehouse.remote.published import Published, Readable

if TYPE_CHECKING:
    import duckdb

QUERIES = Path(__file__).resolve().parent.parent.parent / "queries"

LACKS = " lacks {file}: counts would omit it. Remove that folder and run its ingest again."
"""Message for a segment without a rollup's file."""

NEITHER = "is neither sealed nor unsealed: counts would omit it. Run `moewh refresh`."
"""Message for a run whose counts no view can read."""

SEALED_LACKS = " is sealed and lacks {file}: counts would omit it. Run `moewh verify --repair`."
"""Message for a sealed run that lacks a file."""

ASK_AGAIN = "Ask again."
"""Ends the message for a run that was sealed, unsealed or deleted while a query listed its files."""

_DERIVED_RUN_COLUMNS = """
    case
        when coalesce(done.segments, 0) >= coalesce(stored.segments_planned, done.up_to_last) then 'complete'
        else 'running'
    end as status,
    coalesce(done.segments, 0)::bigint as segments,
    coalesce(done.prompts, 0)::bigint as prompts,
    coalesce(done.tokens, 0)::bigint as tokens
from {files}
left join (
    select
        run_id,
        count(*)::bigint as segments,
        sum(prompts)::bigint as prompts,
        sum(tokens)::bigint as tokens,
        max(case when last then segment + 1 end) as up_to_last
    from segments
    group by run_id
) as done
    on done.run_id = stored.run_id"""


@dataclass(frozen=True)
class View:
    """One view: its name, the statement that creates it and its COMMENT statements."""

    name: str
    create: str
    comments: tuple[str, ...]
    header: str
    """The leading comment of the view's file; for a stored table, its description."""

    @property
    def code(self) -> str:
        """The statement that creates the view, without its comment lines."""
        return re.sub(r"(?m)^\s*--.*$", "", self.create)


def view_names() -> tuple[str, ...]:
    """Return the names of all views: the stored tables first, then the canned ones in alphabetical order."""
    return (*(table.name for table in schema.TABLES), *canned_names())


def canned_names() -> tuple[str, ...]:
    """Return the names of the canned views: the stems of the files in `queries/views/`."""
    return tuple(sorted(path.stem for path in (QUERIES / "views").glob("*.sql")))


def base_views(warehouse: Readable, *, guarded: bool = False, root: str | None = None) -> list[View]:
    """Return the views over the stored tables of a warehouse, each after those it reads.

    The last ones replace staging views: `vocabulary_texts`, and those of which sealed runs store the totals, unless the
    warehouse is older than that.
    `root` is SQL for where the warehouse lies; without it the views hold its path.
    """
    if root is None:
        root = sql_string(glob_literal(warehouse.root))
    tables = sorted(schema.TABLES, key=lambda table: table is schema.RUNS)
    totals = [table for table in schema.TOTALS if warehouse.has_table(table)]
    return [
        *(_base_view(table, warehouse, guarded, root) for table in tables),
        _texts_view(warehouse, root),
        *(_totals_view(table, warehouse, root) for table in totals),
    ]


@cache
def canned_views() -> tuple[View, ...]:
    """Return the canned views, in alphabetical order."""
    return tuple(_read_view(QUERIES / "views" / f"{name}.sql") for name in canned_names())


@cache
def staging_views() -> tuple[View, ...]:
    """Return the staging views, in alphabetical order."""
    return tuple(_read_view(path) for path in sorted((QUERIES / "staging").glob("*.sql")))


def staging_query(name: str) -> str:
    """Return the query of a staging view."""
    (code,) = (view.code for view in staging_views() if view.name == name)
    return code.partition(" as\n")[2].strip()


@cache
def derived_views() -> tuple[View, ...]:
    """Return the staging and the canned views, each after those it reads."""
    from graphlib import TopologicalSorter

    views = {view.name: view for view in (*staging_views(), *canned_views())}
    reads = {
        view.name: [name for name in views if view.name != name and _reads(view.code, name)] for view in views.values()
    }
    return tuple(views[name] for name in TopologicalSorter(reads).static_order())


def staging_read_by(sql: str) -> tuple[View, ...]:
    """Return the staging views that SQL without comments reads, directly or through others, in order of reading."""
    found: list[View] = []
    for view in reversed(derived_views()):
        if view in staging_views() and any(_reads(code, view.name) for code in (sql, *(other.code for other in found))):
            found.insert(0, view)
    return tuple(found)


def _reads(code: str, name: str) -> bool:
    """Return whether SQL names a view that is not shadowed by a CTE."""
    return name in code and re.search(rf"\b{name}\b(?!\s+as\s*\()", code) is not None


def create_views(
    connection: duckdb.DuckDBPyConnection,
    warehouse: Readable,
    *,
    comments: bool,
    guarded: bool = False,
    derived: bool = True,
) -> None:
    """Create every view in the connection's current schema, in one transaction.

    `derived` is False if the schema has what `derived_statements` create.
    """
    if isinstance(warehouse, Layout):
        warehouse.linked_folders()
        zero_rows = zero_rows_of(warehouse)
    else:
        zero_rows = warehouse.connect(connection)
    statements = list(base_statements(warehouse, comments=comments, guarded=guarded))
    if derived:
        statements[:0] = derived_statements(comments=comments)
    connection.execute(";\n".join(["begin", *bound_to(zero_rows, statements), "commit"]))


def zero_rows_of(layout: Layout) -> str | None:
    """Return the folder with only the zero-row files of a warehouse on this machine; None if it is missing."""
    return glob_literal(layout.empty) if layout.empty.is_dir() else None


def bound_to(zero_rows: str | None, statements: Iterable[str]) -> Iterator[str]:
    """Yield statements that make views, and those that let DuckDB find the files of each in `zero_rows` meanwhile.

    DuckDB looks at the files of each view it makes: of a whole warehouse, it would list all segments once per view.
    """
    if zero_rows is not None:
        yield f"set variable moewh_root = {sql_string(zero_rows)}"
    yield from statements
    yield "reset variable moewh_root"


def view_statements(
    warehouse: Readable, *, comments: bool, guarded: bool = False, root: str | None = None
) -> Iterator[str]:
    """Yield the statements that create every view, each after those it reads.

    `guarded` views also check whether the warehouse has become newer than they are, as moewh itself does on opening.
    `root` is SQL for the path of the warehouse; without it the views contain the path itself.

    DuckDB binds again everything that a view reads. So the canned views are created over views that only have the
    columns, which the views of the files then replace; this halves the time.
    """
    yield from derived_statements(comments=comments)
    yield from base_statements(warehouse, comments=comments, guarded=guarded, root=root)


def derived_statements(*, comments: bool) -> Iterator[str]:
    """Yield the statements that create the staging and canned views, over views that only have the columns."""
    yield from (_columns_alone(table) for table in schema.TABLES)
    yield from _statements(derived_views(), comments=comments)


def base_statements(
    warehouse: Readable, *, comments: bool, guarded: bool = False, root: str | None = None
) -> Iterator[str]:
    """Yield the statements that create or replace the views over the stored tables, as `view_statements` does."""
    yield from _statements(base_views(warehouse, guarded=guarded, root=root), comments=comments)


def _statements(views: Iterable[View], *, comments: bool) -> Iterator[str]:
    for view in views:
        yield view.create
        if comments:
            yield from view.comments


def _columns_alone(table: schema.Table) -> str:
    """Return the statement that creates a stored table's view without rows and without opening any file."""
    columns = ", ".join(f"null::{column.type} as {column.name}" for column in _in_order(table))
    return f"create or replace view {table.name} as select {columns} where false"


def _in_order(table: schema.Table) -> tuple[schema.Column, ...]:
    """Return the columns of a stored table's view in the order of `table_select`."""
    return (*table.path_columns, *table.stored, *(column for column in table.columns if column.derived))


def sql_string(text: str) -> str:
    """Return text as an SQL string literal. Raises UsageError for a path that is not UTF-8: DuckDB takes no other."""
    require_utf8(text)
    return "'" + text.replace("'", "''") + "'"


def _base_view(table: schema.Table, warehouse: Readable, guarded: bool, root: str) -> View:
    comments = (
        f"comment on view {table.name} is {sql_string(table.description)}",
        *(
            f"comment on column {table.name}.{column.name} is {sql_string(column.description)}"
            for column in (*table.path_columns, *table.columns)
        ),
    )
    if isinstance(warehouse, Published):
        body = _published_select(table, warehouse, root)
    else:
        body = _select(table, warehouse, root)
        if guarded and table.level == "run":
            body += _unless_newer(table, root)
    return View(table.name, f"create or replace view {table.name} as\n{body}", comments, table.description)


def _totals_view(table: schema.Table, warehouse: Readable, root: str) -> View:
    """Return the view of totals: the rows that sealed runs store, and its staging view over the other runs."""
    if isinstance(warehouse, Published):
        return _instead_of(table.name, _published_select(table, warehouse, root))
    return _instead_of(table.name, _merged_select(table, warehouse, root))


def _texts_view(warehouse: Readable, root: str) -> View:
    """Return the view of the texts of vocabularies, which reads one file of those that are the same."""
    files = _published_texts(warehouse, root) if isinstance(warehouse, Published) else _texts(root)
    keys = "vocabulary_key,\n    vocab_id"
    body = f"select\n    {keys},\n    min(token) as token\n{files}\ngroup by\n    {keys}"
    return _instead_of("vocabulary_texts", body)


def _instead_of(name: str, body: str) -> View:
    """Return the view with another query than its file in `queries/staging/`."""
    (staging,) = (view for view in staging_views() if view.name == name)
    return View(name, f"create or replace view {name} as\n{body}", staging.comments, staging.header)


def _texts(root: str) -> str:
    """Return the FROM clause of `vocabulary_texts`: for each vocabulary, the file of the first run that has it.

    In a join, DuckDB lets the smaller table choose files of the larger, and looks rows of the larger up in the smaller.
    Two tables whose zero-row files come first are equally small, and the order here decides.
    """
    runs, vocabularies = (f"{FOLDERS['run']}/{table.file}" for table in (schema.RUNS, schema.VOCABULARY))
    return f"""from {_with_filename(schema.VOCABULARY, _zero_rows_first(root, vocabularies))} as entries
join (
    select vocabulary_key, min(file) as file
    from (
        select vocabulary_key, regexp_replace(filename, '[^/]*$', '{schema.VOCABULARY.file}') as file
        from {_with_filename(schema.RUNS, _zero_rows_first(root, runs))}
        where {_no_stray(root, runs)}
    ) as wanted
    semi join glob({_below(root, vocabularies)}) as there using (file)
    group by vocabulary_key
) as chosen
    on chosen.file = entries.filename"""


def _published_texts(published: Published, root: str) -> str:
    """Return the FROM clause of `vocabulary_texts` over a published warehouse, which lists the digest of each file."""
    *paths, zero_rows = published.listing.files_of(schema.VOCABULARY)
    path_by_key = {schema.vocabulary_key(published.listing.files[path].sha256): path for path in reversed(paths)}
    selects = [
        f"select {sql_string(key)} as vocabulary_key, vocab_id, token\n    from "
        + _rows(schema.VOCABULARY, f"[{_below(root, zero_rows)}, {_below(root, path)}]", FOLDERS["run"])
        for key, path in sorted((path_by_key or {"": zero_rows}).items())
    ]
    every = "\n    union all\n    ".join(selects)
    return f"from (\n    {every}\n) as entries"


def _select(table: schema.Table, layout: Layout, root: str) -> str:
    """Return the query of a table's view over a warehouse that moewh writes."""
    if table in schema.MERGED:
        return _merged_select(table, layout, root)
    return table_select(table, f"{_files(table, layout, root)} as stored")


def _published_select(table: schema.Table, published: Published, root: str) -> str:
    """Return the query of a table's view over the files that a published warehouse lists; every run there is sealed."""
    stored = schema.sealed(table) if table in schema.MERGED else table
    paths = [_below(root, path) for path in published.listing.files_of(table)]
    files = _rows(stored, f"[{', '.join(paths)}]", FOLDERS[stored.level]) if paths else _no_rows(stored)
    if stored is table:
        return table_select(table, f"{files} as stored")
    return f"select\n    {_of_sealed(table)}\nfrom {files} as stored"


def _of_sealed(table: schema.Table) -> str:
    """Return the columns of a merged table over its sealed rows, which have no segment except in `segments`."""
    held = _names(schema.sealed(table))
    columns = (*table.path_columns, *table.columns)
    return ",\n    ".join(
        column.name if column.name in held else f"null::{column.type} as {column.name}" for column in columns
    )


def table_select(table: schema.Table, files: str) -> str:
    """Return the query of a stored table's view over `files`, SQL for the rows of all its files, named `stored`."""
    if table is not schema.RUNS:
        columns = ",\n    ".join(column.name for column in (*table.path_columns, *table.columns))
        return f"select\n    {columns}\nfrom {files}"
    stored = ",\n    ".join(f"stored.{column.name}" for column in (*table.path_columns, *table.stored))
    return f"select\n    {stored},{_DERIVED_RUN_COLUMNS.format(files=files)}"


def _files(table: schema.Table, layout: Layout, root: str, folders: str | None = None) -> str:
    """Return a subquery over every file of a table; without rows for a warehouse that is older than the table.

    `folders` is a pattern of folders to use instead of those of the table's level. A folder that is not a run's or a
    segment's, such as a copy called `segment=0.old`, is left out; `moewh verify` reports it.
    """
    if (table.level == "geometry" or table.since > 1) and not layout.has_table(table):
        return _no_rows(table)
    folders = folders or FOLDERS[table.level]
    path = f"{folders}/{table.file}"
    return _rows(table, _below(root, path), folders, f" where {_no_stray(root, path)}")


def _no_stray(root: str, path: str) -> str:
    """Return SQL for whether no folder of `filename`, which matches `path` below the root, is a stray.

    DuckDB evaluates this for each of thousands of files before it opens one, and each function takes time: patterns of
    the whole of `filename` need no other. They leave its start open, because DuckDB may spell it differently, as for
    `~` or a double slash. Where the warehouse itself lies in a folder of a run, its folders are compared one by one.
    """
    above = f"coalesce(getvariable('moewh_root'), {root}) || '/' glob '*/{path.partition('/')[0]}/run_id=*/*'"
    return f"case when {above} then {_are_legal(path, one_by_one=True)} else {_are_legal(path)} end"


def _are_legal(path: str, *, one_by_one: bool = False) -> str:
    """Return SQL for whether the names of all folders of `filename` are legal: `_no_stray` in one of two ways."""
    tests = []
    for pattern, name in ((each, name) for each, names in STRAYS.items() if each in path for name in names):
        text, stray, schema_run = "filename", f"*/{path.replace(pattern, name)}", f"*/{_of_zero_rows(path)}"
        if one_by_one:
            text, stray, schema_run = _folder(path.rpartition("/")[0], pattern), name, _of_zero_rows(pattern)
        test = f"not {text} glob '{stray}'"
        tests.append(f"({test} or {text} glob '{schema_run}')" if pattern == ANY_RUN else test)
    return " and ".join(tests)


def _folder(folders: str, pattern: str) -> str:
    """Return SQL for the name of the folder of `filename` that one of the patterns in `folders` matches."""
    depth = folders.split("/")[::-1].index(pattern) + 2
    return f"string_split(filename, '/')[-{depth}]"


def _of_zero_rows(folders: str) -> str:
    """Return those of the folders that a pattern matches which hold the zero-row files."""
    return folders.replace(ANY_RUN, f"run_id={SCHEMA_RUN}")


def _rows(table: schema.Table, files: str, folders: str, where: str = "") -> str:
    """Return a subquery over the rows of `files`, SQL for a pattern or a list of paths: the columns of the path first.

    They are read from the end of the path, which `folders` describes, so that folders above the root do not matter:
    DuckDB's own partitioning would use every `name=value` of the whole path and hide columns of the file. They are
    constant within a file, so a filter on them skips files before they are opened.
    """
    patterns = {"run_id": ANY_RUN, "segment": ANY_SEGMENT}
    values = [
        f"substr({_folder(folders, patterns[column.name])}, {len(column.name) + 2})::{column.type} as {column.name}"
        for column in table.path_columns
    ]
    columns = ", ".join([*values, *(column.name for column in table.stored)])
    return f"(select {columns} from {_with_filename(table, files)}{where})"


def _with_filename(table: schema.Table, files: str) -> str:
    """Return the call that reads the stored columns of `files`, SQL for a pattern or a list, and `filename`."""
    return f"read_parquet({files}, hive_partitioning = false, filename = true{_given_schema(table)})"


def _no_rows(table: schema.Table) -> str:
    """Return a subquery with the columns of a table and no rows."""
    nothing = ", ".join(f"null::{column.type} as {column.name}" for column in (*table.path_columns, *table.stored))
    return f"(select {nothing} where false)"


def _given_schema(table: schema.Table) -> str:
    """Return the option that fills columns missing from older files with NULL; empty for a table without such columns.

    `union_by_name` would do the same, but reads the footer of every file before a filter can skip it.
    """
    if not table.newer:
        return ""
    columns = ", ".join(
        f"{sql_string(column.name)}: {{name: {sql_string(column.name)}, type: '{column.type}', default_value: null}}"
        for column in table.stored
    )
    return f", schema = map {{{columns}}}"


def _zero_rows_first(root: str, path: str) -> str:
    """Return SQL for a list of the zero-row file that a pattern below the root matches, and the pattern.

    DuckDB estimates a table's size from its first file, and takes this one for empty when it plans a join.
    """
    return f"[{_below(root, _of_zero_rows(path))}, {_below(root, path)}]"


def _below(root: str, path: str) -> str:
    """Return SQL for a path or pattern below the root, wherever the warehouse is now."""
    return f"coalesce(getvariable('moewh_root'), {root}) || '/{path}'"


def _merged_select(table: schema.Table, layout: Layout, root: str) -> str:
    """Return the query of a table whose rows sealing merges: from a run's sealed set if it has one, else its segments.

    For totals: from a run's sealed set, else from the staging view over the counts of its segments.

    A run in both places is being sealed, or was when a process was killed: the sealed set is used. DuckDB lists the
    files of a query roughly in the order in which it names them. So the first listings (the runs, the sealed ones, the
    unsealed ones) are compared with the last: if they have changed, or if a run is in neither place, the query fails.
    moewh itself also compares the folders before and after (`moewh.warehouse.answer.again`), whatever the order.
    The rows of a sealed set have no segment, except those of `segments`.
    """
    columns = (*table.path_columns, *table.columns)
    nothing = ",\n    ".join(f"null::{column.type} as {column.name}" for column in columns)
    failure = ",\n    ".join(f"failure::{column.type}" for column in columns)
    merged = schema.sealed(table)
    counted = [rollup for rollup in schema.ROLLUPS if rollup.name in table.totals_of] or [table]
    body = f"""with runs_there as (
    {_runs_of(root, f"{FOLDERS['run']}/{schema.RUNS.file}")}
),
sealed_before as (
    {_runs_of(root, f"{FOLDERS['sealed']}/{MARK}")}
),
unsealed as (
    {_runs_of(root, f"{UNSEALED}/{MARK}")}
)
select
    {nothing}
from runs_there cross join sealed_before cross join unsealed
where false
union all
{_unsealed_select(table, counted, layout, root)}
union all
select
    {_of_sealed(table)}
from {_files(merged, layout, root)} as stored
semi join sealed_before using (run_id)
union all
select
    {failure}
from (
    select error('run ' || run_id || ' was sealed, unsealed or deleted while its files were listed. {ASK_AGAIN}')
        as failure
    from sealed_before
    full join ({_runs_of(root, f"{FOLDERS['sealed']}/{MARK}")}) as sealed_after using (run_id, file)
    where sealed_before.run_id is null or sealed_after.run_id is null
    union all
    select error('run ' || run_id || ' was sealed or deleted while its files were listed. {ASK_AGAIN}')
    from unsealed
    anti join ({_runs_of(root, f"{UNSEALED}/{MARK}")}) as unsealed_after using (run_id, file)
    union all
    select error('run ' || run_id || ' {NEITHER}')
    from runs_there
    where run_id not in (select run_id from sealed_before) and run_id not in (select run_id from unsealed)
    union all
    select error('run ' || run_id || '{SEALED_LACKS.format(file=table.file)}')
    from {_must_hold(table, root)}
    anti join ({_runs_of(root, f"{FOLDERS['sealed']}/{table.file}")}) as held using (run_id)
) as changed
where failure is not null"""
    return body + "".join(_unless_missing(table, rollup, root) for rollup in counted if rollup.rollup)


def _unsealed_select(table: schema.Table, counted: list[schema.Table], layout: Layout, root: str) -> str:
    """Return the query of a merged table over the runs that are not in `sealed_before`."""
    through = f"{UNSEALED}/{UNSEALED_LINK}/{ANY_SEGMENT}"
    selects = [
        f"select\n    {', '.join(_names(source))}\nfrom {_files(source, layout, root, through)} as stored"
        for source in counted
    ]
    of_unsealed = "anti join sealed_before using (run_id)"
    if not table.totals_of:
        return f"{selects[0]}\n{of_unsealed}"
    sources = ",\n".join(f"{source.name} as (\n{select}\n)" for source, select in zip(counted, selects, strict=True))
    return (  # the totals of a run come from its own counts alone, so it is left out afterwards: they have fewer rows
        f"select\n    {', '.join(_names(table))}\nfrom (\nwith {sources}\n"
        f"select * from (\n{staging_query(table.name)}\n)\n) as unsealed_totals\n{of_unsealed}"
    )


def _must_hold(table: schema.Table, root: str) -> str:
    """Return SQL for the sealed runs that must have a merged table: all, or those whose first segment has its rows."""
    if table.counted is None:
        return "sealed_before"
    counted = _runs_of(root, f"{FOLDERS['segment'].replace(ANY_SEGMENT, 'segment=0')}/{table.counted}", "segment=0/")
    return f"sealed_before semi join ({counted}) as counted using (run_id)"


def _runs_of(root: str, pattern: str, between: str = "") -> str:
    """Return SQL for the runs that have a file matching `pattern` below the root, and its path.

    `between` is the path between the run's folder and the file.
    """
    end = f"'/run_id=({PATH_VALUES['run_id']})/{between}[^/]*$'"
    files = f"glob({_below(root, pattern)})"
    return f"select regexp_extract(file, {end}, 1) as run_id, file from {files} where regexp_matches(file, {end})"


def _names(table: schema.Table) -> list[str]:
    return [column.name for column in (*table.path_columns, *table.columns)]


def _unless_missing(table: schema.Table, rollup: schema.Table, root: str) -> str:
    """Return SQL that adds no rows to a table's view, and fails the query if an unsealed segment lacks a rollup's file.

    An opt-in rollup is required only in segments that have the rows it counts.
    A pattern matches only existing files, so such a segment would be left out silently. Every column is
    the error, so that no filter can remove the row before the error is raised.
    """
    columns = ",\n    ".join(f"failure::{column.type}" for column in (*table.path_columns, *table.columns))
    folder, counted = (f"regexp_replace({alias}.file, '/[^/]*$', '')" for alias in ("segment", "counts"))
    named = f"regexp_replace({folder}, '{THROUGH_UNSEALED}', '/segments/run_id=\\1/')"
    run_id = f"regexp_extract(segment.file, '/run_id=({PATH_VALUES['run_id']})/', 1)"
    segments, rollups = (
        _below(root, f"{UNSEALED}/{UNSEALED_LINK}/{ANY_SEGMENT}/{file}")
        for file in (rollup.counted or schema.SEGMENTS.file, rollup.file)
    )
    return f"""
union all
select
    {columns}
from (
    select error('segment ' || {named} || {sql_string(LACKS.format(file=rollup.file))}) as failure
    from glob({segments}) as segment
    anti join glob({rollups}) as counts
        on {counted} = {folder}
    where {run_id} not in (select run_id from sealed_before)
) as missing
where failure is not null"""


def _unless_newer(table: schema.Table, root: str) -> str:
    """Return SQL that adds no rows, and fails the query if the warehouse has another format or a newer schema.

    The manifest of the zero-row files gives the version of the warehouse (see `Layout.require`). The error is inside a
    CASE, which no filter can bypass.
    """
    columns = ",\n    ".join(f"failure::{column.type}" for column in _in_order(table))
    manifest = _below(root, f"segments/run_id={SCHEMA_RUN}/segment=0/manifest.json")
    form, version = (
        f"try_cast(regexp_extract(content, '\"{name}\": ([0-9]+)', 1) as integer)" for name in ("format", "schema")
    )
    return f"""
union all
select
    {columns}
from (
    select
        case
            when {form} < {schema.FORMAT_VERSION} then error(
                'this warehouse was written by an older moewh (format ' || {form}
                || '; this file reads {schema.FORMAT_VERSION}). {schema.OLDER_REMEDY}'
            )
            when {form} > {schema.FORMAT_VERSION} or {version} > {schema.SCHEMA_VERSION} then error(
                'this warehouse was written to by a newer moewh (format ' || {form} || ', schema ' || {version}
                || '; this file reads {schema.FORMAT_VERSION} and {schema.SCHEMA_VERSION}). '
                || 'Upgrade moewh and run `moewh refresh`.'
            )
        end as failure
    from read_text({manifest})
) as other
where failure is not null"""


def _read_view(path: Path) -> View:
    """Split a view's file into its header, the statement that creates it, and its COMMENT statements."""
    text = path.read_text(encoding="utf-8")
    create, *comments = (statement for statement in text.split(";\n") if statement.strip())
    header = "\n".join(line.removeprefix("--").strip() for line in text.splitlines() if line.startswith("--"))
    return View(path.stem, create, tuple(comments), header)
