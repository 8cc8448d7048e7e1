"""The views over the stored tables, generated from the schema: one per table.

They also replace the staging views of which a warehouse stores more than their SQL reads: totals of sealed runs, and
the texts of vocabularies.
"""

from __future__ import annotations

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import FOLDERS, RUN_FOLDER, SCHEMA_RUN, SEGMENT_FOLDER, glob_literal
from moewh.warehouse.remote.published import Published, Readable
from moewh.warehouse.views.merged import columns_of_sealed, merged_select
from moewh.warehouse.views.shipped import View, staging_views
from moewh.warehouse.views.sql import (
    below,
    no_rows,
    no_stray,
    rows_of_files,
    rows_of_table,
    sql_string,
    with_filename,
    zero_rows_first,
)

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
        _texts_view(warehouse, guarded, root),
        *(_totals_view(table, warehouse, root) for table in totals),
    ]


def _base_view(table: schema.Table, warehouse: Readable, guarded: bool, root: str) -> View:
    comments = (
        f"comment on view {table.name} is {sql_string(table.description)}",
        *(
            f"comment on column {table.name}.{column.name} is {sql_string(column.description)}"
            for column in table.viewed
        ),
    )
    if isinstance(warehouse, Published):
        body = _published_select(table, warehouse, root)
    else:
        body = _select(table, warehouse, root)
        if guarded and table.level == "run":
            body += _unless_newer([column.type for column in columns_in_order(table)], root)
    return View(table.name, f"create or replace view {table.name} as\n{body}", comments, table.description)


def _totals_view(table: schema.Table, warehouse: Readable, root: str) -> View:
    """Return the view of totals: the rows that sealed runs store, and its staging view over the other runs."""
    if isinstance(warehouse, Published):
        return _instead_of(table.name, _published_select(table, warehouse, root))
    return _instead_of(table.name, merged_select(table, warehouse, root))


def _texts_view(warehouse: Readable, guarded: bool, root: str) -> View:
    """Return the view of the texts of vocabularies, which reads one file of those that are the same."""
    files = _published_texts(warehouse, root) if isinstance(warehouse, Published) else _texts(guarded, root)
    keys = "vocabulary_key,\n    vocab_id"
    body = f"select\n    {keys},\n    min(token) as token\n{files}\ngroup by\n    {keys}"
    return _instead_of("vocabulary_texts", body)


def _instead_of(name: str, body: str) -> View:
    """Return the view with another query than its file in `queries/staging/`."""
    (staging,) = (view for view in staging_views() if view.name == name)
    return View(name, f"create or replace view {name} as\n{body}", staging.comments, staging.header)


def _texts(guarded: bool, root: str) -> str:
    """Return the FROM clause of `vocabulary_texts`: for each vocabulary, the file of the first run that has it.

    In a join, DuckDB lets the smaller table choose files of the larger, and looks rows of the larger up in the smaller.
    Two tables whose zero-row files come first are equally small, and the order here decides.
    """
    runs, vocabularies = (f"{FOLDERS['run']}/{table.file}" for table in (schema.RUNS, schema.VOCABULARY))
    guard = _unless_newer(["VARCHAR", "VARCHAR"], root) if guarded else ""
    return f"""from {with_filename(schema.VOCABULARY, zero_rows_first(root, vocabularies))} as entries
join (
    select vocabulary_key, min(file) as file
    from (
        select vocabulary_key, regexp_replace(filename, '[^/]*$', '{schema.VOCABULARY.file}') as file
        from {with_filename(schema.RUNS, zero_rows_first(root, runs))}
        where {no_stray(root, runs)}{guard}
    ) as wanted
    semi join glob({below(root, vocabularies)}) as there using (file)
    group by vocabulary_key
) as chosen
    on chosen.file = entries.filename"""


def _published_texts(published: Published, root: str) -> str:
    """Return the FROM clause of `vocabulary_texts` over a published warehouse, which lists the digest of each file."""
    *paths, zero_rows = published.listing.files_of(schema.VOCABULARY)
    path_by_key = {schema.vocabulary_key(published.listing.files[path].sha256): path for path in reversed(paths)}
    selects = [
        f"select {sql_string(key)} as vocabulary_key, vocab_id, token\n    from "
        + rows_of_files(schema.VOCABULARY, f"[{below(root, zero_rows)}, {below(root, path)}]", FOLDERS["run"])
        for key, path in sorted((path_by_key or {"": zero_rows}).items())
    ]
    every = "\n    union all\n    ".join(selects)
    return f"from (\n    {every}\n) as entries"


def _select(table: schema.Table, layout: Layout, root: str) -> str:
    """Return the query of a table's view over a warehouse that moewh writes."""
    if table in schema.MERGED:
        return merged_select(table, layout, root)
    return table_select(table, f"{rows_of_table(table, layout, root)} as stored")


def _published_select(table: schema.Table, published: Published, root: str) -> str:
    """Return the query of a table's view over the files that a published warehouse lists; every run there is sealed."""
    stored = schema.sealed(table) if table in schema.MERGED else table
    paths = [below(root, path) for path in published.listing.files_of(table)]
    files = rows_of_files(stored, f"[{', '.join(paths)}]", FOLDERS[stored.level]) if paths else no_rows(stored)
    if stored is table:
        return table_select(table, f"{files} as stored")
    return f"select\n    {columns_of_sealed(table)}\nfrom {files} as stored"


def table_select(table: schema.Table, files: str) -> str:
    """Return the query of a stored table's view over `files`, SQL for the rows of all its files, named `stored`."""
    if table is not schema.RUNS:
        columns = ",\n    ".join(column.name for column in table.viewed)
        return f"select\n    {columns}\nfrom {files}"
    stored = ",\n    ".join(f"stored.{column.name}" for column in (*table.path_columns, *table.stored))
    return f"select\n    {stored},{_DERIVED_RUN_COLUMNS.format(files=files)}"


def columns_in_order(table: schema.Table) -> tuple[schema.Column, ...]:
    """Return the columns of a stored table's view in the order of `table_select`."""
    return (*table.path_columns, *table.stored, *(column for column in table.columns if column.derived))


def _unless_newer(types: list[str], root: str) -> str:
    """Return SQL that adds no rows, and fails the query if the warehouse has another format or a newer schema.

    The manifest of the zero-row files gives the version of the warehouse (see `Layout.require`). The error is inside a
    CASE, which no filter can bypass.
    """
    columns = ",\n    ".join(f"failure::{type_}" for type_ in types)
    manifest = below(root, f"segments/{RUN_FOLDER}{SCHEMA_RUN}/{SEGMENT_FOLDER}0/{schema.MANIFEST}")
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
