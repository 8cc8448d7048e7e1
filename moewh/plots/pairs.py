"""Heat maps of pairs of experts, whose three measures are all derived from counts."""

from __future__ import annotations

import numpy as np

from moewh.plots.drawing import Axis, Figure, Plane, heat_map
from moewh.plots.rows import Rows, matrix

PAIR_MEASURES = ("lift", "conditional", "tokens")
_FORMATS = {"lift": ".4~g", "conditional": ".4~g", "tokens": ",d"}


def pair_map(
    rows: Rows, measure: str, axes: tuple[str, str], shape: tuple[int, int], divisors: tuple[int, int, int]
) -> Figure:
    """Return a heat map of pairs (N_ij). The other measures can be derived from `tokens` and `divisors`::

        N_i = row sum / divisors[0]    N_j = column sum / divisors[1]    N = sum / divisors[2]
        conditional = N_ij / N_i       lift = N_ij N / (N_i N_j)

    A report stores them in this way, with the divisors in `meta`. A pair that shares no token has 0; an expert without
    tokens, and an expert with itself, have NaN.
    """
    values = {name: matrix(rows, *axes, name, shape) for name in PAIR_MEASURES}
    none = ~np.logical_and.outer(values["tokens"].sum(1) > 0, values["tokens"].sum(0) > 0)
    if axes[0] == "expert_a":
        np.fill_diagonal(none, True)
    planes = {name: Plane(name, np.where(none, np.nan, values[name]), _FORMATS[name]) for name in PAIR_MEASURES}
    shown = [planes[name] for name in PAIR_MEASURES if name != measure]
    x, y = Axis(axes[1], range(shape[1])), Axis(axes[0], range(shape[0]))
    meta = {"divisors": list(divisors), "diagonal": axes[0] != "expert_a"}
    drawn = heat_map(x, y, planes[measure], *shown, around_one=measure == "lift", meta=meta)
    drawn["layout"]["height"] = min(max(420, 110 + 12 * shape[0]), 720)
    return drawn
