"""`moewh export`: write a run's load or routing as a file for another program."""

from __future__ import annotations

from pathlib import Path

import click

from moewh.cli.candidates import complete_runs
from moewh.cli.options import readable_option
from moewh.warehouse.answer.export import describe_export, export_names, export_run
from moewh.warehouse.remote.published import Readable


class _Command(click.Command):
    """A command whose help lists the formats, each with the first line of its file's docstring."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002 - click gives it
        """Write what each format is."""
        with formatter.section("Formats"):
            formatter.write_dl([(name, describe_export(name)) for name in export_names()])


@click.command(cls=_Command, short_help="Write a run as a file that another program reads.")
@click.argument("format", type=click.Choice(export_names()), metavar="FORMAT")
@click.option("--run", metavar="ID", shell_complete=complete_runs, help="The run to export.  [default: the only run]")
@click.option("--domain", metavar="NAME", help="Only tokens of this domain.")
@click.option("-o", "output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to write.")
@readable_option
def export(*, format: str, run: str | None, domain: str | None, output: Path, warehouse: Readable) -> None:
    """Write a run's load, or its routing by domain, as a file that another program reads."""
    found = export_run(format, warehouse, run, domain, output)
    partly = "" if found.complete else " The run is not complete: the file holds its segments so far."
    click.echo(f"Wrote run {found.run_id} to {output}.{partly}", err=True)
