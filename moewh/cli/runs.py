"""`moewh runs`: list the runs of a warehouse, or delete some."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from moewh.cli.candidates import complete_runs
from moewh.cli.options import format_options, readable_option
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.remote.published import Readable, only_written


@click.command(short_help="List the runs, or delete some.")
@click.option(
    "--delete",
    metavar="RUN",
    multiple=True,
    shell_complete=complete_runs,
    help="Delete this run and its segments; can be given several times.",
)
@click.option("--yes", is_flag=True, help="Delete without asking.")
@format_options
@readable_option
def runs(delete: tuple[str, ...], yes: bool, form: str | None, output: Path | None, warehouse: Readable) -> None:
    """List the runs of the warehouse, complete or not; with --delete, remove some."""
    from moewh.warehouse import runs as library
    from moewh.warehouse.answer import output as out
    from moewh.warehouse.answer.retry import HeldBack, until_settled
    from moewh.warehouse.views.opening import open_warehouse

    if delete and (form or output):
        raise UsageError("--format and -o are for the list of runs. Leave them out with --delete.")
    if yes and not delete:
        raise UsageError("--yes is for --delete RUN. Leave it out to list the runs.")
    warehouse.require()
    if not delete:
        chosen = out.choose_format(form, output)
        if output is not None:
            out.written_path(output)  # refuses a path that cannot be written
        printed = HeldBack(sys.stdout)

        def list_them() -> None:
            with open_warehouse(warehouse) as connection:
                out.write(library.list_runs(connection), chosen, output, printed)

        until_settled(warehouse, list_them, printed)
        return
    layout = only_written(warehouse)
    for run_id in delete:
        library.check_known(layout, run_id)
    for run_id in dict.fromkeys(delete):
        if not yes and not click.confirm(f"Delete run {run_id} and all its segments from {layout.root}?", err=True):
            raise MoewhError(f"run {run_id} was not deleted.")
        kept = library.delete_run(layout, run_id)
        links = (f"Removed the link to {path}, not its files." for path in kept)
        click.echo(" ".join([f"Deleted run {run_id}.", *links]))
