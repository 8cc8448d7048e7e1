"""SGLang's expert distribution recorder in the modes `stat` and `stat_approx`: only counts.

One `.pt` from process 0: `logical_count` [steps, L, E] over all hidden layers; steps of an unfilled buffer are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator

from moewh.ingest.traces.arrays import as_array, load_torch
from moewh.ingest.traces.trace import Counts, Format, TraceFile, TraceModel


def _read(files: list[TraceFile], _: TraceModel) -> Iterator[Counts]:
    for file in files:
        dump = load_torch(file)
        if not isinstance(dump, dict) or "logical_count" not in dump:
            raise file.error("has no logical_count: it is not a stat dump. For per_token, import sglang-recorder.")
        counts_SLE = as_array(dump["logical_count"], f"{file.name}, logical_count", file.most_values, 3)
        if counts_SLE.dtype.kind not in "iu":
            raise file.error(f"its logical_count is {counts_SLE.dtype}, not whole numbers.")
        if (counts_SLE < 0).any():
            raise file.error("its counts are not whole numbers from 0 in every step.")
        used = int(counts_SLE.any((1, 2)).sum())
        yield Counts(file.name, counts_SLE.sum(0, dtype="float64"), file.path.name, {"steps": used})


FORMAT = Format(read_counts=_read)
