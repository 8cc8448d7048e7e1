"""`moewh seal`: merge the counts of complete runs, so that queries stay fast with many segments."""

from __future__ import annotations

import click

from moewh.cli.candidates import complete_runs
from moewh.cli.options import warehouse_option
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout


@click.command(short_help="Merge the counts of complete runs, so that queries stay fast.")
@click.argument("names", metavar="[RUN]...", nargs=-1, shell_complete=complete_runs)
@warehouse_option
def seal(names: tuple[str, ...], warehouse: Layout) -> None:
    """Seal each RUN, or every complete run: merge the counts of its segments into one set.

    `moewh ingest` seals a run when its last segment is committed. Use this for a run whose ingest was killed just then,
    and after `moewh verify --repair`. A sealed run is left unchanged.
    """
    from moewh.ingest.options import command_words
    from moewh.warehouse import runs as library
    from moewh.warehouse.sealing import seal as sealing
    from moewh.warehouse.trust.repair import restore_command

    warehouse.require()
    for run_id in names:
        library.check_known(warehouse, run_id)
        if not sealing.is_complete(warehouse, run_id):
            completes = restore_command(warehouse, run_id, command_words)
            raise MoewhError(f"run {run_id} is not complete. This completes and seals it: {completes}")
    chosen = names or [run_id for run_id in library.run_ids(warehouse) if sealing.is_complete(warehouse, run_id)]
    before = {run_id for run_id in chosen if warehouse.sealed(run_id).is_dir()}
    for run_id in chosen:
        sealing.seal(warehouse, run_id)
        click.echo(f"Run {run_id} was sealed already." if run_id in before else f"Sealed run {run_id}.")
    if not chosen:
        click.echo("There is no complete run.")
