"""Where the tokens of an expert go at the next MoE layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Figure
from moewh.plots.pairs import PAIR_MEASURES, pair_map
from moewh.plots.panel import Panel
from moewh.plots.rows import ANSWER, Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    shape = int(rows["num_experts"][0]), int(rows["next_num_experts"][0])
    top_k, next_top_k = int(rows["top_k"][0]), int(rows["next_top_k"][0])
    return pair_map(rows, measure, ("expert", "next_expert"), shape, (next_top_k, top_k, top_k * next_top_k))


PANEL = Panel(
    title="Transitions",
    about="Where the tokens of an expert (row) go at the next MoE layer (column). lift: relative to independent "
    "choices, 1 (white) is chance; conditional: share of the row's tokens.",
    query="layer_transitions",
    by=("run_id", "layer"),
    draw=_draw,
    order=("expert", "next_expert"),
    measures=PAIR_MEASURES,
    pairs=True,
    sql=f"""
        select
            answer.*,
            here.num_experts as num_experts,
            here.top_k as top_k,
            there.num_experts as next_num_experts,
            there.top_k as next_top_k
        from {ANSWER} as answer
        join layers as here on here.run_id = answer.run_id and here.layer = answer.layer
        join layers as there on there.run_id = answer.run_id and there.layer = answer.next_layer""",
    empty="The last MoE layer has no next one. A run that was imported as counts only has no transitions.",
)


def transitions(
    warehouse: Warehouse, layer: int, run: str | None = None, *, measure: str | None = None
) -> PlotlyFigure:
    """Draw where tokens go from a layer to the next [expert, next_expert]: lift, conditional or tokens."""
    return PANEL.figure(warehouse, measure, run_id=run, layer=layer)
