"""SQL for the tables that sealing merges: from a run's sealed set if it has one, else from its segments, never both.

Every query checks that no run was sealed, unsealed or deleted while DuckDB listed its files, and that no file is
missing.
"""

from __future__ import annotations

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import (
    ANY_SEGMENT,
    FOLDERS,
    MARK,
    OWN_SEGMENTS,
    PATH_VALUES,
    SEGMENT_FOLDER,
    THROUGH_UNSEALED,
    UNSEALED,
    UNSEALED_LINK,
)
from moewh.warehouse.views.shipped import staging_query
from moewh.warehouse.views.sql import below, column_names, rows_of_table, runs_of, sql_string

LACKS = " lacks {file}: counts would omit it. Remove that folder and run its ingest again."
"""Message for a segment without a rollup's file."""

UNLINKED = "is not sealed, and a copy lost the link to its segments: counts would omit it. Run `moewh refresh`."
"""Message for a run whose link in `unsealed/` is gone, or became a file."""

NEITHER = "is neither sealed nor unsealed: counts would omit it. Run `moewh refresh`."
"""Message for a run whose counts no view can read."""

SEALED_LACKS = " is sealed and lacks {file}: counts would omit it. Run `moewh verify --repair`."
"""Message for a sealed run that lacks a file."""

_LINK_AS_FILE = f"{UNSEALED_LINK[:-1]}[{UNSEALED_LINK[-1]}]"
"""A pattern of UNSEALED_LINK: where the last name is a pattern, DuckDB lists files only; else folders, too."""

ASK_AGAIN = "Ask again."
"""Ends the message for a run that was sealed, unsealed or deleted while a query listed its files."""


def merged_select(table: schema.Table, layout: Layout, root: str) -> str:
    """Return the query of a table whose rows sealing merges: from a run's sealed set if it has one, else its segments.

    For totals: from a run's sealed set, else from the staging view over the counts of its segments.

    A run in both places is being sealed, or was when a process was killed: the sealed set is used. DuckDB lists the
    files of a query roughly in the order in which it names them. So the first listings (the runs, the sealed ones, the
    unsealed ones) are compared with the last: if they have changed, or if a run is in neither place, the query fails.
    moewh itself also compares the folders before and after (`moewh.warehouse.answer.retry`), whatever the order.
    The rows of a sealed set have no segment, except those of `segments`.
    """
    nothing = ",\n    ".join(f"null::{column.type} as {column.name}" for column in table.viewed)
    failure = ",\n    ".join(f"failure::{column.type}" for column in table.viewed)
    merged = schema.sealed(table)
    counted = [rollup for rollup in schema.ROLLUPS if rollup.name in table.totals_of] or [table]
    body = f"""with runs_there as (
    {runs_of(root, f"{FOLDERS['run']}/{schema.RUNS.file}")}
),
sealed_before as (
    {runs_of(root, f"{FOLDERS['sealed']}/{MARK}")}
),
unsealed as (
    {runs_of(root, f"{UNSEALED}/{MARK}")}
),
linked as (
    {runs_of(root, f"{UNSEALED}/{UNSEALED_LINK}")}
)
select
    {nothing}
from runs_there cross join sealed_before cross join unsealed cross join linked
where false
union all
{_unsealed_select(table, counted, layout, root)}
union all
select
    {columns_of_sealed(table)}
from {rows_of_table(merged, layout, root)} as stored
semi join sealed_before using (run_id)
union all
select
    {failure}
from (
    select error('run ' || run_id || ' was sealed, unsealed or deleted while its files were listed. {ASK_AGAIN}')
        as failure
    from sealed_before
    full join ({runs_of(root, f"{FOLDERS['sealed']}/{MARK}")}) as sealed_after using (run_id, file)
    where sealed_before.run_id is null or sealed_after.run_id is null
    union all
    select error('run ' || run_id || ' was sealed or deleted while its files were listed. {ASK_AGAIN}')
    from unsealed
    anti join ({runs_of(root, f"{UNSEALED}/{MARK}")}) as unsealed_after using (run_id, file)
    union all
    select error('run ' || run_id || ' {UNLINKED}')
    from unsealed
    semi join ({runs_of(root, f"{UNSEALED}/{MARK}")}) as unsealed_after using (run_id, file)
    semi join ({_runs_with_first(schema.SEGMENTS.file, root)}) as begun using (run_id)
    where run_id not in (select run_id from linked)
        or run_id in (select run_id from ({runs_of(root, f"{UNSEALED}/{_LINK_AS_FILE}")}) as files)
    union all
    select error('run ' || run_id || ' {NEITHER}')
    from runs_there
    where run_id not in (select run_id from sealed_before) and run_id not in (select run_id from unsealed)
    union all
    select error('run ' || run_id || '{SEALED_LACKS.format(file=table.file)}')
    from {_must_hold(table, root)}
    anti join ({runs_of(root, f"{FOLDERS['sealed']}/{table.file}")}) as held using (run_id)
) as changed
where failure is not null"""
    return body + "".join(_unless_missing(table, rollup, root) for rollup in counted if rollup.rollup)


