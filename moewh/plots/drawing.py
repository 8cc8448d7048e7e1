"""The look of figures: heat maps, curves, and colours that colour-blind readers can distinguish.

Out: figures in Plotly's JSON form, with numpy arrays for numbers. Users' texts must go through `label`, because Plotly
interprets markup in every text it draws.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from moewh.plots.rows import Rows
from moewh.plots.texts import visible

Figure = dict[str, Any]
"""`data` (traces) and `layout`."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#A65E00", "#2B6F8F", "#222222")
"""Okabe and Ito's colours, with the light ones darkened so that lines are visible on white."""
CHANCE = "#6b6b6b"
_CIVIDIS = (
    "#00224e",
    "#123570",
    "#3b496c",
    "#575d6d",
    "#707173",
    "#8a8678",
    "#a59c74",
    "#c3b369",
    "#e1cc55",
    "#fee838",
)
_VIRIDIS = ("#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58")
"""Viridis without its yellow end."""
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star")
SEQUENTIAL = [[index / 9, colour] for index, colour in enumerate(_CIVIDIS)]
MOST_LIFT = 4
MOST_TICKS = 10
"""Up to this many checkpoints, the axis shows each one's step."""
AROUND_ONE = [[0, "#2166ac"], [0.125, "#92c5de"], [0.25, "#f7f7f7"], [0.5, "#fdb863"], [1, "#7f3b08"]]
"""Blue below a lift of 1, white at 1, brown up to MOST_LIFT and above."""
_GRID = {"gridcolor": "#e2e2e2", "zerolinecolor": "#bdbdbd", "linecolor": "#8a8a8a", "automargin": True}


@dataclass(frozen=True)
class Curve:
    """One line of a figure; those for `chance` are grey and dashed."""

    name: str
    y: npt.NDArray[np.float64]
    chance: bool = False
    shade: float | None = None
    """From 0 to 1, its position among ordered curves, such as those of the layers."""
    x: npt.NDArray[Any] | None = None
    """Its x values, if they differ from the axis's."""


@dataclass(frozen=True)
class Plane:
    """Numbers that a heat map shows on hovering over a cell."""

    name: str
    values: npt.NDArray[Any]
    format: str = ",.4~g"


@dataclass(frozen=True)
class Axis:
    """One axis of a heat map: its title, and the names of its positions."""

    title: str
    labels: Sequence[Any] = field(default=())


