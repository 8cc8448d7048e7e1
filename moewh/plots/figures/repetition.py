"""How often a token is routed like the token before it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from moewh.plots.drawing import Axis, Curve, Figure, curves
from moewh.plots.panel import Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    names = [name for name in ("any_choice", "first_choice") if not np.isnan(rows[name]).all()]
    own = [Curve(name, rows[name]) for name in names]
    chance = [Curve(f"{name}_random", rows[f"{name}_random"], chance=True) for name in names]
    return curves(Axis("layer", rows["layer"].tolist()), measure, [*own, *chance])


PANEL = Panel(
    title="Repetition",
    about="Share of adjacent tokens that share an expert (any_choice) or their first choice. Dashed: the same under "
    "random routing.",
    query="expert_repetition",
    by=("run_id", "domain"),
    draw=_draw,
    order=("layer",),
    measures=("share of adjacent tokens",),
    empty="The domain has no two adjacent tokens.",
)


def repetition(warehouse: Warehouse, domain: str | None, run: str | None = None) -> PlotlyFigure:
    """Draw how often adjacent tokens of a domain share experts, by layer, next to random routing."""
    return PANEL.figure(warehouse, None, run_id=run, domain=domain)