def _unsealed_select(table: schema.Table, counted: list[schema.Table], layout: Layout, root: str) -> str:
    """Return the query of a merged table over the runs that are not in `sealed_before`."""
    through = f"{UNSEALED}/{UNSEALED_LINK}/{ANY_SEGMENT}"
    selects = [
        f"select\n    {', '.join(column_names(source))}\nfrom {rows_of_table(source, layout, root, through)} as stored"
        for source in counted
    ]
    of_unsealed = "anti join sealed_before using (run_id)"
    if not table.totals_of:
        return f"{selects[0]}\n{of_unsealed}"
    sources = ",\n".join(f"{source.name} as (\n{select}\n)" for source, select in zip(counted, selects, strict=True))
    return (  # the totals of a run come from its own counts alone, so it is left out afterwards: they have fewer rows
        f"select\n    {', '.join(column_names(table))}\nfrom (\nwith {sources}\n"
        f"select * from (\n{staging_query(table.name)}\n)\n) as unsealed_totals\n{of_unsealed}"
    )


def columns_of_sealed(table: schema.Table) -> str:
    """Return the columns of a merged table over its sealed rows, which have no segment except in `segments`."""
    held = column_names(schema.sealed(table))
    return ",\n    ".join(
        column.name if column.name in held else f"null::{column.type} as {column.name}" for column in table.viewed
    )


def _must_hold(table: schema.Table, root: str) -> str:
    """Return SQL for the sealed runs that must have a merged table: all, or those whose first segment has its rows."""
    if table.counted is None:
        return "sealed_before"
    return f"sealed_before semi join ({_runs_with_first(table.counted, root)}) as counted using (run_id)"


def _runs_with_first(file: str, root: str) -> str:
    """Return SQL for the runs whose first segment has a file; this lists the segments of no run."""
    first = f"{SEGMENT_FOLDER}0"
    return runs_of(root, f"{FOLDERS['segment'].replace(ANY_SEGMENT, first)}/{file}", f"{first}/")


def _unless_missing(table: schema.Table, rollup: schema.Table, root: str) -> str:
    """Return SQL that adds no rows to a table's view, and fails the query if an unsealed segment lacks a rollup's file.

    An opt-in rollup is required only in segments that have the rows it counts.
    A pattern matches only existing files, so such a segment would be left out silently. Every column is
    the error, so that no filter can remove the row before the error is raised.
    """
    columns = ",\n    ".join(f"failure::{column.type}" for column in table.viewed)
    folder, counted = (f"regexp_replace({alias}.file, '/[^/]*$', '')" for alias in ("segment", "counts"))
    named = f"regexp_replace({folder}, '{THROUGH_UNSEALED}', '{OWN_SEGMENTS}')"
    run_id = f"regexp_extract(segment.file, '/run_id=({PATH_VALUES['run_id']})/', 1)"
    segments, rollups = (
        below(root, f"{UNSEALED}/{UNSEALED_LINK}/{ANY_SEGMENT}/{file}")
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
