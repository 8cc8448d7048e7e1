"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from warehouse.layout import Layout


def warehouse_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--warehouse DIR`; it receives a `Layout` as its argument `warehouse`."""
    return click.option(
        "--warehouse",
        metavar="DIR",
        envvar="MOEWH_WAREHOUSE",
        default="wh",
        show_default="$MOEWH_WAREHOUSE, else ./wh",
        callback=lambda _context, _parameter, value: Layout(Path(value).absolute()),
        help="The warehouse directory.",
    )(command)
