"""DeepSeek's EPLB: the `weight` of `rebalance_experts`, as `.npy` [MoE layers, experts]."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from moewh.warehouse.answer.export import Export, ExportedRun


def _write(run: ExportedRun, path: Path) -> None:
    _, tokens_LE = run.load()
    with path.open("wb") as file:
        np.save(file, tokens_LE, allow_pickle=False)


EXPORT = Export(_write, ".npy")
