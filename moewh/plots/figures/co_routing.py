"""Which experts of a layer are chosen together."""

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
    experts, top_k = int(rows["num_experts"][0]), int(rows["top_k"][0])
    others = top_k - 1  # each of an expert's tokens counts once per other expert it is routed to
    return pair_map(rows, measure, ("expert_a", "expert_b"), (experts, experts), (others, others, top_k * others))


PANEL = Panel(
    title="Co-routing",
    about="Experts of the layer that are chosen together. lift: relative to independent choices, 1 (white) is chance; "
    "conditional: share of the row's tokens that also go to the column.",
    query="co_routing",
    by=("run_id", "layer"),
    draw=_draw,
    order=("expert_a", "expert_b"),
    measures=PAIR_MEASURES,
    pairs=True,
    sql=f"""
        select answer.*, layers.num_experts as num_experts, layers.top_k as top_k
        from {ANSWER} as answer join layers on layers.run_id = answer.run_id and layers.layer = answer.layer""",
    empty="A layer with one expert per token has no pairs, and neither has a run that was imported as counts only.",
)


def co_routing(warehouse: Warehouse, layer: int, run: str | None = None, *, measure: str | None = None) -> PlotlyFigure:
    """Draw which experts of a layer are chosen together [expert_a, expert_b]: lift, conditional or tokens."""
    return PANEL.figure(warehouse, measure, run_id=run, layer=layer)
