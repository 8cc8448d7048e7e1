"""A figure's definition: the source of its numbers, the selection of one drawing, and how to draw it.

`figures/` has one file per figure. A function of `moewh.plots` draws one selection; `moewh report` draws all of them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moewh.plots.arguments import opened, selection
from moewh.plots.drawing import Figure
from moewh.plots.rows import ANSWER, Rows, ask, groups
from moewh.warehouse.answer.existence import require_existing
from moewh.warehouse.answer.parameters import kinds_of
from moewh.warehouse.answer.query import Value, find_query
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.views.shipped import view_names
from moewh.warehouse.views.sql import sql_string

if TYPE_CHECKING:
    import duckdb
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse

RUN, DOMAIN, LAYER = "run_id", "domain", "layer"
REFERENCE = "reference_run_id"
"""The columns that select a drawing of a whole series, by the last checkpoint of each curve."""
KINDS = {RUN: "run", DOMAIN: "domain", LAYER: "layer", "expert": "expert"}
"""Selecting column → its kind of parameter, with which values that do not exist are refused."""
Draw = Callable[[Rows, str], Figure]
"""Draws one measure of the rows of one selection."""
NEWEST = "select run_id from runs order by created_at desc, run_id desc limit 1"


@dataclass(frozen=True)
class Panel:
    """One figure."""

    title: str
    about: str
    """What it shows and how to read it, in one or two sentences."""
    query: str
    """The view or saved query whose numbers it shows."""
    by: tuple[str, ...]
    """The columns that select one drawing."""
    draw: Draw
    order: tuple[str, ...]
    """Columns that order a drawing's rows."""
    measures: tuple[str, ...]
    """The columns that can be shown, the first by default."""
    sql: str = f"select * from {ANSWER}"
    values: Mapping[str, Value] = field(default_factory=dict)
    """Parameters of the saved query; `sql` may use them as $name."""
    empty: str = "No rows."
    """Why a selection may have no drawing."""
    saved_query: str | None = None
    """The saved query that prints the same numbers, if `query` is a view that it reads."""
    pairs: bool = False
    """True for a figure of `moewh.plots.pairs`, which can be drawn from counts alone."""
    scans: bool = False
    """True if the cost grows with tokens: for large runs, `moewh report` uses `sample`, or leaves the figure out."""
    sample: str | None = None
    """The saved query that computes the same over the first `prompts` prompts."""

    def rows(self, connection: duckdb.DuckDBPyConnection, at: Mapping[str, Value | None]) -> Rows:
        """Return the rows of a selection, or of everything, in the order of `by` and `order`."""
        where = " and ".join(f'"{name}" is not distinct from ${name}' for name in at) or "true"
        order = ", ".join(f'"{name}"' for name in (*self.by, *self.order))
        sql = f"select * from ({self.sql}) where {where} order by {order}"
        named = {name: value for name, value in self.values.items() if f"${name}" in self.sql}
        return ask(connection, self.query, self.values, sql, {**named, **at})

    def drawings(
        self, connection: duckdb.DuckDBPyConnection, at: Mapping[str, Value | None]
    ) -> Iterator[tuple[dict[str, Any], Rows]]:
        """Yield each selection within `at` that has rows, together with its rows."""
        for key, rows in groups(self.rows(connection, at), self.by):
            yield dict(zip(self.by, key, strict=True)), rows

    def command(self, at: Mapping[str, Value | None]) -> str:
        """Return the command that prints the numbers of a selection."""
        named = self.saved_query or self.query
        if named not in view_names():
            taken = kinds_of(find_query(named))
            known = {KINDS.get(name, name): value for name, value in at.items() if value is not None}
            given = {**self.values, **{name: value for name, value in known.items() if name in taken}}
            return " ".join(["moewh query", named, *(f"-p {shell_word(f'{k}={v}')}" for k, v in given.items())])
        where = " and ".join(f"{name} {_equals(value)}" for name, value in at.items())
        return f"moewh query -c {shell_word(f'from {self.query} where {where}')}"

    def figure(self, warehouse: Warehouse, measure: str | None, **at: Value | None) -> PlotlyFigure:
        """Return a selection as a Plotly figure; without a run, the newest is used.

        Raises UsageError for an unknown measure, a value of another type, or without Plotly; MoewhError for a value not
        in the warehouse.
        """
        graph = plotly()
        chosen = self.measures[0] if measure is None else measure
        if chosen not in self.measures:
            raise UsageError(f"there is no measure {chosen!r}. Known: {', '.join(self.measures)}.")
        connection = opened(warehouse).connection.cursor()
        chosen_run = {} if at.get(RUN) is not None else {RUN: newest_run(connection)}
        at = {**selection(at), **chosen_run}
        named = {KINDS[name]: value for name, value in at.items() if value is not None}
        require_existing(
            lambda sql, values: connection.execute(sql, dict(values)).fetchall(), {k: k for k in named}, named
        )
        if REFERENCE in self.by:
            found = [rows for _, rows in self.drawings(connection, {}) if at[RUN] in rows[RUN]]
        else:
            found = [rows for _, rows in self.drawings(connection, at)]
        if not found:
            raise MoewhError(f"{self.query} has no rows for {described(at)}. {self.empty}")
        drawn = self.draw(found[0], chosen)
        title = {"text": f"{self.title}: {described(at)}", "x": 0.02, "xanchor": "left"}
        margin = {**drawn["layout"]["margin"], "t": 56}
        return graph.Figure({**drawn, "layout": {**drawn["layout"], "title": title, "margin": margin}})


def described(at: Mapping[str, Value | None]) -> str:
    """Return a selection in words, escaped for Plotly."""
    from moewh.plots.drawing import label

    words = {RUN: "run", DOMAIN: "domain", LAYER: "layer"}
    return ", ".join(f"{words.get(name, name)} {label(None if v is None else str(v))}" for name, v in at.items())


def newest_run(connection: duckdb.DuckDBPyConnection) -> str:
    """Return the run that began last. Raises MoewhError if there is none."""
    found = connection.execute(NEWEST).fetchall()
    if not found:
        raise MoewhError("the warehouse has no runs. `moewh ingest` makes one.")
    return str(found[0][0])


def plotly() -> Any:
    """Return `plotly.graph_objects`. Raises UsageError if Plotly is not installed."""
    try:
        import plotly.graph_objects
    except ImportError:
        raise UsageError("figures need Plotly. Run `pip install 'moewh[report]'`.") from None
    return plotly.graph_objects


def shell_word(text: str) -> str:
    """Return a text as a bash word, with characters without a glyph escaped."""
    if not text.isprintable():
        return "$'" + "".join(_escaped(mark) for mark in text) + "'"
    if "'" in text and not re.search(r'["$`\\!]', text):
        return f'"{text}"'
    return shlex.quote(text)


def _escaped(mark: str) -> str:
    if mark in "\\'":
        return f"\\{mark}"
    return mark if mark.isprintable() else f"\\U{ord(mark):08x}"


def _equals(value: Value | None) -> str:
    if value is None:
        return "is null"
    return f"= {sql_string(value)}" if isinstance(value, str) else f"= {value}"