def label(text: str | None) -> str:
    """Return a user's text escaped for Plotly: no markup, nothing invisible; None means no domain."""
    if text is None:
        return "(none)"
    return visible(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def layout(x: str, y: str, **more: Any) -> Figure:
    """Return the layout common to all figures, with the titles of the axes."""
    return {
        "font": {"family": "system-ui, sans-serif", "size": 13, "color": "#222222"},
        "paper_bgcolor": "#ffffff",
        "plot_bgcolor": "#ffffff",
        "margin": {"l": 64, "r": 16, "t": 24, "b": 56},
        "hoverlabel": {"namelength": -1},
        "xaxis": {"title": {"text": x}, **_GRID},
        "yaxis": {"title": {"text": y}, **_GRID},
        **more,
    }


def heat_map(
    x: Axis, y: Axis, z: Plane, *more: Plane, around_one: bool = False, meta: dict[str, Any] | None = None
) -> Figure:
    """Return a heat map of z [y, x]; hovering also shows the `more` planes of that shape. NaN is an empty cell."""
    lines = [f"{y.title} %{{y}}, {x.title} %{{x}}", f"{z.name}: %{{z:{z.format}}}"]
    lines += [f"{plane.name}: %{{customdata[{index}]:{plane.format}}}" for index, plane in enumerate(more)]
    trace: Figure = {
        "type": "heatmap",
        "x": [str(label) for label in x.labels],
        "y": [str(label) for label in y.labels],
        "z": z.values,
        "hovertemplate": "<br>".join(lines) + "<extra></extra>",
        "colorbar": {"title": {"text": z.name, "side": "right"}, "thickness": 14},
        "colorscale": AROUND_ONE if around_one else SEQUENTIAL,
        **({"zmin": 0, "zmax": MOST_LIFT} if around_one else {}),
        "meta": {"planes": [z.name, *(plane.name for plane in more)], **(meta or {})},
    }
    if more:
        trace["customdata"] = np.stack([plane.values for plane in more], axis=-1)
    shape = layout(x.title, y.title, height=min(max(300, 110 + 22 * len(y.labels)), 640))
    shape["xaxis"] |= {"type": "category", "showgrid": False}
    shape["yaxis"] |= {"type": "category", "showgrid": False, "autorange": "reversed"}
    return {"data": [trace], "layout": shape}


def curves(x: Axis, y: str, drawn: Sequence[Curve], *, tozero: bool = True) -> Figure:
    """Return curves over the positions of x as categories, because layers need not be consecutive."""
    labels = [str(label) for label in x.labels]
    own, chance = [[curve for curve in drawn if curve.chance is side] for side in (False, True)]
    styles = [(curve, _style(curve, n)) for n, curve in enumerate(own)]
    styles += [(curve, _chance_style(n)) for n, curve in enumerate(chance)]
    data = [
        {"type": "scatter", "mode": "lines+markers", "name": curve.name, "y": curve.y}
        | {"x": labels if curve.x is None else curve.x, **style}
        for curve, style in styles
    ]
    shape = layout(x.title, y, height=380, hovermode="closest", showlegend=len(data) > 1)
    shape["legend"] = {"orientation": "h", "y": -0.25}
    shape["xaxis"] |= {"type": "category"} if x.labels else {}
    shape["yaxis"] |= {"rangemode": "tozero"} if tozero else {}
    return {"data": data, "layout": shape}


def training_curves(rows: Rows, measure: str, chance: str | None = None) -> Figure:
    """Return a curve per layer over the training steps, and one per value of the column `chance`."""
    layers = np.unique(rows["layer"]).tolist()
    steps = rows["train_step"]
    drawn = []
    for index, layer in enumerate(layers):
        at = rows["layer"] == layer
        shade = index / max(len(layers) - 1, 1)
        drawn.append(Curve(f"layer {layer}", rows[measure][at], shade=shade, x=steps[at]))
    ends = np.array([steps.min(), steps.max()])
    for value in np.unique(rows[chance]).tolist() if chance else []:
        drawn.append(Curve(f"{chance} {value:.3g}", np.array([value, value]), chance=True, x=ends))
    figure = curves(Axis("train_step"), measure, drawn)
    if 0 < 10 * ends[0] < ends[1]:
        figure["layout"]["xaxis"]["type"] = "log"
    if len(known := np.unique(steps).tolist()) <= MOST_TICKS:
        figure["layout"]["xaxis"] |= {"tickvals": known, "ticktext": [f"{step:,.0f}" for step in known]}
    return figure


def bars(names: Sequence[str], values: npt.NDArray[np.float64], title: str) -> Figure:
    """Return horizontal bars, the first on top; `names` are labels."""
    # Equal names would share one bar, so positions are numbers, labelled with the names.
    positions = list(range(len(names)))
    trace = {"type": "bar", "orientation": "h", "x": values, "y": positions, "marker": {"color": COLOURS[0]}}
    shape = layout(title, "", height=110 + 26 * len(names), hovermode="closest")
    shape["yaxis"] |= {"tickvals": positions, "ticktext": list(names), "autorange": "reversed"}
    return {"data": [trace], "layout": shape}


def _style(curve: Curve, index: int) -> dict[str, Any]:
    """Return colour, dash and marker: any two curves differ in two of them."""
    if curve.shade is not None:
        colour = _VIRIDIS[round(curve.shade * (len(_VIRIDIS) - 1))]
    else:
        colour = COLOURS[index % len(COLOURS)]
    symbol = _SYMBOLS[index % len(_SYMBOLS)]
    line = {"color": colour, "width": 2, "dash": _DASHES[index // len(_SYMBOLS) % len(_DASHES)]}
    return {"line": line, "marker": {"color": colour, "symbol": symbol, "size": 7}}


def _chance_style(index: int) -> dict[str, Any]:
    dash = ("dash", "dot", "dashdot", "longdash")[index % 4]
    return {"mode": "lines", "line": {"color": CHANCE, "width": 1.5, "dash": dash}}
