"""`moewh check`: run checks (queries whose rows are faults) one after another; a report and an exit code out."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from moewh.cli.candidates import asked_checks, complete_parameters
from moewh.cli.failures import explain
from moewh.cli.options import engine_options, limit_options, readable_option
from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Ask, open_engine
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.errors import MoewhError, UsageError, one_line
from moewh.warehouse.remote.published import Readable
from moewh.warehouse.stopping import stop_requested
from moewh.warehouse.trust.check import (
    ROLLUPS,
    assigned,
    find_checks,
    require_rows,
    rollup_faults,
    rows_of,
    shipped_checks,
)
from moewh.warehouse.trust.reports import FORMATS, KEPT, FaultRow, Result, choose_format, report

_LATE = "did not finish within the --timeout that all checks share."


@click.command(short_help="Run queries whose rows are faults; exit with 1 if there are any.")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE|DIR]...")
@click.option(
    "-p",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    shell_complete=complete_parameters(asked_checks),
    help="Set a parameter. Repeatable.",
)
@click.option("--format", "form", type=click.Choice(FORMATS), help="[default: FILE's suffix, else text]")
@click.option("-o", "output", type=click.Path(path_type=Path), metavar="FILE", help="Write to FILE instead of stdout.")
@engine_options
@limit_options
@readable_option
def check(
    *,
    paths: tuple[Path, ...],
    parameters: tuple[str, ...],
    form: str | None,
    output: Path | None,
    warehouse: Readable,
    engine: str,
    master: str | None,
    **limits: Any,
) -> None:
    """Run the checks in each FILE and DIR, with its subfolders. Without any, run the shipped ones and compare the
    rollups with the rows.

    A check is a query whose rows are faults. They are printed, and the exit code is 1 if there are any. A check
    that cannot be run makes the exit code 2; the others still run.

    A parameter goes to every check that uses it; the shipped ones take run. A run or other value that does not
    exist is an error. So is a warehouse or a run without rows, since nothing would be checked.

    Unless --unsafe is given, SQL can read only the warehouse and cannot change anything.
    """
    from moewh.warehouse.answer.jail import Limits

    checks = assigned(find_checks(paths) if paths else shipped_checks(), queries.parse_parameters(parameters))
    with _written(output, form) as stream, open_engine(engine, master, warehouse, Limits(**limits)) as ask:
        chosen = choose_format(form, output)
        for query, values in checks:
            with contextlib.suppress(UsageError):  # of one check, which is reported when its turn comes
                ask.checked_values(query, values)
        require_rows(ask, warehouse, checks)
        worst = report(_results(warehouse, ask, checks, rollups=not paths), chosen, stream)
    if worst:
        raise SystemExit(worst)


def _results(
    warehouse: Readable, ask: Ask, checks: list[tuple[Query, dict[str, Value]]], *, rollups: bool
) -> Iterator[Result]:
    """Run the checks one after another."""
    for query, values in checks:
        yield _result(warehouse, query.source.removesuffix(".sql"), partial(rows_of, ask, query, values))
    if rollups:
        run_id = checks[0][1].get("run")  # a parameter of all shipped checks
        yield _result(warehouse, ROLLUPS, partial(rollup_faults, ask, run_id))


def _result(warehouse: Readable, name: str, find: Callable[[], Iterator[FaultRow]]) -> Result:
    """Run one check to its end and report a failure on stderr. Re-raises errors that are not the check's fault."""
    import duckdb

    from moewh.warehouse.answer.retry import until_settled

    began = time.monotonic()
    try:
        result = until_settled(warehouse, lambda: _found(name, find()))
    except (MoewhError, duckdb.Error) as error:
        explained = (_LATE, 2) if isinstance(error, duckdb.InterruptException) else explain(error)
        if explained is None or stop_requested():
            raise
        result = Result(name, "error", message=one_line(explained[0]))
        click.echo(f"moewh: {name}: {result.message}", err=True)
    result.seconds = time.monotonic() - began
    return result


def _found(name: str, faults: Iterator[FaultRow]) -> Result:
    result = Result(name)
    for fault in faults:
        result.faults += 1
        if len(result.kept) < KEPT:
            result.kept.append(fault)
    result.status = "faults" if result.faults else "ok"
    return result


@contextlib.contextmanager
def _written(output: Path | None, form: str | None) -> Iterator[TextIO]:
    """Yield a stream to write to: stdout, or a file that gets its name once it is complete. Raises UsageError."""
    from moewh.warehouse.answer.output import print_utf8, replaced

    if output is None:
        if form not in (None, "text"):
            print_utf8()
        yield sys.stdout
        return
    with replaced(output) as path, path.open("w", encoding="utf-8", newline="") as stream:
        yield stream
