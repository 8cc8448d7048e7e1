"""How much of the last checkpoint's routing each earlier checkpoint already has."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Figure, training_curves
from moewh.plots.panel import REFERENCE, Panel
from moewh.plots.rows import ANSWER, Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    return training_curves(rows, measure, chance="random")


PANEL = Panel(
    title="Saturation",
    about="Share of the last checkpoint's experts that a checkpoint already chooses, over the same tokens. Dashed: "
    "the share for two independent, even routers.",
    query="saturation_over_training",
    by=("series", REFERENCE),
    draw=_draw,
    order=("layer", "train_step", "run_id"),
    measures=("saturation",),
    sql=f"select * from {ANSWER} where train_step is not null",
    empty="The run is not a checkpoint of a series with a training step.",
    scans=True,
    sample="saturation_of_prompts",
)


def saturation(warehouse: Warehouse, run: str | None = None) -> PlotlyFigure:
    """Draw `saturation_over_training` for a run's series: a curve per layer, over the training steps."""
    return PANEL.figure(warehouse, None, run_id=run)
