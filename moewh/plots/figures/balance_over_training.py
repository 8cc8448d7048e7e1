"""How the balance of the layers changes over the checkpoints of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Figure, training_curves
from moewh.plots.panel import REFERENCE, Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    return training_curves(rows, measure)


PANEL = Panel(
    title="Balance over training",
    about="The load of each layer from checkpoint to checkpoint: cv (0 is even), experts without tokens, and the share "
    "of choices that moved to other experts since the previous checkpoint.",
    query="load_drift",
    by=("series", REFERENCE),
    draw=_draw,
    order=("layer", "train_step", "run_id", "previous_run_id"),
    measures=("cv", "moved", "dead_experts"),
    empty="The run is not a complete checkpoint of a series with a training step.",
)


def balance_over_training(warehouse: Warehouse, run: str | None = None, *, measure: str | None = None) -> PlotlyFigure:
    """Draw one measure of `load_drift` over the checkpoints of a run's series: cv, moved or dead_experts."""
    return PANEL.figure(warehouse, measure, run_id=run)
