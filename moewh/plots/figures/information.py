"""How many bits a token's choice of experts shares with the token and with its domain."""

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
    parts = [part for part in ("token", "domain") if not np.isnan(rows[f"{part}_information"].astype(float)).all()]
    own = [Curve(f"{part}_information", rows[f"{part}_information"]) for part in parts]
    chance = [Curve(f"{part}_chance", rows[f"{part}_chance"], chance=True) for part in parts]
    return curves(Axis("layer", rows["layer"].tolist()), measure, [*own, *chance])


PANEL = Panel(
    title="Information",
    about="Bits that a token's choice of experts shares with the token itself and with its domain. Dashed: the value "
    "for independent choices, by chance; subtract it before comparing.",
    query="choice_information",
    by=("run_id",),
    draw=_draw,
    order=("layer",),
    measures=("bits",),
)


def information(warehouse: Warehouse, run: str | None = None) -> PlotlyFigure:
    """Draw the bits that the choice of experts shares with token and domain, by layer, next to chance."""
    return PANEL.figure(warehouse, None, run_id=run)
