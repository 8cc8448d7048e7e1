"""`moewh check`: queries whose rows are faults, and the rollups against the SQL that defines them.

A check is a `.sql` file like any other; `queries/checks/` holds the shipped ones, and a user's own run
beside them. It is passed when it gives no rows, which says nothing of a warehouse that has none: that is refused.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import click

from moewh.cli.options import limit_options, warehouse_option
from moewh.cli.reports import FORMATS, KEPT, Fault, Result, report
from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import Ask, engine_options, open_engine
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.answer.texts import told_rows
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout, sync
from moewh.warehouse.views.base import QUERIES

ROLLUPS = "rollups"
HELD = "select count(distinct run_id), coalesce(sum(routing_rows), 0) from segments"


@click.command(short_help="Run queries whose rows are faults; exit with 1 if there are any.")
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="[FILE|DIR]...")
@click.option("-p", "parameters", metavar="NAME=VALUE", multiple=True, help="Set a parameter; repeat for more.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="text", show_default=True)
@click.option("-o", "output", type=click.Path(path_type=Path), metavar="FILE", help="Write to a file.")
@engine_options
@limit_options
@warehouse_option
def check(
    *,
    paths: tuple[Path, ...],
    parameters: tuple[str, ...],
    form: str,
    output: Path | None,
    warehouse: Layout,
    engine: str,
    master: str | None,
    **limits: Any,
) -> None:
    """Run the checks in FILE or DIR, or without any the shipped ones, and compare the rollups with the rows.

    A check is a query whose rows are faults: they are printed, and the exit code is 1 if there are any, and 2 if a
    check cannot be run (the others are). A parameter goes to every check that uses it; the shipped ones take run.
    What a parameter names and does not exist is an error, and so is a warehouse without rows: nothing would be checked.
    SQL may read the warehouse and nothing else, and change nothing, unless --unsafe is given.
    """
    from moewh.warehouse.answer.jail import Limits

    checks = assigned(find_checks(paths) if paths else shipped_checks(), queries.parse_parameters(parameters))
    with _written(output) as stream, open_engine(engine, master, warehouse, Limits(**limits)) as ask:
        require_rows(ask, warehouse)
        for query, values in checks:
            with contextlib.suppress(UsageError):  # of one check: it is named when its turn comes
                ask.meant(query, values)
        worst = report(_results(ask, checks, rollups=not paths), form, stream)
    if worst:
        raise SystemExit(worst)


def assigned(checks: list[Query], values: Mapping[str, Value]) -> list[tuple[Query, dict[str, Value]]]:
    """Return each check with the values that it uses. Raises UsageError for a value that none uses."""
    known = {query: query.variables | (queries.bound_names(query.sql) or frozenset()) for query in checks}
    names = sorted(set[str]().union(*known.values()))
    for name in values:
        if name not in names:
            raise UsageError(f"no check uses the parameter {name!r}. Their parameters: {', '.join(names) or 'none'}.")
    return [(query, {name: value for name, value in values.items() if name in known[query]}) for query in checks]


def require_rows(ask: Ask, layout: Layout) -> None:
    """Raise MoewhError for a warehouse without routing rows, of which every check would say ok."""
    answer = ask(Query("check", HELD, shipped=True), {})
    segments, rows = answer.execute().fetchall()[0] if answer is not None else (0, 0)
    if not rows:
        what = "no routing rows" if segments else "no runs with rows"
        raise MoewhError(f"{layout.root} has {what}: nothing was checked. Ingest a run first.")


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


def rows_of(ask: Ask, query: Query, values: Mapping[str, Value]) -> Iterator[Fault]:
    """Yield a check's rows, as `column = value, …` and by column."""
    answer = ask(query, values)
    if answer is None:
        return
    for texts, values_by_name in told_rows(answer):
        yield Fault(", ".join(f"{name} = {text}" for name, text in texts.items()), values_by_name)


def rollup_faults(ask: Ask, run_id: Value | None) -> Iterator[Fault]:
    """Yield every row of a rollup, of one run or of all, that differs from what its SQL gives."""
    from moewh.warehouse.trust.rollups import compare

    for fault in compare(ask, run_id):
        where = f"run {fault.run_id}, segment {fault.segment}, {fault.table}: {fault.key}"
        text = f"{where}: stored {fault.stored or 'no row'}, the rows give {fault.expected or 'no row'}"
        yield Fault(text, asdict(fault))


def _results(ask: Ask, checks: list[tuple[Query, dict[str, Value]]], *, rollups: bool) -> Iterator[Result]:
    """Run one check after the other."""
    for query, values in checks:
        yield _result(query.source.removesuffix(".sql"), partial(rows_of, ask, query, values))
    if rollups:
        run_id = checks[0][1].get("run")  # which all shipped checks take
        yield _result(ROLLUPS, partial(rollup_faults, ask, run_id))


def _result(name: str, find: Callable[[], Iterator[Fault]]) -> Result:
    """Run one check to its end; one that fails is named on stderr. Raises what is no fault of the check's."""
    import duckdb

    from moewh.cli.main import explain, one_line  # which has this command

    result = Result(name)
    began = time.monotonic()
    try:
        for fault in find():
            result.faults += 1
            if len(result.kept) < KEPT:
                result.kept.append(fault)
        result.status = "faults" if result.faults else "ok"
    except (MoewhError, duckdb.Error) as error:
        explained = explain(error)
        if explained is None or isinstance(error, duckdb.InterruptException):  # time is up, or a signal came
            raise
        result = Result(name, "error", message=one_line(explained[0]))
        click.echo(f"moewh: {name}: {result.message}", err=True)
    result.seconds = time.monotonic() - began
    return result


@contextlib.contextmanager
def _written(output: Path | None) -> Iterator[TextIO]:
    """Yield what to write to: stdout, or a file that appears under its name when it is whole. Raises UsageError."""
    from moewh.warehouse.answer.output import written_path

    if output is None:
        yield sys.stdout
        return
    partial = written_path(output)
    try:
        with partial.open("w", encoding="utf-8", newline="") as stream:
            yield stream
        if partial != output:
            sync(partial)
            partial.replace(output.resolve())
    finally:
        if partial != output:
            partial.unlink(missing_ok=True)
