"""The load of every expert, as a map of layers by experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moewh.plots.drawing import Axis, Figure, Plane, heat_map
from moewh.plots.panel import Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    layers, experts = by_layer(rows)
    shown = [Plane(name, spread(rows, name), form) for name, form in _FORMATS.items() if name != measure]
    z = Plane(measure, spread(rows, measure), _FORMATS[measure])
    return heat_map(Axis("expert", range(experts)), Axis("layer", layers), z, *shown)


def by_layer(rows: Rows) -> tuple[list[int], int]:
    """Return the layers of some rows, and the most experts that a layer has."""
    return np.unique(rows["layer"]).tolist(), int(rows["expert"].max()) + 1


def spread(rows: Rows, column: str) -> npt.NDArray[np.float64]:
    """Return a column as layers by experts; NaN where a layer has fewer experts, or where it is NULL."""
    layers, experts = by_layer(rows)
    spread_LE = np.full((len(layers), experts), np.nan)
    spread_LE[np.searchsorted(layers, rows["layer"]), rows["expert"]] = rows[column]
    return spread_LE


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
