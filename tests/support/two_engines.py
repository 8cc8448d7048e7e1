"""A query's rows on Spark compared with those on DuckDB."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.warehouse.answer import spark
from moewh.warehouse.answer.engine import Ask, Engine
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.files.layout import Layout
from tests.support.opened import engine_of

if TYPE_CHECKING:
    import pytest
    from pyspark.sql import SparkSession

Rows = list[tuple[Any, ...]]


def on_duckdb(layout: Layout, query: Query, values: dict[str, Value]) -> tuple[list[str], Rows]:
    return answered(engine_of(layout), query, values)


def answered(ask: Ask, query: Query, values: dict[str, Value]) -> tuple[list[str], Rows]:
    found = ask(query, values)
    assert found is not None
    cursor = found.execute()
    return [f"{name} {kind}" for name, kind, *_ in cursor.description or ()], cursor.fetchall()


def assert_same(layout: Layout, session: SparkSession, query: Query, values: dict[str, Value], ordered: bool) -> None:
    names, expected = on_duckdb(layout, query, values)
    spark_names, rows = answered(Engine(lambda q, v: spark.answer(session, layout, q, v)), query, values)
    assert spark_names == names
    assert len(rows) == len(expected)
    if not ordered:
        rows, expected = sorted(rows, key=repr_without_floats), sorted(expected, key=repr_without_floats)
    for row, wanted in zip(rows, expected, strict=True):
        assert all(same(value, target) for value, target in zip(row, wanted, strict=True)), (row, wanted)


def keep_views(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Create the views of one warehouse, which does not change, once per session instead of once per query.

    A view is created again if its variables have other values; so are all views of any other warehouse.
    """
    create = spark._create_view
    made: dict[str, tuple[Path, str]] = {}

    def create_view(session: SparkSession, layout: Layout, name: str, values: Mapping[str, Value]) -> None:
        key = (layout.root, repr([(variable, values.get(variable)) for variable in sorted(_variables(name))]))
        if layout.root != root or made.get(name) != key:
            create(session, layout, name, values)
            made[name] = key

    patch.setattr(spark, "_create_view", create_view)


@cache
def _variables(name: str) -> frozenset[str]:
    """Return the variables that a view reads, directly or through other views."""
    from sqlglot import exp

    trees = [spark._definitions()[view] for view in (*spark._needed(spark._definitions()[name]), name)]
    calls = [call for tree in trees for call in tree.find_all(exp.Anonymous) if call.name.lower() == "getvariable"]
    return frozenset(call.expressions[0].name for call in calls)


def same(value: Any, target: Any) -> bool:
    if isinstance(value, float) and isinstance(target, float):
        return math.isclose(value, target, rel_tol=1e-9, abs_tol=1e-12)
    return type(value) is type(target) and bool(value == target)


def repr_without_floats(row: tuple[Any, ...]) -> str:
    return repr([None if isinstance(value, float) else value for value in row])
