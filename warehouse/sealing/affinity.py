"""Merging the counts of tokens by expert, which are nine tenths of all counts, in dense arrays.

Grouping them in SQL takes three times as long. The statistics in the files give the numbers of experts and vocabulary
entries, and the row groups that hold the keys being counted. Each key occurs once per file, so one indexed addition
adds a file to the array.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.warehouse.files import schema

_CELLS = 1 << 25
"""Counts in memory at a time: 256 MB."""
_KEYS = ("layer", "expert", "vocab_id")


@dataclass(frozen=True)
class _RowGroup:
    """The position of some rows of one kind, and the minimum and maximum of each of their keys."""

    file: Path
    number: int
    kind: str
    least: dict[str, int]
    greatest: dict[str, int]


@dataclass(frozen=True)
class _Block:
    """The (layer, expert) pairs in [start, stop), each numbered layer * experts + expert."""

    start: int
    stop: int
    experts: int
    entries: int
    """Vocabulary entries per pair."""

    def holds(self, group: _RowGroup) -> bool:
        """Return whether a row group may have rows of the block."""
        first, last = group.least["layer"], group.greatest["layer"]
        least, greatest = (group.least["expert"], group.greatest["expert"]) if first == last else (0, self.experts - 1)
        return first * self.experts + least < self.stop and last * self.experts + greatest >= self.start


def fits(files: list[Path]) -> bool:
    """Return whether the counts of one expert fit in memory, which is true for every realistic vocabulary."""
    return all(group.greatest["vocab_id"] < _CELLS for file in files for group in _row_groups(file))


def merged_affinity(files: list[Path]) -> Iterator[pa.Table]:
    """Yield the merged rows of `affinity_counts` in key order, grouped by kind and layer."""
    groups = [group for file in files for group in _row_groups(file)]
    if not groups:
        return
    experts, entries = (max(group.greatest[name] for group in groups) + 1 for name in ("expert", "vocab_id"))
    layers = max(group.greatest["layer"] for group in groups) + 1
    at_once = max(1, _CELLS // entries)
    for kind in sorted({group.kind for group in groups}):
        of_kind = [group for group in groups if group.kind == kind]
        for start in range(0, layers * experts, at_once):
            block = _Block(start, min(start + at_once, layers * experts), experts, entries)
            if held := [group for group in of_kind if block.holds(group)]:
                yield from _tables(kind, block, _counted(block, held))


def _row_groups(file: Path) -> Iterator[_RowGroup]:
    metadata = pq.read_metadata(file)
    column_numbers = {metadata.schema.column(number).name: number for number in range(metadata.num_columns)}
    for number in range(metadata.num_row_groups):
        row_group = metadata.row_group(number)
        known = {name: row_group.column(column_numbers[name]).statistics for name in ("kind", *_KEYS)}
        yield _RowGroup(
            file,
            number,
            known["kind"].min,
            {name: known[name].min for name in _KEYS},
            {name: known[name].max for name in _KEYS},
        )


def _counted(block: _Block, groups: list[_RowGroup]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return the counts of a block, one per pair and vocabulary entry."""
    counts = np.zeros((block.stop - block.start) * block.entries, np.int64)
    for file in dict.fromkeys(group.file for group in groups):
        with pq.ParquetFile(file) as opened:
            for group in (group for group in groups if group.file == file):
                rows = opened.read_row_group(group.number, columns=[*_KEYS, "tokens"])
                layer, expert, vocab_id, tokens = (rows[name].to_numpy().astype(np.int64) for name in rows.column_names)
                cell = (layer * block.experts + expert - block.start) * block.entries + vocab_id
                inside = (cell >= 0) & (cell < len(counts))
                if inside.all():
                    counts[cell] += tokens
                else:
                    counts[cell[inside]] += tokens[inside]
    return counts


def _tables(kind: str, block: _Block, counts: np.ndarray[Any, np.dtype[np.int64]]) -> Iterator[pa.Table]:
    """Yield the nonzero counts as rows, layer by layer."""
    wanted = schema.sealed(schema.AFFINITY_COUNTS).arrow()
    for layer in range(block.start // block.experts, (block.stop - 1) // block.experts + 1):
        first = max(layer * block.experts, block.start)
        last = min((layer + 1) * block.experts, block.stop)
        part = counts[(first - block.start) * block.entries : (last - block.start) * block.entries]
        cell = np.flatnonzero(part)
        pair, vocab_id = np.divmod(cell, block.entries)
        columns = [
            pa.repeat(pa.scalar(kind), len(cell)),
            pa.array(np.full(len(cell), layer, np.int32)),
            pa.array((pair + first - layer * block.experts).astype(np.int32)),
            pa.array(vocab_id.astype(np.int32)),
            pa.array(part[cell]),
        ]
        yield pa.table(columns, schema=wanted)
