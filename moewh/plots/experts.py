"""Heat maps of layers by experts; each cell shows all known numbers of its expert."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from moewh.plots.drawing import Axis, Figure, Plane, heat_map
from moewh.plots.rows import Rows


def expert_map(rows: Rows, measure: str, formats: Mapping[str, str], *, around_one: bool = False) -> Figure:
    """Return a heat map of one column of `rows`, which have a layer and an expert; `formats` lists the columns shown.

    A cell is NaN where a layer has fewer experts than others, or where the column is NULL.
    """
    layers = np.unique(rows["layer"]).tolist()
    experts = int(rows["expert"].max()) + 1
    cells = np.searchsorted(layers, rows["layer"]), rows["expert"]
    planes = []
    for name in sorted(formats, key=lambda name: name != measure):
        spread_LE = np.full((len(layers), experts), np.nan)
        spread_LE[cells] = rows[name]
        planes.append(Plane(name, spread_LE, formats[name]))
    return heat_map(Axis("expert", range(experts)), Axis("layer", layers), *planes, around_one=around_one)
