"""Which experts a domain uses more, or less, than all domains together."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Figure
from moewh.plots.experts import expert_map
from moewh.plots.panel import Panel
from moewh.plots.rows import ANSWER, Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    return expert_map(rows, measure, _FORMATS, around_one=measure == "lift")


_FORMATS = {"lift": ".4~g", "share": ".4~g", "overall_share": ".4~g", "tokens": ",d", "chance": ".2~g"}
PANEL = Panel(
    title="Domains",
    about="Lift of each expert in the domain: its share of the domain's tokens over its share of all. 1 (white) is no "
    "preference. chance is the standard error of the lift, sqrt(1 / tokens), if tokens were independent; those of one "
    "prompt are not.",
    query="domain_specialization",
    by=("run_id", "domain"),
    draw=_draw,
    order=("layer", "expert"),
    measures=("lift", "share"),
    sql=f"select *, sqrt(1 / nullif(tokens, 0)) as chance from {ANSWER}",
    empty="No token of this domain was routed.",
)


def domains(
    warehouse: Warehouse, domain: str | None, run: str | None = None, *, measure: str | None = None
) -> PlotlyFigure:
    """Draw a domain's use of each expert [layers, experts] relative to all domains; None: prompts without a domain."""
    return PANEL.figure(warehouse, measure, run_id=run, domain=domain)
