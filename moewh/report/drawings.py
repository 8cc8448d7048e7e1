"""One figure's part of a report: each selection that has rows, and the top tokens of every expert.

In: the rows of a selection (`moewh.plots.panel`). Out: plain data for the page, each number once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from moewh.plots.drawing import Figure
from moewh.plots.panel import DOMAIN, LAYER, REFERENCE, RUN, Panel
from moewh.plots.rows import Rows
from moewh.plots.texts import token_text
from moewh.report.numbers import encoded, packed


def selectors(panel: Panel) -> list[str]:
    """Return the columns by which the page selects a drawing: a series is selected by its runs."""
    named = (RUN if name == REFERENCE else name for name in panel.by if name != "series")
    return [{RUN: "run"}.get(name, name) for name in named]


def drawing(panel: Panel, at: dict[str, Any], rows: Rows, shapes: dict[str, Any]) -> dict[str, Any]:
    """Return one selection: its key, the command behind it, and a figure per measure.

    A figure of pairs has only the counts: the page derives all measures from them, in the figure that `shapes` holds.
    """
    runs = rows[RUN].tolist() if REFERENCE in at else [at[RUN]]
    common = {"runs": list(dict.fromkeys(runs)), "command": panel.command(at)}
    common |= {name: at[name] for name in (DOMAIN, LAYER) if name in at}
    if not panel.pairs:
        planes: dict[str, Any] = {}
        figures = {measure: _sharing(panel.draw(rows, measure), planes) for measure in panel.measures}
        return {**common, "figures": encoded(figures), **({"planes": planes} if planes else {})}
    drawn = panel.draw(rows, "tokens")
    trace = drawn["data"][0]
    counts = packed(np.nan_to_num(trace["z"]))
    if counts["shape"] not in shapes:
        figures = {measure: panel.draw(rows, measure) for measure in panel.measures}
        for figure in figures.values():
            for name in ("z", "customdata", "meta"):
                del figure["data"][0][name]
        shapes[counts["shape"]] = encoded(figures)
    return common | {"counts": counts, **{name: trace["meta"][name] for name in ("divisors", "diagonal")}}


def _sharing(figure: Figure, planes: dict[str, Any]) -> Figure:
    """Return a figure with names for matrices: each is stored once in `planes`, for all measures of a heat map."""
    trace = figure["data"][0]
    if trace["type"] == "heatmap":
        named = trace.pop("meta")["planes"]
        values = [trace["z"], *np.moveaxis(trace["customdata"], -1, 0)]
        planes |= {name: packed(plane) for name, plane in zip(named, values, strict=True) if name not in planes}
        trace["z"], trace["customdata"] = named[0], named[1:]
    return figure


def token_table(drawings: Sequence[tuple[dict[str, Any], Rows]]) -> dict[str, Any]:
    """Return the top tokens of every expert as one set of columns, each distinct text once."""
    texts: dict[str, int] = {}
    columns: dict[str, list[Any]] = {"run": [], "layer": [], "expert": [], "text": []}
    numbers: dict[str, list[Any]] = {"tokens": [], "share_of_token": [], "lift": []}
    runs: dict[str, int] = {}
    for at, rows in drawings:
        shown = [token_text(token, int(entry)) for token, entry in zip(rows["token"], rows["vocab_id"], strict=True)]
        columns["text"] += [texts.setdefault(text, len(texts)) for text in shown]
        columns["run"] += [runs.setdefault(at[RUN], len(runs))] * len(shown)
        for name in ("layer", "expert"):
            columns[name] += [at[name]] * len(shown)
        for name in numbers:
            numbers[name] += rows[name].tolist()
    packed_columns = {name: packed(np.array(values)) for name, values in (columns | numbers).items()}
    return {"runs": list(runs), "texts": list(texts), "columns": packed_columns}
