"""The two engines that answer a query: DuckDB in the jail, and Spark. Both are asked in the same way.

Before either runs anything, the values of a query's parameters get their types and what they name is looked up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.query import Answer, Query, Value
from moewh.warehouse.errors import UsageError

if TYPE_CHECKING:
    from moewh.warehouse.answer.jail import Limits
    from moewh.warehouse.remote.published import Readable

Ask = Callable[[Query, Mapping[str, Value]], Answer | None]
"""Gives a query's answer; None for a statement without one, which is then done."""
ENGINES = ("duckdb", "spark")


@dataclass(frozen=True)
class Engine:
    """What answers queries over one warehouse: an `Ask` that takes values as they were typed."""

    run: Ask
    """Answers a query with values of the right types, without looking anything up."""
    _looked_up: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    """What the warehouse was found to hold, by SQL: asked once for all queries."""

    def __call__(self, query: Query, values: Mapping[str, Value]) -> Answer | None:
        """Answer a query. Raises as `meant` does, and what the engine raises."""
        return self.run(query, self.meant(query, values))

    def meant(self, query: Query, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return a query's values in the types of its parameters, once what they name was found.

        Raises UsageError for names that do not fit the query and for a value that is not of its parameter's type;
        MoewhError for what is not in the warehouse.
        """
        from moewh.warehouse.answer.existence import require_existing
        from moewh.warehouse.answer.parameters import kinds_of, typed

        if not values:
            return values
        if (bound := queries.bound_names(query.sql)) is not None:
            queries.check_names(query, values, bound)
        kinds = kinds_of(query)
        made = typed(query, kinds, values)
        require_existing(self._look, kinds, made)
        return made

    def _look(self, sql: str, values: Mapping[str, Value]) -> list[tuple[Any, ...]]:
        if values or sql not in self._looked_up:
            answer = self.run(Query("what the warehouse holds", sql, shipped=True), values)
            rows = answer.execute().fetchall() if answer is not None else []
            if values:
                return rows
            self._looked_up[sql] = rows
        return self._looked_up[sql]


@contextmanager
def open_engine(
    engine: str, master: str | None, warehouse: Readable, limits: Limits, output: Path | None = None
) -> Iterator[Engine]:
    """Yield what answers queries over a warehouse; DuckDB may write the one file `output`. Raises UsageError."""
    if engine == "duckdb":
        if master is not None:
            raise UsageError("--master is for --engine spark.")
        from moewh.warehouse.answer.jail import open_jailed

        with open_jailed(warehouse, limits, output) as connection:
            yield Engine(lambda query, values: queries.prepare(connection, query, values, unsafe=limits.unsafe))
        return
    if limits.timeout is not None or limits.memory is not None:
        raise UsageError("--timeout and --memory-limit are for --engine duckdb. Spark has spark-defaults.conf.")
    from moewh.warehouse.answer import spark

    layout = spark.on_this_machine(warehouse)
    with spark.open_spark(master) as session:
        yield Engine(lambda query, values: spark.answer(session, layout, query, values, unsafe=limits.unsafe))
