"""The two engines that answer a query, behind one interface: DuckDB in the jail, and Spark.

Before either runs a query, its parameter values are converted to their types, and the names in them are looked up.
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
"""Returns a query's answer; None for a statement without one, which has then been executed."""
ENGINES = ("duckdb", "spark")


@dataclass(frozen=True)
class Engine:
    """Answers queries over one warehouse: an `Ask` that takes values as the user typed them."""

    run: Ask
    """Answers a query with values of the right types, without look-ups."""
    _looked_up: dict[str, list[tuple[Any, ...]]] = field(default_factory=dict)
    """Results of the look-ups, by SQL, shared by all queries."""

    def __call__(self, query: Query, values: Mapping[str, Value]) -> Answer | None:
        """Answer a query. Raises as `checked_values` and the engine do."""
        return self.run(query, self.checked_values(query, values))

    def checked_values(self, query: Query, values: Mapping[str, Value]) -> Mapping[str, Value]:
        """Return a query's values in the types of its parameters, after looking up the names in them.

        Raises UsageError for parameters that the query does not have and for a value that is not of its parameter's
        type; MoewhError for a value that names something missing from the warehouse.
        """
        from moewh.warehouse.answer.existence import require_existing
        from moewh.warehouse.answer.parameters import check_declared, kinds_of, typed

        if not values:
            return values
        if (bound := queries.bound_names(query)) is not None:
            queries.check_names(query, values, bound)
        check_declared(query, values.keys())
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
    """Yield the engine for a warehouse; DuckDB may write one file, `output`. Raises UsageError."""
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
