"""Read nested lists of numbers in JSON text directly as arrays.

A JSON parser makes a Python object of every number, which costs more than the rest of an import. So lists in fields
that hold only numbers are first taken out of the text: their brackets and commas give the shape, and must be those of
lists of equal lengths; the numbers between are read in one pass. Anything else is left to the parser.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Sequence

import numpy as np

from moewh.ingest.traces.trace import Array

_OF_NUMBERS = b"0123456789-+.eE \t\r\n"
_ENDS = (np.iinfo(np.int64).min, np.iinfo(np.int64).max)
"""What numpy reads for integers beyond 64 bits."""


def take_arrays(text: bytes, names: Sequence[str]) -> tuple[bytes, dict[str, Array]]:
    """Return the text of a JSON object with null for each named field that is an array, and the arrays by name.

    The caller must check that null is at the field itself, because the text may quote the field somewhere else.
    """
    arrays = {}
    for name in names:
        key = b'"%s"' % name.encode()
        found = re.search(re.escape(key) + rb"\s*:\s*(\[[\[\s]*)", text)
        if found is None or text.count(key) != 1:
            continue
        start, depth = found.start(1), found[1].count(b"[")
        end = text.find(b"]" * depth, start)
        if end >= 0 and (array := _array(text[start : end + depth], depth)) is not None:
            arrays[name] = array
            text = text[:start] + b"null" + text[end + depth :]
    return text, arrays


def _array(text: bytes, depth: int) -> Array | None:
    """Return nested lists of numbers as an array; None for anything else, or lists of different lengths."""
    shape = _shape(text.translate(None, _OF_NUMBERS), depth)
    compact = text.translate(None, b" \t\r\n")
    if shape is None or any(gap in compact for gap in (b",,", b"[,", b",]", b"[]")):
        return None
    kind = np.float64 if any(mark in text for mark in (b".", b"e", b"E")) else np.int64
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DeprecationWarning)  # numpy before 2.4 only warns of a partly read text
            values = np.fromstring(text.translate(None, b"[]"), kind, sep=",")
    except (ValueError, DeprecationWarning):
        return None
    if len(values) != math.prod(shape) or (kind is np.int64 and bool(np.isin(values, _ENDS).any())):
        return None
    return values.reshape(shape)


def _shape(skeleton: bytes, depth: int) -> tuple[int, ...] | None:
    """Return the shape of nested lists of equal lengths, from their brackets and commas; None for anything else."""
    first = skeleton[depth - 1 : skeleton.index(b"]") + 1]
    pattern, shape = first, [first.count(b",") + 1]
    for level in range(1, depth):
        part = skeleton[depth - 1 - level : skeleton.index(b"]" * (level + 1)) + level + 1]
        count, rest = divmod(len(part) - 1, len(pattern) + 1)
        pattern = b"[" + b",".join([pattern] * count) + b"]"
        if rest or pattern != part:
            return None
        shape.insert(0, count)
    return tuple(shape) if pattern == skeleton else None
