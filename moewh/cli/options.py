"""Options shared by several commands: each function here is a decorator that adds them to a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moewh.cli.candidates import complete_folders
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
        shell_complete=complete_folders,
        callback=_layout,
        help="The warehouse directory.  [default: $MOEWH_WAREHOUSE, else ./wh]",
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
        click.option("--unsafe", is_flag=True, help="Lift the jail: run any statement, on any file you can access."),
        click.option(
            "--memory-limit", "memory", metavar="SIZE", help="Memory that DuckDB may use, such as 4GB.  [default: 80%]"
        ),
        click.option(
            "--timeout", type=float, metavar="SECONDS", callback=_positive, help="Stop a query after this time."
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
    master = click.option("--master", metavar="URL", help="Spark master, with --engine spark.  [default: local[*]]")
    engine = click.option(
        "--engine", type=click.Choice(ENGINES), default="duckdb", show_default=True, help="Where SQL runs."
    )
    return engine(master(command))


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that prints rows `--format` and `-o`."""
    file = click.option(
        "-o", "output", type=click.Path(path_type=Path), metavar="FILE", help="Write to FILE instead of stdout."
    )
    form = click.option("--format", "form", type=click.Choice(FORMATS), help="[default: FILE's suffix, else table]")
    return form(file(command))
