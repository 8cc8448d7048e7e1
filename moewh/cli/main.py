"""The `moewh` command: thin wrappers that hand their options to the library and print what comes back.

Every failure is one line on stderr that says what is wrong and what to do; exit code 1 when the work
failed, 2 when the command was used wrongly. Nothing heavy is imported before a command needs it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from moewh.cli.demo import demo
from moewh.cli.geometry import geometry
from moewh.cli.ingest import ingest
from moewh.cli.inspect import inspect
from moewh.cli.options import limit_options, warehouse_option
from moewh.cli.verify import verify
from moewh.warehouse import __version__
from moewh.warehouse.answer.engine import engine_options, open_engine
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.stopping import stoppable
from moewh.warehouse.trust.check import check


class MoewhGroup(click.Group):
    """A group of commands whose failures come out as one line and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command and exit with its code; without `standalone_mode`, as click does."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            with stoppable(lambda: "stopped before it was done."):
                code = super().main(args, prog_name, complete_var, False, **extra)
        except Exception as error:
            if (explained := explain(error)) is None:
                raise
            message, code = explained
            click.echo(f"moewh: {one_line(message)}", err=True)
        sys.exit(code if isinstance(code, int) else 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run one command; a reader that has seen enough (`| head`) ends it quietly."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            _discard_output()
            ctx.exit(0)
        return result


def explain(error: Exception) -> tuple[str, int] | None:
    """Return the line and the exit code for a failure that a user can cause; None for a bug of ours."""
    duckdb = sys.modules.get("duckdb")
    match error:
        case MoewhError():
            explained = (str(error), error.exit_code)
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "moewh"
            explained = (f"{error.format_message()} Try `{command} --help`.", 2)
        case click.ClickException():
            explained = (error.format_message(), error.exit_code)
        case click.Abort():
            explained = ("stopped before it was done.", 1)
        case OSError():
            explained = (_os_error(error), 1)
        case _ if duckdb is not None and isinstance(error, duckdb.Error):
            explained = (_duckdb_error(str(error)), 1)
        case UnicodeDecodeError() if b" Error: " in error.object:  # DuckDB's message, which quotes damaged bytes
            explained = (_duckdb_error(error.object.decode(errors="backslashreplace")), 1)
        case _:
            return None
    return explained


def one_line(message: str) -> str:
    """Join a message's lines; spaces within a line stay, since they may be those of a token."""
    return " ".join(line for line in map(str.strip, message.splitlines()) if line)


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _duckdb_error(text: str) -> str:
    """Keep DuckDB's message and the line it names, without the drawing of the place below it."""
    message, _, place = text.partition("\n\nLINE ")
    if place:
        message += f" (line {place.partition(':')[0]})"
    if "disabled by configuration" in message or "has been locked" in message:
        message += ". A query may read the warehouse only; --unsafe lifts that."
    if "No files found that match the pattern" in message:
        message += ". Run `moewh refresh` to write the files that are missing."
    return message


def _discard_output() -> None:
    """Let what is still to be written go nowhere, so that the interpreter's last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    "moewh",
    cls=MoewhGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="moewh", message="%(prog)s %(version)s")
@click.pass_context
def main(context: click.Context) -> None:
    """A SQL-queryable warehouse of the routing decisions of Mixture-of-Experts models."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that prints rows `--format` and `-o`."""
    file = click.option("-o", "output", type=click.Path(path_type=Path), metavar="FILE", help="Write to a file.")
    form = click.option("--format", "form", type=click.Choice(FORMATS), help="Default: table, or as FILE is named.")
    return form(file(command))


@main.command(short_help="Answer a view, a saved query or SQL of your own.")
@click.argument("name", required=False)
@click.option("-c", "sql", metavar="SQL", help="SQL to run instead of a NAME.")
@click.option("-p", "parameters", metavar="NAME=VALUE", multiple=True, help="Set a parameter; repeat for more.")
@format_options
@click.option("--describe", "described", is_flag=True, help="Say what it answers, and its parameters and columns.")
@engine_options
@click.option("--verify", "verified", is_flag=True, help="Read every file and compare it with its manifest first.")
@limit_options
@warehouse_option
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
    warehouse: Layout,
    **limits: Any,
) -> None:
    """Answer NAME (a view or a saved query), a FILE.sql, or the SQL of -c. Without any, list the names.

    A parameter sets the DuckDB variable of that name, which SQL reads with getvariable('name'), and binds
    $name. Its type comes from the parameter, not from how the value is spelled: run=2.10 is the run 2.10. Quotes
    around a value are removed: -p "run='7'" is run 7. What a shipped query is asked for and does not exist is an error.
    Every value reads back from csv, json, jsonl and parquet. A table is whole, except on a terminal, where a line
    says what was left out.
    SQL may read the warehouse and nothing else, and change nothing, unless --unsafe is given.
    """
    from moewh.warehouse.answer import output as out
    from moewh.warehouse.answer import query as queries
    from moewh.warehouse.answer.jail import Limits

    if name is None and sql is None:
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
        from moewh.warehouse.trust.verify import require_sound

        require_sound(warehouse)
    with open_engine(engine, master, warehouse, Limits(**limits), written) as ask:
        answer = ask(found, values)
        if answer is not None:
            out.write(answer, chosen, output)


