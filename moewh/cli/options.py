"""Options shared by several commands; each function is a decorator that adds them to a command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from moewh.cli.candidates import complete_folders
from moewh.warehouse.answer.engine import ENGINES
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.errors import UsageError
from moewh.warehouse.remote.published import Readable, only_written, readable


def warehouse_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--warehouse DIR` to a command that writes, which receives it as a `Layout` in its argument `warehouse`."""
    return click.option(
        "--warehouse",
        metavar="DIR",
        envvar="MOEWH_WAREHOUSE",
        default="wh",
        shell_complete=complete_folders,
        callback=lambda *given: only_written(_readable(*given)),
        help="The warehouse directory.  [default: $MOEWH_WAREHOUSE, else ./wh]",
    )(command)


def readable_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--warehouse DIR|URL` to a command that reads, which receives it as a `Readable` named `warehouse`."""
    return click.option(
        "--warehouse",
        metavar="DIR|URL",
        envvar="MOEWH_WAREHOUSE",
        default="wh",
        shell_complete=complete_folders,
        callback=_readable,
        help="The warehouse: a directory, or the s3://, hf://datasets/ or https:// URL of a published one.  "
        "[default: $MOEWH_WAREHOUSE, else ./wh]",
    )(command)


def _readable(_context: click.Context, _parameter: click.Parameter, value: str) -> Readable:
    return readable(value)


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--timeout`, `--memory-limit` and `--unsafe` to a command that runs SQL, as `timeout`, `memory`, `unsafe`."""
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
    """Add `--engine` and `--master` to a command that runs SQL."""
    master = click.option("--master", metavar="URL", help="Spark master, with --engine spark.  [default: local[*]]")
    engine = click.option(
        "--engine", type=click.Choice(ENGINES), default="duckdb", show_default=True, help="Where SQL runs."
    )
    return engine(master(command))


def format_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--format` and `-o` to a command that prints rows."""
    file = click.option(
        "-o", "output", type=click.Path(path_type=Path), metavar="FILE", help="Write to FILE instead of stdout."
    )
    form = click.option("--format", "form", type=click.Choice(FORMATS), help="[default: FILE's suffix, else table]")
    return form(file(command))
