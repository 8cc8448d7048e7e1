"""`moewh export`: write a run's load or routing as a file for another program."""

from __future__ import annotations

from pathlib import Path

import click

from moewh.cli.candidates import complete_runs
from moewh.cli.options import readable_option
from moewh.warehouse.answer.export import export_names, export_run
from moewh.warehouse.remote.published import Readable


@click.command(short_help="Write a run as a file that another program reads.")
@click.argument("format", type=click.Choice(export_names()), metavar="FORMAT")
@click.option("--run", metavar="ID", shell_complete=complete_runs, help="The run to export.  [default: the only run]")
@click.option("--domain", metavar="NAME", help="Only tokens of this domain.")
@click.option("-o", "output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="Where to write.")
@readable_option
def export(*, format: str, run: str | None, domain: str | None, output: Path, warehouse: Readable) -> None:
    """Write a run's load, or its routing by domain, as a file that another program reads.

    sglang: the `logical_count` of --init-expert-location. eplb: the weight matrix of DeepSeek's EPLB, as .npy.
    tensorrt-llm: a folder of expert statistics. committee-audit: the CSV of CommitteeAudit.
    """
    run_id = export_run(format, warehouse, run, domain, output)
    click.echo(f"Wrote run {run_id} to {output}.", err=True)
