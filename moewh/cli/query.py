"""`moewh query`: a query's name, file or SQL in; its result out, on the terminal or in a file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from moewh.cli.candidates import asked_query, complete_parameters, complete_queries
from moewh.cli.options import engine_options, format_options, limit_options, readable_option
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.errors import UsageError
from moewh.warehouse.remote.published import Readable


@click.command(short_help="Run a view, a saved query or your own SQL.")
@click.argument("name", required=False, shell_complete=complete_queries)
@click.option("-c", "sql", metavar="SQL", help="SQL to run instead of a NAME.")
@click.option(
    "-p",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    shell_complete=complete_parameters(asked_query),
    help="Set a parameter. Repeatable.",
)
@format_options
@click.option("--describe", "described", is_flag=True, help="Print the query's header, parameters and columns.")
@engine_options
@click.option("--verify", "verified", is_flag=True, help="First compare every file with its manifest.")
@limit_options
@readable_option
def query(
    *,
    name: str | None,
    sql: str | None,
    parameters: tuple[str, ...],
    form: str | None,
    output: Path | None,
    engine: str,
    master: str | None,
    described: bool,
    verified: bool,
    warehouse: Readable,
    **limits: Any,
) -> None:
    """Run NAME (a view or a saved query), a FILE.sql, or the SQL of -c. Without any, list the names.

    A parameter sets the DuckDB variable of that name, which SQL reads with getvariable('name'), and binds
    $name. The parameter decides the type, not the spelling of the value: run=2.10 is the run 2.10. Quotes
    around a value are removed: -p "run='7'" is the run 7. In a shipped query, a run, domain, layer or expert
    that does not exist is an error.

    Every value can be read back from csv, json, jsonl and parquet. A table is complete, except on a terminal,
    where a line reports what was left out.

    Unless --unsafe is given, SQL can read only the warehouse and cannot change anything.
    """
    from moewh.warehouse.answer import output as out
    from moewh.warehouse.answer import query as queries
    from moewh.warehouse.answer.jail import Limits
    from moewh.warehouse.answer.retry import HeldBack, until_settled

    if name is None and sql is None:
        if parameters or form or output or described or verified:
            raise UsageError("give the NAME of a query, or SQL with -c. Without either, only the names are listed.")
        from moewh.warehouse.answer import catalog

        click.echo(catalog.list_queries())
        return
    if name is not None and sql is not None:
        raise UsageError("give a NAME or -c SQL, not both.")
    chosen = out.choose_format(form, output)
    found = queries.find_query(name) if name is not None else queries.Query("-c", sql or "")
    if described:
        from moewh.warehouse.answer import catalog

        click.echo(catalog.describe_query(found))
        return
    values = queries.parse_parameters(parameters)
    written = out.written_path(output) if output is not None else None
    if verified:
        from moewh.warehouse.trust.published import require_sound

        require_sound(warehouse)
    printed = HeldBack(sys.stdout)

    def answer_it() -> int | None:
        with open_engine(engine, master, warehouse, Limits(**limits), written) as ask:
            answer = ask(found, values)
            return None if answer is None else out.write(answer, chosen, output, printed)

    rows = until_settled(warehouse, answer_it, printed)
    if rows is None and output is not None:
        click.echo(f"moewh: the statement gives no rows, so {output} was not written.", err=True)
    if rows == 0 and found.shipped:
        from moewh.warehouse.answer.parameters import about_no_rows

        click.echo(f"moewh: {about_no_rows(found, values)}", err=True)
