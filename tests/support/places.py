"""The tokens of a run with their positions, and the comparison of a query's rows with the expected ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from moewh.warehouse.files import schema
from tests.support.synthetic import Run, Token

Rows = list[tuple[Any, ...]]


@dataclass(frozen=True)
class Place:
    """A token, and where it is in the run."""

    token_id: int
    prompt_id: int
    position: int
    domain: str | None
    token: Token


def places(run: Run) -> Iterator[Place]:
    """Yield every token of a run that the matrices count."""
    prompts = [prompt for segment in run.segments for prompt in segment]
    for prompt_id, prompt in enumerate(prompts):
        for position, token in enumerate(prompt.tokens):
            if token.counted:
                token_id = (prompt_id << schema.POSITION_BITS) + position
                yield Place(token_id, prompt_id, position, prompt.domain, token)


def routed(run: Run, layer: int) -> list[Place]:
    """Return those of `places` that have rows at a layer."""
    return [place for place in places(run) if place.token.experts(layer)]


def assert_rows(got: Rows, expected: Rows) -> None:
    """Assert the same rows in the same order; floats to 1e-12."""
    assert len(got) == len(expected), (got[:5], expected[:5])
    for row, wanted in zip(got, expected, strict=True):
        assert len(row) == len(wanted)
        for value, target in zip(row, wanted, strict=True):
            near = isinstance(target, float) and math.isfinite(target)
            assert value == (pytest.approx(target, rel=1e-12, abs=1e-14) if near else target), (row, wanted)


def assert_rows_in_any_order(got: Rows, expected: Rows, tolerance: float = 1e-9) -> None:
    """Assert the same rows in any order, matched by all columns but floats; floats to `tolerance`."""

    def key(row: tuple[Any, ...]) -> str:
        return repr([value for value in row if not isinstance(value, float)])

    assert len(got) == len(expected), (got[:5], expected[:5])
    for row, wanted in zip(sorted(got, key=key), sorted(expected, key=key), strict=True):
        assert len(row) == len(wanted)
        for value, target in zip(row, wanted, strict=True):
            near = isinstance(target, float)
            assert value == (pytest.approx(target, rel=tolerance, abs=1e-12) if near else target), (row, wanted)
