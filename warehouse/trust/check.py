"""Checks: queries whose rows are faults, and a comparison of the rollups with the SQL that defines them.

A check is a `.sql` file like any other; `queries/checks/` holds the shipped ones, and users can run their own
with them. It passes if it returns no rows. An empty warehouse would pass every check, so it is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Ask
from moewh.warehouse.answer.existence import RUN_KINDS
from moewh.warehouse.answer.parameters import kinds_of
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.answer.texts import text_and_json_rows
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.folders import files_below
from moewh.warehouse.remote.published import Readable
from moewh.warehouse.trust.reports import FaultRow
from moewh.warehouse.views.shipped import QUERIES

ROLLUPS = "rollups"
ROWS = "select run_id, coalesce(sum(routing_rows), 0)::bigint from segments group by run_id"
COUNTED = "select distinct run_id from expert_counts where kind <> 'special' and run_id = getvariable('run')::varchar"


def assigned(checks: list[Query], values: Mapping[str, Value]) -> list[tuple[Query, dict[str, Value]]]:
    """Return each check with the values that it uses. Raises UsageError for a value that no check uses."""
    known = {query: query.variables | (queries.bound_names(query) or frozenset()) for query in checks}
    names = sorted(set[str]().union(*known.values()))
    for name in values:
        if name not in names:
            raise UsageError(f"no check uses the parameter {name!r}. Their parameters: {', '.join(names) or 'none'}.")
    return [(query, {name: value for name, value in values.items() if name in known[query]}) for query in checks]


def require_rows(ask: Ask, warehouse: Readable, checks: list[tuple[Query, dict[str, Value]]]) -> None:
    """Raise MoewhError if the warehouse has no routing rows, or a run that a check is asked about has no tokens.

    Either would pass every check. A run that was imported as counts only has tokens and no rows.
    """

    def rows_of_runs(sql: str, values: Mapping[str, Value]) -> list[tuple[Any, ...]]:
        answer = ask(Query("check", sql, shipped=True), values)
        return [] if answer is None else answer.execute().fetchall()

    rows = dict(rows_of_runs(ROWS, {}))
    if not any(rows.values()):
        what = "no routing rows" if rows else "no runs with rows"
        raise MoewhError(f"{warehouse.root} has {what}: nothing was checked. Ingest a run first.")
    for run_id in dict.fromkeys(str(value) for query, values in checks for value in _runs(query, values)):
        if not rows.get(run_id) and not rows_of_runs(COUNTED, {"run": run_id}):
            raise MoewhError(
                f"run {run_id} has no routing rows: nothing was checked. `moewh runs` lists what each run has."
            )


def _runs(query: Query, values: Mapping[str, Value]) -> Iterator[Value]:
    """Yield the runs that a check's parameters name."""
    if values:
        kinds = kinds_of(query)
        yield from (value for name, value in values.items() if kinds.get(name) in RUN_KINDS)


def shipped_checks() -> list[Query]:
    """Return the checks in `queries/checks/`, by name."""
    return find_checks((QUERIES / "checks",), shipped=True)


def find_checks(paths: tuple[Path, ...], *, shipped: bool = False) -> list[Query]:
    """Return the checks in files and folders, subfolders included. Raises UsageError for a folder without any.

    A check's name is its path below the folder; if others have the same, its whole path.
    """
    found: list[tuple[Path, str]] = []
    for path in paths:
        if path.is_dir():
            files = [file for file in files_below(path) if file.suffix.lower() == ".sql"]
            if not files:
                raise UsageError(f"{path} holds no .sql files.")
            found += [(file, str(file.relative_to(path))) for file in files]
        else:
            found.append((path, path.name))
    alike = Counter(name for _, name in found)
    return [
        replace(queries.read_file(file, shipped=shipped), source=name if alike[name] == 1 else str(file))
        for file, name in found
    ]


def rows_of(ask: Ask, query: Query, values: Mapping[str, Value]) -> Iterator[FaultRow]:
    """Yield a check's rows as faults, each as text (`column = value, …`) and by column."""
    answer = ask(query, values)
    if answer is None:
        return
    for texts, values_by_name in text_and_json_rows(answer):
        yield FaultRow(", ".join(f"{name} = {text}" for name, text in texts.items()), values_by_name)


def rollup_faults(ask: Ask, run_id: Value | None) -> Iterator[FaultRow]:
    """Yield every rollup row, of one run or all runs, that differs from the result of its SQL."""
    from moewh.warehouse.trust.rollups import compare

    for difference in compare(ask, run_id):
        segment = "" if difference.segment is None else f", segment {difference.segment}"
        text = f"run {difference.run_id}{segment}, {difference.table}: {difference.text}"
        yield FaultRow(text, asdict(difference))
