"""A query's result as columns, and its rows in groups, from which every figure is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moewh.warehouse.answer.query import Value, find_query, prepare
from moewh.warehouse.views.shipped import view_names

if TYPE_CHECKING:
    import duckdb

Rows = dict[str, npt.NDArray[Any]]
"""Column name → values, all of one length. NULL is NaN in a column of numbers, None in a column of texts."""
ANSWER = "{answer}"


def ask(
    connection: duckdb.DuckDBPyConnection,
    query: str,
    values: Mapping[str, Value],
    sql: str,
    bound: Mapping[str, Value | None],
) -> Rows:
    """Return the rows of `sql`, in which ANSWER is replaced with a view's or saved query's result for `values`."""
    if query in view_names():
        statement = sql.replace(ANSWER, query)
    else:
        answer = prepare(connection, find_query(query), values)
        assert answer is not None  # None only for an unsafe statement
        statement = sql.replace(ANSWER, f"({answer.statement})")
    found = connection.execute(statement, dict(bound)).fetchnumpy()
    return {name: _plain(column) for name, column in found.items()}


def _plain(column: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a column without a mask."""
    if not isinstance(column, np.ma.MaskedArray):
        return column
    if column.dtype == object:
        plain = np.array(column.data)
        plain[np.ma.getmaskarray(column)] = None  # `filled(None)` would insert numpy's default string
        return plain
    if not column.mask.any():
        return np.array(column.data)
    plain = np.array(column.data, np.float64)
    plain[column.mask] = np.nan
    return plain


def groups(rows: Rows, by: Sequence[str]) -> Iterator[tuple[tuple[Any, ...], Rows]]:
    """Yield each group of consecutive rows with equal values in the columns `by`, with those values, in order."""
    length = len(next(iter(rows.values())))
    if not length:
        return
    changes = np.zeros(length - 1, bool)
    for name in by:
        changes |= rows[name][1:] != rows[name][:-1]
    edges = [0, *(np.flatnonzero(changes) + 1).tolist(), length]
    for start, end in pairwise(edges):
        key = tuple(_scalar(rows[name][start]) for name in by)
        yield key, {name: column[start:end] for name, column in rows.items()}


def _scalar(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def matrix(rows: Rows, row: str, column: str, value: str, shape: tuple[int, int]) -> npt.NDArray[np.float64]:
    """Return a column as a matrix [rows, columns], placed by two columns of indices; 0 where there is no row."""
    made = np.zeros(shape)
    made[rows[row], rows[column]] = rows[value]
    return made
