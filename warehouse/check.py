"""`moewh check`: queries whose rows are faults, and the rollups against the SQL that defines them.

A check is a `.sql` file like any other; `queries/checks/` holds the shipped ones, and a user's own run
beside them. It is passed when it gives no rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from warehouse import query as queries
from warehouse.engine import Ask, engine_options, open_engine
from warehouse.errors import MoewhError, UsageError
from warehouse.layout import Layout
from warehouse.options import limit_options, warehouse_option
from warehouse.query import Query
from warehouse.texts import text_rows
from warehouse.views import QUERIES

_SHOWN = 20
"""Faults that are printed for each check; all are counted."""
ROLLUPS = "rollups"


@click.command(short_help="Run queries whose rows are faults; exit with 1 if there are any.")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE|DIR]...")
@engine_options
@limit_options
@warehouse_option
def check(paths: tuple[Path, ...], warehouse: Layout, engine: str, master: str | None, **limits: Any) -> None:
    """Run the checks in FILE or DIR, or without any the shipped ones, and compare the rollups with the rows.

    A check is a query whose rows are faults: they are printed, and the exit code is 1 if there are any, and 2 if a
    check cannot be run (the others are).
    SQL may read the warehouse and nothing else, and change nothing, unless --unsafe is given.
    """
    import duckdb

    from warehouse.cli import explain  # which has this command
    from warehouse.jail import Limits

    checks = find_checks(paths) if paths else shipped_checks()
    worst = 0
    with open_engine(engine, master, warehouse, Limits(**limits)) as ask:
        parts = [(query.source.removesuffix(".sql"), rows_of(ask, query)) for query in checks]
        if not paths:
            parts.append((ROLLUPS, rollup_faults(ask)))
        for name, faults in parts:
            try:
                worst = max(worst, 0 if _report(name, faults) else 1)
            except (MoewhError, duckdb.Error) as error:
                explained = explain(error)
                if explained is None or isinstance(error, duckdb.InterruptException):  # time is up, or a signal came
                    raise
                click.echo(f"moewh: {name}: {' '.join(explained[0].split())}", err=True)
                worst = 2
    if worst:
        raise SystemExit(worst)


def shipped_checks() -> list[Query]:
    """Return the checks in `queries/checks/`, by name."""
    return find_checks((QUERIES / "checks",), shipped=True)


def find_checks(paths: tuple[Path, ...], *, shipped: bool = False) -> list[Query]:
    """Return the checks that files and folders hold. Raises UsageError where there are none."""
    checks = []
    for path in paths:
        files = sorted(path.glob("*.sql")) if path.is_dir() else [path]
        if not files:
            raise UsageError(f"{path} holds no .sql files.")
        checks += [queries.read_file(file, shipped=shipped) for file in files]
    return checks


def rows_of(ask: Ask, query: Query) -> Iterator[str]:
    """Yield a check's rows as `column = value, …`."""
    answer = ask(query, {})
    if answer is None:
        return
    columns, rows = text_rows(answer)
    for row in rows:
        yield ", ".join(
            f"{column.name} = {'NULL' if value is None else value}" for column, value in zip(columns, row, strict=True)
        )


def rollup_faults(ask: Ask) -> Iterator[str]:
    """Yield every row of a rollup that differs from what its SQL gives."""
    from warehouse.rollups import compare

    for fault in compare(ask):
        where = f"run {fault.run_id}, segment {fault.segment}, {fault.table}: {fault.key}"
        yield f"{where}: stored {fault.stored or 'no row'}, the rows give {fault.expected or 'no row'}"


def _report(name: str, faults: Iterator[str]) -> bool:
    """Print a check's faults as they are found; return whether there were none."""
    number = 0
    for number, fault in enumerate(faults, 1):
        if number <= _SHOWN:
            click.echo(f"{name}: {fault}")
    if number > _SHOWN:
        click.echo(f"{name}: and {number - _SHOWN:,} more")
    found = f"{number:,} fault{'' if number == 1 else 's'}"
    click.echo(f"{name}: {found if number else 'ok'}")
    return not number
