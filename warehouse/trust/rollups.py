"""The rollups' definitions: what each counts, as SQL over the raw rows, and whether the stored counts agree.

A rollup is a table of counts that every segment carries beside its rows. `queries/rollups/<table>.sql`
defines it; `moewh.ingest.write.rollups` computes the same faster as a segment is written.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.files import schema
from moewh.warehouse.views.base import QUERIES

if TYPE_CHECKING:
    from moewh.warehouse.answer.engine import Ask

TOLERANCE = 1e-9
"""Relative: how far a stored sum of weights may be from the SQL's, which adds in another order."""


@dataclass(frozen=True)
class Fault:
    """One row of a rollup that is not what the segment's rows give."""

    table: str
    run_id: str
    segment: int | None
    """None where a sealed run's merged counts are compared."""
    key: str
    """The row's key as `column = value, …`."""
    stored: str | None
    """The counts in the file; None if it lacks the row."""
    expected: str | None
    """The counts the SQL gives; None if it has no such row."""


_UNITS = """
select run_id, segment from segments
where run_id not in (select run_id from expert_counts where segment is null)
union all
select distinct run_id, null::integer as segment from expert_counts where segment is null
order by run_id, segment
"""
"""What is compared at once: each segment, or a sealed run."""
_COUNTS_ALONE = "select run_id from segments group by run_id having sum(tokens) = 0"
"""Runs whose load has no rows."""


def definition(table: schema.Table) -> str:
    """Return the SQL that defines a rollup: its columns over every segment, run_id and segment first."""
    return (QUERIES / "rollups" / f"{table.name}.sql").read_text(encoding="utf-8")


def compare(ask: Ask, only: Value | None = None) -> Iterator[Fault]:
    """Yield every row in which a stored rollup differs from its definition, on any engine.

    Segment by segment; a sealed run, whose counts are merged, as a whole. With `only`, those of that run alone. The
    load of a run that was imported as counts alone has no rows to be counted.
    """
    alone = {run_id for (run_id,) in _rows(ask, _COUNTS_ALONE, {})}
    for run_id, segment in _rows(ask, _UNITS, {}):
        if only is not None and run_id != only:
            continue
        values = {"run": run_id} | ({} if segment is None else {"segment": segment})
        for table in schema.ROLLUPS:
            if table is schema.EXPERT_COUNTS and run_id in alone:
                continue
            rows = _rows(ask, _difference(table, sealed=segment is None), values)
            yield from (Fault(table.name, run_id, segment, *row) for row in rows)


def _rows(ask: Ask, sql: str, values: Mapping[str, Value]) -> list[tuple[Any, ...]]:
    answer = ask(Query("rollups", sql, shipped=True), values)
    return answer.execute().fetchall() if answer is not None else []


def _difference(table: schema.Table, *, sealed: bool) -> str:
    """Return SQL for the rows that differ, of one segment or a sealed run: key, stored and expected counts as text."""
    keys, counts = schema.split_columns(table)
    one = "run_id = $run" + ("" if sealed else " and segment = $segment")
    expected = f"select * from ({definition(table)}) where {one}"
    if sealed:
        sums = ", ".join(
            f"{schema.merged(column)}({column.name})::{column.type} as {column.name}"
            for column in table.columns
            if column.name in counts
        )
        expected = f"select {', '.join(keys)}, {sums} from ({expected}) group by {', '.join(keys)}"
    same_key = " and ".join(f"stored.{name} is not distinct from expected.{name}" for name in keys)
    newer = {column.name for column in table.newer}  # NULL in a segment that was written before
    same_counts = " and ".join(
        f"(stored.{name} is null or {_same(name, type_)})" if name in newer else _same(name, type_)
        for name, type_ in counts.items()
    )
    key = " || ', ' || ".join(
        f"'{name} = ' || coalesce(coalesce(stored.{name}, expected.{name})::varchar, 'NULL')" for name in keys
    )
    return f"""
        with stored as (select *, true as here from {table.name} where {one}),
        expected as (select *, true as here from ({expected}))
        select
            {key} as row_key,
            case when stored.here then {_shown("stored", counts)} end as stored,
            case when expected.here then {_shown("expected", counts)} end as expected
        from stored full join expected on {same_key}
        where stored.here is null or expected.here is null or not ({same_counts})
        order by row_key"""


def _same(name: str, type_: str) -> str:
    if type_ != "DOUBLE":
        return f"stored.{name} is not distinct from expected.{name}"
    near = f"abs(stored.{name} - expected.{name}) <= {TOLERANCE} * abs(expected.{name})"
    return f"(stored.{name} is not distinct from expected.{name} or coalesce({near}, false))"


def _shown(side: str, counts: dict[str, str]) -> str:
    return " || ', ' || ".join(f"'{name} = ' || coalesce({side}.{name}::varchar, 'NULL')" for name in counts)
