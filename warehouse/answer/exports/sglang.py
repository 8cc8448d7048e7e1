"""SGLang's `--init-expert-location`: JSON with `logical_count`, a row for every hidden layer, dense ones zero."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from moewh.warehouse.answer.export import Export, ExportedRun


def _write(run: ExportedRun, path: Path) -> None:
    layers, tokens_LE = run.load()
    whole_LE = np.zeros((run.num_hidden_layers, tokens_LE.shape[1]), np.int64)
    whole_LE[layers] = tokens_LE
    path.write_text(json.dumps({"logical_count": whole_LE.tolist()}) + "\n")


EXPORT = Export(_write, ".json")
