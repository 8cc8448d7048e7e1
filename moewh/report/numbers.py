"""Figures as JSON for a page: arrays of numbers become base64 of the narrowest type that holds them."""

from __future__ import annotations

import base64
import math
from typing import Any

import numpy as np
import numpy.typing as npt

_INTEGERS = ("u1", "u2", "u4")
_EXACT = 1 << 24
"""Integers below this are exact in a 32-bit float."""


def encoded(value: Any) -> Any:
    """Return a value without arrays: matrices become base64, others lists. NaN is null in a list."""
    if isinstance(value, dict):
        return {name: encoded(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [encoded(item) for item in value]
    if isinstance(value, np.ndarray):
        return packed(value) if value.ndim == 2 else [encoded(item) for item in value.tolist()]
    if isinstance(value, float):
        return float(f"{value:.8g}") if math.isfinite(value) else None
    return value


def packed(values: npt.NDArray[Any]) -> dict[str, str]:
    """Return an array in Plotly's typed-array form: dtype, bdata and, for a matrix, shape."""
    array = np.ascontiguousarray(values, dtype=f"<{_narrowest(values)}")
    made = {"dtype": array.dtype.str[1:], "bdata": base64.b64encode(array.tobytes()).decode()}
    return made | ({"shape": ", ".join(map(str, array.shape))} if array.ndim > 1 else {})


def _narrowest(values: npt.NDArray[Any]) -> str:
    """Return the narrowest type: exact for integers, 32-bit for other numbers."""
    if not values.size or np.isnan(values).all():
        return "f4"
    most, least = np.nanmax(values), np.nanmin(values)
    whole = np.issubdtype(values.dtype, np.integer) or not np.any(np.nan_to_num(values) % 1)
    if not whole or np.isnan(most):
        return "f4"
    if np.isnan(values).any() or least < 0:
        return "f4" if max(most, -least) < _EXACT else "f8"
    return next((kind for kind in _INTEGERS if most <= np.iinfo(kind).max), "f8")