@main.command(short_help="List the views, or describe one.")
@click.argument("name", required=False)
@warehouse_option
def views(name: str | None, warehouse: Layout) -> None:  # noqa: ARG001 - the views are those of any warehouse
    """List the views with one line each; with a NAME, say what it answers and what its columns mean."""
    from moewh.warehouse.answer import catalog

    click.echo(catalog.list_views() if name is None else catalog.describe_view(name))


@main.command(short_help="List the runs, or delete one.")
@click.option("--delete", metavar="RUN", help="Delete this run and its segments.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@format_options
@warehouse_option
def runs(delete: str | None, yes: bool, form: str | None, output: Path | None, warehouse: Layout) -> None:
    """List the runs of the warehouse, complete or not; with --delete, remove one."""
    from moewh.warehouse import runs as library
    from moewh.warehouse.answer import output as out
    from moewh.warehouse.views.base import open_warehouse

    if delete is not None and (form or output):
        raise UsageError("--format and -o are for the list of runs. Leave them out with --delete.")
    warehouse.require()
    if delete is None:
        chosen = out.choose_format(form, output)
        if output is not None:
            out.written_path(output)  # refuses what cannot be written
        with open_warehouse(warehouse) as connection:
            out.write(library.list_runs(connection), chosen, output)
        return
    library.check_known(warehouse, delete)
    if not yes and not click.confirm(f"Delete run {delete} and all its segments from {warehouse.root}?", err=True):
        raise MoewhError(f"run {delete} was not deleted.")
    kept = library.delete_run(warehouse, delete)
    click.echo(
        " ".join([f"Deleted run {delete}.", *(f"The link to {path} is gone, its files are not." for path in kept)])
    )


@main.command(
    short_help="Open the DuckDB shell on the warehouse.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@warehouse_option
def shell(arguments: tuple[str, ...], warehouse: Layout) -> None:
    """Open the `duckdb` program with the warehouse's views, made in its memory. ARGUMENTS after -- are passed on to it.

    ATTACH 'other/warehouse.duckdb' adds another warehouse.
    """
    from moewh.warehouse.answer.shell import open_shell

    open_shell(warehouse, arguments)


@main.command(short_help="Write warehouse.duckdb anew, as after moving or copying the warehouse.")
@warehouse_option
def refresh(warehouse: Layout) -> None:
    """Write warehouse.duckdb anew: after moving or copying the warehouse, or when the file is missing or damaged.

    What an empty warehouse holds is added where it is missing, so this also makes a new one.
    """
    from moewh.warehouse.views.publishing import publish

    if warehouse.root.is_dir() and not warehouse.looks_like_one():
        raise UsageError(f"{warehouse.root} holds something else than a warehouse. Name another with --warehouse.")
    warehouse.create()
    publish(warehouse)
    click.echo(f"Wrote {warehouse.database}.")


main.add_command(check)
main.add_command(geometry)
main.add_command(ingest)
main.add_command(inspect)
main.add_command(demo)
main.add_command(verify)
