"""The load of every expert, as a map of layers by experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Figure
from moewh.plots.experts import expert_map
from moewh.plots.panel import Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    return expert_map(rows, measure, _FORMATS)


_FORMATS = {"share": ".4~g", "tokens": ",d", "mean_weight": ".4~g"}
PANEL = Panel(
    title="Load",
    about="Share of a layer's choices that each expert gets. An even load is 1 / experts everywhere.",
    query="expert_load",
    by=("run_id",),
    draw=_draw,
    order=("layer", "expert"),
    measures=tuple(_FORMATS),
)


def load(warehouse: Warehouse, run: str | None = None, *, measure: str | None = None) -> PlotlyFigure:
    """Draw the load of every expert [layers, experts] from `expert_load`: share, tokens or mean_weight."""
    return PANEL.figure(warehouse, measure, run_id=run)
