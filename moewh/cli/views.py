"""`moewh views`: lists the views, or describes one."""

from __future__ import annotations

import click

from moewh.cli.candidates import complete_views
from moewh.cli.options import warehouse_option
from moewh.warehouse.files.layout import Layout


@click.command(short_help="List the views, or describe one.")
@click.argument("name", required=False, shell_complete=complete_views)
@warehouse_option
def views(name: str | None, warehouse: Layout) -> None:  # noqa: ARG001 - the views are those of any warehouse
    """List the views, one line each. With NAME, show what it answers and what its columns mean."""
    from moewh.warehouse.answer import catalog

    click.echo(catalog.list_views() if name is None else catalog.describe_view(name))
