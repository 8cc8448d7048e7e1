"""Completion candidates that only moewh knows: queries, views, runs, layers, parameters of a query.

Each function is the `shell_complete` of an option or argument: the parsed words before the cursor, and the word at it,
in; candidates out. None of them opens a warehouse: they list files and folders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import click
from click.shell_completion import CompletionItem

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.query import Query
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import SCHEMA_RUN

Items = list[CompletionItem[str]]
Complete = Callable[[click.Context, click.Parameter, str], Items]
"""The function that click calls with the parsed words before the cursor and the word at the cursor."""
ASSIGNMENT = "assignment"
"""The type of `name=`, after which the shell adds no space."""


def _layout(context: click.Context) -> Layout:
    """Return the warehouse given by the words so far or the environment; the default if that is unusable."""
    asked = context.params.get("warehouse")
    return asked if isinstance(asked, Layout) else Layout(Path("wh").absolute())


def _beginning(names: Iterable[str], incomplete: str) -> Items:
    return [CompletionItem(name) for name in names if name.startswith(incomplete)]


def complete_runs(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the id of a run."""
    return _beginning(_run_ids(_layout(context)), incomplete)


def _run_ids(layout: Layout) -> list[str]:
    from moewh.warehouse.runs import run_ids

    return run_ids(layout)


def _layers(layout: Layout) -> list[str]:
    """Return the MoE layers of all runs."""
    import duckdb

    files = [str(layout.run(run_id) / schema.LAYERS.file) for run_id in [*_run_ids(layout), SCHEMA_RUN]]
    present = [file for file in files if Path(file).is_file()]
    if not present:
        return []
    with duckdb.connect() as connection:
        sql = "select distinct layer from read_parquet($files, hive_partitioning = false) order by layer"
        return [str(layer) for (layer,) in connection.execute(sql, {"files": present}).fetchall()]


def complete_layers(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the number of an MoE layer."""
    return _beginning(_layers(_layout(context)), incomplete)


def complete_queries(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the names that `moewh query` takes, each with its description; files if no name fits."""
    from moewh.warehouse.views.shipped import canned_names

    names = (*canned_names(), *queries.saved_names())
    return [CompletionItem(name, help=_answers(name)) for name in names if name.startswith(incomplete)]


def _answers(name: str) -> str:
    """Return the first line of a view's or saved query's file, which describes its result."""
    from moewh.warehouse.views.shipped import QUERIES

    folder = "saved" if name in queries.saved_names() else "views"
    with (QUERIES / folder / f"{name}.sql").open(encoding="utf-8") as file:
        return file.readline().removeprefix("--").strip().removeprefix(f"{name}: ")


def complete_views(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete the name of a view."""
    from moewh.warehouse.views.shipped import view_names

    return _beginning(view_names(), incomplete)


def complete_folders(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
    """Complete a folder."""
    return [CompletionItem(incomplete, type="dir")]


def complete_parameters(asked: Callable[[click.Context], Sequence[Query]]) -> Complete:
    """Complete `name=` for the parameters of the queries in the words so far, then a run or layer as its value."""

    def complete(context: click.Context, _parameter: click.Parameter, incomplete: str) -> Items:
        from moewh.warehouse.answer.parameters import kinds_of

        try:
            found = asked(context)
        except (MoewhError, OSError):  # a missing query has no parameters
            return []
        name, equals, value = incomplete.partition("=")
        kinds = {known: kind for query in found for known, kind in kinds_of(query).items()}
        if equals:
            values = _values(kinds.get(name, ""), _layout(context))
            return [CompletionItem(f"{name}={one}") for one in values if one.startswith(value)]
        taken = {assignment.partition("=")[0] for assignment in context.params.get("parameters") or ()}
        names = sorted({known for query in found for known in query.variables} - taken)
        return [CompletionItem(f"{known}=", type=ASSIGNMENT) for known in names if known.startswith(incomplete)]

    return complete


def _values(kind: str, layout: Layout) -> list[str]:
    """Return the values for a parameter of a kind, as far as folders and small files show them."""
    if kind.startswith("run"):
        return _run_ids(layout)
    return _layers(layout) if kind == "layer" else []


def asked_query(context: click.Context) -> Sequence[Query]:
    """Return the query named by the words of `moewh query` so far. Raises UsageError for an unknown one."""
    sql, names = context.params["sql"], _arguments(context, "name")
    if sql is not None:
        return [Query("-c", sql)]
    if not names:
        raise UsageError("no query is named yet.")
    return [queries.find_query(names[0])]


def asked_checks(context: click.Context) -> Sequence[Query]:
    """Return the checks named by the words of `moewh check` so far. Raises UsageError if there are none."""
    from moewh.warehouse.trust.check import find_checks, shipped_checks

    paths = _arguments(context, "paths")
    return find_checks(tuple(map(Path, paths))) if paths else shipped_checks()


def _arguments(context: click.Context, name: str) -> list[str]:
    """Return a command's arguments so far; click leaves them unparsed while an option still lacks its value."""
    parsed = context.params[name]
    return [*([parsed] if isinstance(parsed, str) else parsed or ()), *context.args]
