"""Checks: queries whose rows are faults, and a comparison of the rollups with the SQL that defines them.

A check is a `.sql` file like any other; `queries/checks/` holds the shipped ones, and users can run their own
with them. It passes if it returns no rows. An empty warehouse would pass every check, so it is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Ask
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.answer.texts import text_and_json_rows
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.folders import own_entries
from moewh.warehouse.remote.published import Readable
from moewh.warehouse.trust.reports import Fault
from moewh.warehouse.views.shipped import QUERIES

ROLLUPS = "rollups"
RUNS_AND_ROWS = "select count(distinct run_id), coalesce(sum(routing_rows), 0) from segments"


def assigned(checks: list[Query], values: Mapping[str, Value]) -> list[tuple[Query, dict[str, Value]]]:
    """Return each check with the values that it uses. Raises UsageError for a value that no check uses."""
    known = {query: query.variables | (queries.bound_names(query) or frozenset()) for query in checks}
    names = sorted(set[str]().union(*known.values()))
    for name in values:
        if name not in names:
            raise UsageError(f"no check uses the parameter {name!r}. Their parameters: {', '.join(names) or 'none'}.")
    return [(query, {name: value for name, value in values.items() if name in known[query]}) for query in checks]


def require_rows(ask: Ask, warehouse: Readable) -> None:
    """Raise MoewhError for a warehouse without routing rows, which would pass every check."""
    answer = ask(Query("check", RUNS_AND_ROWS, shipped=True), {})
    runs, rows = answer.execute().fetchall()[0] if answer is not None else (0, 0)
    if not rows:
        what = "no routing rows" if runs else "no runs with rows"
        raise MoewhError(f"{warehouse.root} has {what}: nothing was checked. Ingest a run first.")


def shipped_checks() -> list[Query]:
    """Return the checks in `queries/checks/`, by name."""
    return find_checks((QUERIES / "checks",), shipped=True)


def find_checks(paths: tuple[Path, ...], *, shipped: bool = False) -> list[Query]:
    """Return the checks in files and folders. Raises UsageError for a folder without any."""
    checks = []
    for path in paths:
        files = [file for file in own_entries(path) if file.suffix.lower() == ".sql"] if path.is_dir() else [path]
        if not files:
            raise UsageError(f"{path} holds no .sql files.")
        checks += [queries.read_file(file, shipped=shipped) for file in files]
    return checks


def rows_of(ask: Ask, query: Query, values: Mapping[str, Value]) -> Iterator[Fault]:
    """Yield a check's rows as faults, each as text (`column = value, …`) and by column."""
    answer = ask(query, values)
    if answer is None:
        return
    for texts, values_by_name in text_and_json_rows(answer):
        yield Fault(", ".join(f"{name} = {text}" for name, text in texts.items()), values_by_name)


def rollup_faults(ask: Ask, run_id: Value | None) -> Iterator[Fault]:
    """Yield every rollup row, of one run or all runs, that differs from the result of its SQL."""
    from moewh.warehouse.trust.rollups import compare

    for fault in compare(ask, run_id):
        segment = "" if fault.segment is None else f", segment {fault.segment}"
        where = f"run {fault.run_id}{segment}, {fault.table}: {fault.key}"
        text = f"{where}: stored {fault.stored or 'no row'}, the rows give {fault.expected or 'no row'}"
        yield Fault(text, asdict(fault))
