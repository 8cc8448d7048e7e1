"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moewh.warehouse.answer.engine import ENGINES
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout


def warehouse_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command `--warehouse DIR`; it receives a `Layout` as its argument `warehouse`."""
    return click.option(
        "--warehouse",
        metavar="DIR",
        envvar="MOEWH_WAREHOUSE",
        default="wh",
        show_default="$MOEWH_WAREHOUSE, else ./wh",
        callback=_layout,
        help="The warehouse directory.",
    )(command)


def _layout(_context: click.Context, _parameter: click.Parameter, value: str) -> Layout:
    root = Path(value).absolute()
    if "\\" in str(root) or str(root).encode(errors="replace").decode() != str(root):
        raise UsageError(
            f"{str(root)!a} has a backslash or is not UTF-8: DuckDB cannot find files there. Choose another."
        )
    return Layout(root)


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that runs SQL `--timeout`, `--memory-limit` and `--unsafe`, as `timeout`, `memory`, `unsafe`."""
    for option in (
        click.option("--unsafe", is_flag=True, help="Run any statement on any file, as DuckDB itself would."),
        click.option("--memory-limit", "memory", metavar="SIZE", help="Such as 4GB.  [default: 80% of the memory]"),
        click.option(
            "--timeout", type=float, metavar="SECONDS", callback=_positive, help="Stop a query that takes longer."
        ),
    ):
        command = option(command)
    return command


def _positive(_context: click.Context, _parameter: click.Parameter, value: float | None) -> float | None:
    if value is not None and not value > 0:
        raise UsageError(f"--timeout is {value:g}. Give a number of seconds above 0.")
    return value


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that runs SQL `--engine` and `--master`."""
    master = click.option("--master", metavar="URL", help="Spark's master, with --engine spark.  [default: local[*]]")
    engine = click.option("--engine", type=click.Choice(ENGINES), default="duckdb", show_default=True)
    return engine(master(command))


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that prints rows `--format` and `-o`."""
    file = click.option("-o", "output", type=click.Path(path_type=Path), metavar="FILE", help="Write to a file.")
    form = click.option("--format", "form", type=click.Choice(FORMATS), help="Default: table, or as FILE is named.")
    return form(file(command))
