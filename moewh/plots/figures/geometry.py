"""Whether experts with similar weights are chosen together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moewh.plots.drawing import Axis, Curve, Figure, curves
from moewh.plots.panel import Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse

_ALIKE = ("router_cosine", "input_cosine", "output_cosine", "input_overlap", "output_overlap")


def _draw(rows: Rows, measure: str) -> Figure:
    known = [name for name in _ALIKE if not np.isnan(rows[name].astype(float)).all()]
    drawn = [Curve(name, rows[name]) for name in known]
    return curves(Axis("layer", rows["layer"].tolist()), measure, drawn, tozero=False)


PANEL = Panel(
    title="Geometry and co-routing",
    about="Rank correlation, over the pairs of experts, between the lift with which they are chosen together and the "
    "similarity of their weights. 0: no relation.",
    query="geometry_predicts_co_routing",
    by=("run_id",),
    draw=_draw,
    order=("layer",),
    measures=("Spearman's rank correlation",),
    empty="The run has no geometry. Measure it with `moewh geometry`.",
)


def geometry(warehouse: Warehouse, run: str | None = None) -> PlotlyFigure:
    """Draw how well similarity of weights predicts co-routing, by layer, from `geometry_predicts_co_routing`."""
    return PANEL.figure(warehouse, None, run_id=run)
