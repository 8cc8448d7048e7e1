"""The totals of a sealed run: its merged counts over all kinds but special and all domains, one layer at a time.

The staging views in `queries/staging/` define the same rows in SQL; `moewh check` and `moewh verify --rollups` compare
the two. Shapes: A, B experts of a layer and of the same or the next one; K experts per token (top-k); N rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moewh.warehouse.files import schema
from moewh.warehouse.files.tables import read_rows, write_chunks

Numbers = np.ndarray[Any, np.dtype[Any]]
_CELLS = 2**24
"""Most cells of a matrix of experts: 128 MiB. Some families have tens of thousands of experts in a layer."""


class _Step(NamedTuple):
    """An MoE layer and the next one (see `queries/staging/layer_steps.sql`)."""

    layer: int
    top_k: int
    next_layer: int | None
    """None for the last layer, which has no transitions."""
    next_top_k: int


class _Counts:
    """The rows of some merged counts, without special tokens, by layer."""

    def __init__(self, file: Path) -> None:
        rows = read_rows(file)
        rows = rows.filter(pc.not_equal(rows["kind"], "special"))
        layer = rows["layer"].to_numpy()
        order = np.argsort(layer, kind="stable")
        self._layer = layer[order]
        numbers = [name for name in rows.column_names if pa.types.is_integer(rows.schema.field(name).type)]
        self._columns = {name: pc.fill_null(rows[name], 0).to_numpy()[order] for name in numbers}

    def of(self, layer: int, *names: str) -> list[Numbers]:
        """Return columns of a layer's rows, each [N]; NULL counts as 0."""
        start, stop = np.searchsorted(self._layer, np.array([layer, layer + 1], np.int32))
        return [self._columns[name][start:stop] for name in names]


def write_totals(folder: Path, layers: Path) -> None:
    """Write the totals of the merged counts in `folder` beside them; `layers` is the run's file of that table."""
    steps = _steps(layers)
    pairs, experts, transitions = (
        _Counts(folder / table.file) for table in (schema.PAIR_COUNTS, schema.EXPERT_COUNTS, schema.TRANSITION_COUNTS)
    )
    written = {
        schema.PAIR_TOTALS: _pair_totals(steps, pairs, experts),
        schema.TRANSITION_TOTALS: _transition_totals(steps, transitions),
        schema.FIRST_CHOICE_TOTALS: _first_choice_totals(steps, transitions),
    }
    for table, rows in written.items():
        write_chunks(folder / table.file, table, (part.cast(table.arrow()) for part in rows))


def _steps(layers: Path) -> list[_Step]:
    """Return a run's MoE layers in order."""
    rows = read_rows(layers, ["layer", "top_k"]).sort_by("layer").to_pylist()
    following = [*((row["layer"], row["top_k"]) for row in rows[1:]), (None, 0)]
    return [_Step(row["layer"], row["top_k"], *after) for row, after in zip(rows, following, strict=True)]


def _pair_totals(steps: list[_Step], pairs: _Counts, experts: _Counts) -> Iterator[pa.Table]:
    """Yield the rows of `pair_totals`, layer by layer."""
    for step in steps:
        a, b, tokens = pairs.of(step.layer, "expert_a", "expert_b", "tokens")
        a, b, tokens = _summed(np.r_[a, b], np.r_[b, a], np.r_[tokens, tokens])
        expert, routed = experts.of(step.layer, "expert", "tokens")
        tokens_A = np.bincount(expert, routed)
        yield pa.table(
            {
                "layer": np.full(len(a), step.layer),
                "expert_a": a,
                "expert_b": b,
                "tokens": tokens,
                "tokens_a": tokens_A[a],
                "tokens_b": tokens_A[b],
                "tokens_all": np.full(len(a), tokens_A.sum() / max(step.top_k, 1)),
            }
        )


def _transition_totals(steps: list[_Step], transitions: _Counts) -> Iterator[pa.Table]:
    """Yield the rows of `transition_totals`: a token of an expert has K pairs with the experts of the other layer."""
    for step in steps:
        yield _transitions(step, transitions, "tokens", step.top_k, step.next_top_k)


def _first_choice_totals(steps: list[_Step], transitions: _Counts) -> Iterator[pa.Table]:
    """Yield the rows of `first_choice_totals`: a token has one pair."""
    for step in steps:
        yield _transitions(step, transitions, "first_choice_tokens", 1, 1)


def _transitions(step: _Step, transitions: _Counts, counted: str, top_k: int, next_top_k: int) -> pa.Table:
    a, b, tokens = _summed(*transitions.of(step.layer, "expert", "next_expert", counted))
    return pa.table(
        {
            "layer": np.full(len(a), step.layer),
            "next_layer": pa.array([step.next_layer] * len(a), pa.int32()),
            "expert": a,
            "next_expert": b,
            "tokens": tokens,
            "tokens_here": np.bincount(a, tokens)[a] / max(next_top_k, 1),
            "tokens_there": np.bincount(b, tokens)[b] / max(top_k, 1),
            "tokens_all": np.full(len(a), tokens.sum() / max(top_k * next_top_k, 1)),
        }
    )


def _summed(a: Numbers, b: Numbers, tokens: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Return the pairs of experts in [N] rows, in order, with the sum of their tokens, which is never 0."""
    A, B = int(a.max(initial=-1)) + 1, int(b.max(initial=-1)) + 1
    if A * B > _CELLS:
        sums = pa.table({"a": a, "b": b, "tokens": tokens}).group_by(["a", "b"]).aggregate([("tokens", "sum")])
        sums = sums.filter(pc.not_equal(sums["tokens_sum"], 0)).sort_by([("a", "ascending"), ("b", "ascending")])
        return sums["a"].to_numpy(), sums["b"].to_numpy(), sums["tokens_sum"].to_numpy()
    sums_AB = np.zeros((A, B), np.int64)
    np.add.at(sums_AB, (a, b), tokens)
    a, b = np.nonzero(sums_AB)
    return a, b, sums_AB[a, b]
