"""TensorRT-LLM's expert statistics: a folder with `meta_info.json` and `rank0.safetensors`.

Keys are `<iteration>_<layer>`; there is one iteration, 0. A safetensors file is the length of a JSON header, the header
and the data (github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

from moewh.warehouse.answer.export import Export, ExportedRun


def _write(run: ExportedRun, path: Path) -> None:
    layers, tokens_LE = run.load()
    experts = tokens_LE.shape[1]
    path.mkdir()
    meta = {"num_experts": experts, "num_experts_per_token": run.top_k}
    (path / "meta_info.json").write_text(json.dumps(meta) + "\n")
    size = experts * tokens_LE.itemsize
    header = {
        f"0_{layer}": {"dtype": "I64", "shape": [experts], "data_offsets": [index * size, (index + 1) * size]}
        for index, layer in enumerate(layers)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (path / "rank0.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tokens_LE.astype("<i8").tobytes())


EXPORT = Export(_write, suffix=None)
