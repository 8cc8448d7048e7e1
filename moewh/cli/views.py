"""`moewh views`: list the views, or describe one."""

from __future__ import annotations

import click

from moewh.cli.candidates import complete_views
from moewh.cli.options import readable_option
from moewh.warehouse.remote.published import Readable


@click.command(short_help="List the views, or describe one.")
@click.argument("name", required=False, shell_complete=complete_views)
@readable_option
def views(name: str | None, warehouse: Readable) -> None:  # noqa: ARG001 - every warehouse has the same views
    """List the views, one line each. With NAME, show its description and the meaning of its columns."""
    from moewh.warehouse.answer import catalog

    click.echo(catalog.list_views() if name is None else catalog.describe_view(name))
