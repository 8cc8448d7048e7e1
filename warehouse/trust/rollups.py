"""The definitions of the rollups as SQL over the raw rows, and a comparison with the stored counts.

A rollup is a table of counts that every segment stores beside its rows. `queries/rollups/<table>.sql`
defines it; `moewh.ingest.write.rollups` computes the same counts faster while it writes a segment. The totals of a
sealed run are compared in the same way with the staging views over its counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.files import schema
from moewh.warehouse.views.shipped import QUERIES, staging_query
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    from moewh.warehouse.answer.engine import Ask

TOLERANCE = 1e-9
"""Relative tolerance between a stored sum of weights and the SQL's, which adds in another order."""


@dataclass(frozen=True)
class RollupDifference:
    """One row of a rollup that differs from the counts of the segment's rows."""

    table: str
    run_id: str
    segment: int | None
    """None if a sealed run's merged counts are compared."""
    key: str
    """The row's key as `column = value, …`."""
    stored: str | None
    """The counts in the file; None if it lacks the row."""
    expected: str | None
    """The counts from the SQL; None if it returns no such row."""

    @property
    def text(self) -> str:
        """The row's key, and its counts on both sides."""
        return f"{self.key}: stored {self.stored or 'no row'}, the rows give {self.expected or 'no row'}"


_SEGMENTS = """
with sealed as (select distinct run_id from expert_counts where segment is null)
select
    sealed.run_id is not null as is_sealed, segments.run_id, segments.segment, segments.routing_rows, segments.tokens
from segments
left join sealed on sealed.run_id = segments.run_id
order by is_sealed, segments.run_id, segments.segment
"""
ROWS_AT_ONCE = 64 << 20
"""Routing rows that one query counts again, unless a single segment or sealed run has more."""


@dataclass(frozen=True)
class _Unit:
    """The rows that one query compares."""

    sealed: bool
    """True to compare the merged counts of sealed runs with the sums over all segments of the run."""
    runs: tuple[str, ...]
    segment: int | None = None
    """One segment of one run; None for all segments of the runs."""


def definition(table: schema.Table) -> str:
    """Return the SQL that defines a rollup over every segment, with run_id and segment as its first columns."""
    return (QUERIES / "rollups" / f"{table.name}.sql").read_text(encoding="utf-8")


def compare(ask: Ask, only: Value | None = None) -> Iterator[RollupDifference]:
    """Yield every row in which a stored rollup, or a sealed run's totals, differ from their definition, on any engine.

    Small runs are compared together, large ones segment by segment, and a sealed run, whose counts are merged, as a
    whole. `only` limits the comparison to that run. Runs imported as counts only are skipped: they have no rows to
    count.
    """
    segments = [row for row in _rows(ask, _SEGMENTS) if only in (None, row[1])]
    with_tokens = {run_id for _, run_id, _, _, tokens in segments if tokens}  # the others have a load but no rows
    for unit in _units(segments):
        for table in schema.ROLLUPS:
            loads = table is schema.EXPERT_COUNTS
            if runs := tuple(run_id for run_id in unit.runs if run_id in with_tokens or not loads):
                rows = _rows(ask, _difference(table, replace(unit, runs=runs)))
                yield from (RollupDifference(table.name, *row) for row in rows)
        for table in schema.TOTALS if unit.sealed else ():
            yield from (RollupDifference(table.name, *row) for row in _rows(ask, _difference(table, unit)))


def _units(segments: list[tuple[Any, ...]]) -> Iterator[_Unit]:
    """Group rows of `_SEGMENTS` into units to compare."""
    together: list[str] = []
    total = 0
    for sealed, of_state in groupby(segments, lambda row: row[0]):
        for run_id, of_run in groupby(of_state, lambda row: row[1]):
            numbers, rows = zip(*((segment, rows) for _, _, segment, rows, _ in of_run), strict=True)
            if not sealed and sum(rows) > ROWS_AT_ONCE:
                yield from (_Unit(sealed, (run_id,), number) for number in numbers)
                continue
            if together and total + sum(rows) > ROWS_AT_ONCE:
                yield _Unit(sealed, tuple(together))
                together, total = [], 0
            together.append(run_id)
            total += sum(rows)
        if together:
            yield _Unit(sealed, tuple(together))
        together, total = [], 0


def _rows(ask: Ask, sql: str) -> list[tuple[Any, ...]]:
    answer = ask(Query("rollups", sql, shipped=True), {})
    return answer.execute().fetchall() if answer is not None else []


def _difference(table: schema.Table, unit: _Unit) -> str:
    """Return SQL for the rows that differ: run, segment (NULL for a sealed run), key, stored and expected counts."""
    keys, counts = schema.split_columns(table)
    segment = ", null::integer as segment" if table.totals_of else ""
    same_key = " and ".join(
        f"stored.{name} is not distinct from expected.{name}" for name in ("run_id", "segment", *keys)
    )
    newer = {column.name for column in table.newer}  # NULL in older segments
    same_counts = " and ".join(
        f"(stored.{name} is null or {_same(name, type_)})" if name in newer else _same(name, type_)
        for name, type_ in counts.items()
    )
    key = " || ', ' || ".join(
        f"'{name} = ' || coalesce(coalesce(stored.{name}, expected.{name})::varchar, 'NULL')" for name in keys
    )
    return f"""
        with stored as (select *{segment}, true as here from {table.name} where {_where(unit)}),
        expected as (select *{segment}, true as here from ({_expected(table, unit)}))
        select
            coalesce(stored.run_id, expected.run_id) as run_id,
            coalesce(stored.segment, expected.segment) as segment,
            {key} as row_key,
            case when stored.here then {_shown("stored", counts)} end as stored,
            case when expected.here then {_shown("expected", counts)} end as expected
        from stored full join expected on {same_key}
        where stored.here is null or expected.here is null or not ({same_counts})
        order by run_id, segment, row_key"""


def _expected(table: schema.Table, unit: _Unit) -> str:
    """Return SQL for the rows that a table should have, by its definition."""
    if table.totals_of:
        return f"select * from ({staging_query(table.name)}) where {_where(unit)}"
    expected = f"select * from ({definition(table)}) where {_where(unit)}"
    if not unit.sealed:
        return expected
    keys, counts = schema.split_columns(table)
    listed = ", ".join(["run_id", *keys])
    sums = ", ".join(
        f"{schema.merge_function(column)}({column.name})::{column.type} as {column.name}"
        for column in table.columns
        if column.name in counts
    )
    return f"select {listed}, null::integer as segment, {sums} from ({expected}) group by {listed}"


def _where(unit: _Unit) -> str:
    """Return SQL for the rows of a unit. A single run is an equality, which DuckDB pushes through joins."""
    names = [sql_string(run_id) for run_id in unit.runs]
    runs = f"run_id = {names[0]}" if len(names) == 1 else f"run_id in ({', '.join(names)})"
    return runs if unit.segment is None else f"{runs} and segment = {unit.segment}"


def _same(name: str, type_: str) -> str:
    if type_ != "DOUBLE":
        return f"stored.{name} is not distinct from expected.{name}"
    near = f"abs(stored.{name} - expected.{name}) <= {TOLERANCE} * abs(expected.{name})"
    return f"(stored.{name} is not distinct from expected.{name} or coalesce({near}, false))"


def _shown(side: str, counts: dict[str, str]) -> str:
    return " || ', ' || ".join(f"'{name} = ' || coalesce({side}.{name}::varchar, 'NULL')" for name in counts)
