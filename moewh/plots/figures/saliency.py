"""How much each expert contributes, by the measures used to rank experts for pruning."""

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


_FORMATS = {
    **dict.fromkeys(("mean_weighted_norm", "mean_norm", "weighted_norm_sum", "norm_sum", "mean_cosine"), ".4~g"),
    "choices": ",d",
}
PANEL = Panel(
    title="Saliency",
    about="What each expert adds, by the norm of its outputs: mean_weighted_norm (REAP) is the mean of weight times "
    "norm, mean_norm (EAN) leaves the weight out. The least salient experts of a layer are pruned first.",
    query="expert_saliency",
    by=("run_id",),
    draw=_draw,
    order=("layer", "expert"),
    measures=tuple(_FORMATS),
    empty="The run was ingested without `--expert-outputs`.",
)


def saliency(warehouse: Warehouse, run: str | None = None, *, measure: str | None = None) -> PlotlyFigure:
    """Draw the saliency of every expert [layers, experts] from `expert_saliency`: mean_weighted_norm, mean_norm, …"""
    return PANEL.figure(warehouse, measure, run_id=run)
