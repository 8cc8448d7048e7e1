"""Figures for notebooks, each from a query: `moewh.plots.co_routing(wh, layer=7)` returns a Plotly figure.

A figure is one file in `figures/` with a function of the same name, found by listing the folder. `tokens` is the token
view. It shares its file's name, so it is imported here: importing the file later would bind that name to the module.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from moewh.plots.tokens import tokens

__all__ = ["FIGURES", "tokens"]

FIGURES = tuple(sorted(path.stem for path in (Path(__file__).parent / "figures").glob("[!_]*.py")))
"""The names of the figures."""


def __getattr__(name: str) -> Any:
    """Load a figure's function from its file."""
    if name in FIGURES:
        return getattr(import_module(f"moewh.plots.figures.{name}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, *FIGURES]
