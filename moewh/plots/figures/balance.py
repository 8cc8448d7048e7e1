"""How evenly each layer uses its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Axis, Curve, Figure, curves
from moewh.plots.panel import Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    layers = Axis("layer", rows["layer"].tolist())
    return curves(layers, measure, [Curve(measure, rows[measure])], tozero="entropy" not in measure)


PANEL = Panel(
    title="Balance",
    about="How evenly each layer uses its experts. Even: normalized_entropy 1, max_over_mean 1, cv and gini 0.",
    query="load_balance",
    by=("run_id",),
    draw=_draw,
    order=("layer",),
    measures=("normalized_entropy", "entropy", "cv", "gini", "max_over_mean", "dead_experts"),
)


def balance(warehouse: Warehouse, run: str | None = None, *, measure: str | None = None) -> PlotlyFigure:
    """Draw one measure of `load_balance` over the layers: normalized_entropy, cv, gini, max_over_mean, …"""
    return PANEL.figure(warehouse, measure, run_id=run)
