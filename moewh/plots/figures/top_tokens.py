"""The tokens that an expert is chosen for, relative to chance."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moewh.plots.drawing import Figure, bars, label
from moewh.plots.panel import Panel
from moewh.plots.rows import ANSWER, Rows

if TYPE_CHECKING:
    from plotly.graph_objects import Figure as PlotlyFigure

    from moewh.api import Warehouse

MIN_TOKENS = 10
MOST = 10


def _draw(rows: Rows, measure: str) -> Figure:
    texts = [label(token or f"#{entry}") for token, entry in zip(rows["token"], rows["vocab_id"], strict=True)]
    return bars(texts, rows[measure], measure)


PANEL = Panel(
    title="Top tokens",
    about="The tokens of the vocabulary that the expert is chosen for most, relative to chance. Rare ones, whose lift "
    "is high by chance, are left out. share_of_token: how often the token goes to the expert.",
    query="expert_token_affinity",
    saved_query="expert_top_tokens",
    values={"min_tokens": MIN_TOKENS},
    by=("run_id", "layer", "expert"),
    draw=_draw,
    order=("token_rank",),
    measures=("lift", "share_of_token", "tokens"),
    sql=f"""
        select *, row_number() over (
            partition by run_id, layer, expert order by lift desc, tokens desc, vocab_id
        ) as token_rank
        from {ANSWER}
        where tokens >= $min_tokens
        qualify token_rank <= {MOST}""",
    empty="No token was routed to this expert often enough, or the run's tokens are unknown.",
)


def top_tokens(
    warehouse: Warehouse, layer: int, expert: int, run: str | None = None, *, measure: str | None = None
) -> PlotlyFigure:
    """Draw the tokens that an expert is chosen for, strongest lift first: `expert_top_tokens`."""
    return PANEL.figure(warehouse, measure, run_id=run, layer=layer, expert=expert)
