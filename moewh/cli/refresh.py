"""`moewh refresh`: rewrite `warehouse.duckdb`, the file that a DuckDB shell opens."""

from __future__ import annotations

import click

from moewh.cli.options import warehouse_option
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout


@click.command(short_help="Rewrite warehouse.duckdb after moving or copying the warehouse.")
@warehouse_option
def refresh(warehouse: Layout) -> None:
    """Rewrite warehouse.duckdb, after moving or copying the warehouse, or when the file is missing or damaged.

    Missing files that every warehouse has are added, so this also creates a new, empty warehouse. A copy that lacks
    files of a run, or segments of a sealed run, is reported, with exit code 1.
    """
    from moewh.warehouse.sealing.seal import require_readable
    from moewh.warehouse.views.publishing import publish

    if warehouse.root.is_dir() and not warehouse.may_be_warehouse():
        raise UsageError(f"{warehouse.root} is not a warehouse. Name another with --warehouse.")
    warehouse.create()
    require_readable(warehouse)
    publish(warehouse)
    warehouse.require_whole()
    click.echo(f"Wrote {warehouse.database}.")
