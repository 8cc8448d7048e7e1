"""Figures for a notebook, each from a query: `moewh.plots.tokens(wh, prompt_id=3, layer=7)`.

A figure's function has the name of its file, so it is imported here and not when it is first used: importing the file
later would bind that name to the file. Libraries that draw are loaded by the functions themselves.
"""

from moewh.plots.tokens import tokens

__all__ = ["tokens"]
