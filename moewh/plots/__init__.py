"""Figures for a notebook, each from a query: `moewh.plots.co_routing(wh, layer=7)` returns a Plotly figure.

A figure is one file of `figures/`, with a function of the same name, found by listing the folder.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

FIGURES = tuple(sorted(path.stem for path in (Path(__file__).parent / "figures").glob("[!_]*.py")))


def __getattr__(name: str) -> Any:
    """Load a figure's function from its file."""
    if name in FIGURES:
        return getattr(import_module(f"moewh.plots.figures.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *FIGURES]
