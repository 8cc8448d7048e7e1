"""The two engines that answer a query: DuckDB in the jail, and Spark. Both are asked in the same way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from warehouse import query as queries
from warehouse.errors import UsageError
from warehouse.query import Answer, Query, Value

if TYPE_CHECKING:
    from warehouse.jail import Limits
    from warehouse.layout import Layout

Ask = Callable[[Query, Mapping[str, Value]], Answer | None]
"""Gives a query's answer; None for a statement without one, which is then done."""
ENGINES = ("duckdb", "spark")


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command that runs SQL `--engine` and `--master`."""
    master = click.option("--master", metavar="URL", help="Spark's master, with --engine spark.  [default: local[*]]")
    engine = click.option("--engine", type=click.Choice(ENGINES), default="duckdb", show_default=True)
    return engine(master(command))


@contextmanager
def open_engine(
    engine: str, master: str | None, layout: Layout, limits: Limits, output: Path | None = None
) -> Iterator[Ask]:
    """Yield what answers queries over a warehouse; DuckDB may write the one file `output`. Raises UsageError."""
    if engine == "duckdb":
        if master is not None:
            raise UsageError("--master is for --engine spark.")
        from warehouse.jail import open_jailed

        with open_jailed(layout, limits, output) as connection:
            yield lambda query, values: queries.prepare(connection, query, values, unsafe=limits.unsafe)
        return
    if limits.timeout is not None or limits.memory is not None:
        raise UsageError("--timeout and --memory-limit are for --engine duckdb. Spark has spark-defaults.conf.")
    from warehouse import spark

    layout.require()
    with spark.open_spark(master) as session:
        yield lambda query, values: spark.answer(session, layout, query, values, unsafe=limits.unsafe)
