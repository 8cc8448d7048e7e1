"""Whether a domain's best expert has a higher lift than the best expert of random prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Axis, Curve, Figure, curves
from moewh.plots.panel import Panel
from moewh.plots.rows import Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse


def _draw(rows: Rows, measure: str) -> Figure:
    chance = [Curve(name, rows[name], chance=True) for name in ("shuffled", "shuffled_most")]
    return curves(Axis("layer", rows["layer"].tolist()), measure, [Curve(measure, rows[measure]), *chance])


PANEL = Panel(
    title="Specialization against chance",
    about="The greatest lift of any expert in the domain, by layer. Dashed: its mean and maximum over 20 shuffles of "
    "the prompts' labels, that is, by chance.",
    query="specialization_shuffled",
    by=("run_id", "domain"),
    draw=_draw,
    order=("layer",),
    measures=("lift",),
    empty="No expert gets a tenth of this domain's tokens.",
    scans=True,
)


def specialization(warehouse: Warehouse, domain: str | None, run: str | None = None) -> PlotlyFigure:
    """Draw the lift of a domain's best expert by layer, next to shuffled labels, from `specialization_shuffled`."""
    return PANEL.figure(warehouse, None, run_id=run, domain=domain)
