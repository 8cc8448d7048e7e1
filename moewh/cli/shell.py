"""`moewh shell`: the DuckDB shell on a warehouse."""

from __future__ import annotations

import click

from moewh.cli.options import readable_option
from moewh.warehouse.remote.published import Readable


@click.command(
    short_help="Open the DuckDB shell on the warehouse.",
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
@readable_option
def shell(arguments: tuple[str, ...], warehouse: Readable) -> None:
    """Start the `duckdb` program with the warehouse's views in memory. ARGUMENTS after -- are passed to it.

    ATTACH 'other/warehouse.duckdb' adds another warehouse.
    """
    from moewh.warehouse.answer.shell import open_shell

    open_shell(warehouse, arguments)
