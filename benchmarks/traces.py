"""The cost of importing a trace compared with writing the same rows, in core-microseconds per token.

    python -m benchmarks.traces

At OLMoE's shape (16 layers, 64 experts, top-8; simulated routing, prompts of 500 tokens; FLAME-MoE's traces have no
prompts, and weights of 16 bits). Both sides count every core
of the process: writing is `write_segment` over arrays that are at hand; importing is the whole command, from hashing
the file and building the model's layers to the last commit, and so writing too.
"""

from __future__ import annotations

import base64
import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.simulated import (
    EXPERTS,
    LAYERS,
    PROMPT_TOKENS,
    TOP_K,
    VOCABULARY,
    Router,
    simulated_run,
    simulated_tokens,
)
from benchmarks.timing import best, machine
from moewh.ingest.routing import LayerRouting, RoutingBuffer
from moewh.ingest.traces.run import ImportOptions, import_trace
from moewh.ingest.write.segment import write_segment
from moewh.warehouse.files.layout import Layout

TOKENS = 100_000
Ids = npt.NDArray[np.int32]
Weights = npt.NDArray[np.float32]


def main() -> None:
    """Measure and print the table."""
    print(f"{machine()}; {TOKENS:,} tokens; core-microseconds per token, best of 3\n")
    print("| trace | bytes per token | import | writing the same rows | ratio |\n|---|---:|---:|---:|---:|")
    segment, router = simulated_tokens(TOKENS, 0, 1, 0), Router(0.5)
    layers = [router(layer, segment.vocab_id_T) for layer in range(LAYERS)]
    ids_TLK = np.stack([layer.expert_ids_TK for layer in layers], axis=1)
    weights_TLK = np.stack([layer.weights_TK for layer in layers if layer.weights_TK is not None], axis=1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_config(folder / "olmoe")
        for name, (form, write, weighted) in TRACES.items():
            path = write(folder, segment.vocab_id_T, ids_TLK, weights_TLK)
            known = weights_TLK if weighted else None
            writing = cost(folder, lambda layout, known=known: write_rows(layout, segment, ids_TLK, known))  # type: ignore[misc]
            options = ImportOptions(form, (str(path),), str(folder / "olmoe"))
            importing = cost(folder, lambda layout, options=options: import_trace(options, layout))  # type: ignore[misc]
            files = [path] if path.is_file() else path.iterdir()
            size = sum(file.stat().st_size for file in files) / TOKENS
            print(f"| {name} | {size:,.0f} | {importing:.1f} | {writing:.1f} | {importing / writing:.2f} |", flush=True)


def cost(folder: Path, work: Callable[[Layout], object]) -> float:
    """Return the core-microseconds per token of work on a new warehouse."""

    def once() -> None:
        with tempfile.TemporaryDirectory(dir=folder) as root:
            layout = Layout(Path(root) / "wh")
            work(layout)

    return best(once, 3).cores / TOKENS * 1e6


def write_rows(layout: Layout, segment: Any, ids_TLK: Ids, weights_TLK: Weights | None) -> None:
    """Write the rows of one segment from arrays."""
    layout.create()
    buffer = RoutingBuffer(TOKENS)
    for layer in range(LAYERS):
        weights_TK = None if weights_TLK is None else weights_TLK[:, layer]
        routing = LayerRouting(ids_TLK[:, layer], weights_TK, ordered=weights_TK is not None)
        buffer.add(np.arange(TOKENS), {layer: routing})
    nothing = lambda ids: pa.nulls(len(ids), pa.string())  # noqa: E731
    write_segment(layout, simulated_run(1).identity, 0, segment, buffer, texts=nothing, last=True)


def write_config(folder: Path) -> None:
    """Write a configuration of OLMoE's shape."""
    folder.mkdir()
    fields = {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        "num_hidden_layers": LAYERS,
        "num_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "vocab_size": VOCABULARY,
    }
    (folder / "config.json").write_text(json.dumps(fields))


def _prompts(tokens: int) -> list[slice]:
    return [slice(start, start + PROMPT_TOKENS) for start in range(0, tokens, PROMPT_TOKENS)]


def _vllm(folder: Path, vocab_id_T: Ids, ids_TLK: Ids, _: Weights) -> Path:
    with (folder / "vllm.jsonl").open("w") as file:
        for part in _prompts(len(ids_TLK)):
            buffer = io.BytesIO()
            np.save(buffer, ids_TLK[part][:-1].astype(np.uint8))
            choice = {
                "prompt_token_ids": vocab_id_T[part][:100].tolist(),
                "token_ids": vocab_id_T[part][100:].tolist(),
                "routed_experts": base64.b64encode(buffer.getvalue()).decode(),
            }
            file.write(json.dumps({"choices": [choice]}) + "\n")
    return folder / "vllm.jsonl"


def _sglang(folder: Path, vocab_id_T: Ids, ids_TLK: Ids, _: Weights) -> Path:
    with (folder / "sglang.jsonl").open("w") as file:
        for part in _prompts(len(ids_TLK)):
            routed = base64.b64encode(ids_TLK[part][:-1].astype("<i4").tobytes()).decode()
            meta = {"prompt_tokens": 100, "completion_tokens": PROMPT_TOKENS - 100, "routed_experts": routed}
            file.write(json.dumps({"output_ids": vocab_id_T[part][100:].tolist(), "meta_info": meta}) + "\n")
    return folder / "sglang.jsonl"


def _megatron(folder: Path, _: Ids, ids_TLK: Ids, __: Weights) -> Path:
    with (folder / "router_trace_rank0.jsonl").open("w") as file:
        for step, part in enumerate(_prompts(len(ids_TLK))):
            for layer in range(LAYERS):
                line = {"step": step, "block": "decoder", "layer": layer, "num_tokens": PROMPT_TOKENS, "topk": TOP_K}
                line |= {"top_indices": np.sort(ids_TLK[part, layer], axis=1).tolist()}
                file.write(json.dumps(line) + "\n")
    return folder / "router_trace_rank0.jsonl"


def _plain(folder: Path, vocab_id_T: Ids, ids_TLK: Ids, weights_TLK: Weights) -> Path:
    def nested(array_TLK: npt.NDArray[Any], kind: pa.DataType) -> pa.Array:
        flat = pa.array(array_TLK.ravel(), kind)
        tokens = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, TOP_K), LAYERS)
        offsets = np.arange(0, len(array_TLK) + 1, PROMPT_TOKENS, dtype=np.int32)
        return pa.ListArray.from_arrays(offsets, tokens)

    offsets = np.arange(0, len(vocab_id_T) + 1, PROMPT_TOKENS, dtype=np.int32)
    columns = {
        "expert_ids": nested(ids_TLK, pa.int16()),
        "weights": nested(weights_TLK, pa.float32()),
        "token_ids": pa.ListArray.from_arrays(offsets, pa.array(vocab_id_T)),
    }
    pq.write_table(pa.table(columns), folder / "plain.parquet")
    return folder / "plain.parquet"


def _flame(folder: Path, vocab_id_T: Ids, ids_TLK: Ids, weights_TLK: Weights) -> Path:
    capture = folder / "iter_1100"
    capture.mkdir()
    pq.write_table(pa.table({"token_id": vocab_id_T}), capture / "000.parquet")
    for layer in range(LAYERS):
        order_TK = np.argsort(-weights_TLK[:, layer], axis=1)
        arrays = {
            "scores": np.take_along_axis(weights_TLK[:, layer], order_TK, 1).astype(np.float16),
            "indices": np.take_along_axis(ids_TLK[:, layer], order_TK, 1).astype(np.int16),
        }
        offsets = np.arange(0, (len(ids_TLK) + 1) * TOP_K, TOP_K, dtype=np.int32)
        columns = {name: pa.ListArray.from_arrays(offsets, array.ravel()) for name, array in arrays.items()}
        pq.write_table(pa.table(columns), capture / f"layer_{layer + 1:02}.parquet")
    return capture


def _plain_lines(folder: Path, vocab_id_T: Ids, ids_TLK: Ids, _: Weights) -> Path:
    with (folder / "plain.jsonl").open("w") as file:
        for part in _prompts(len(ids_TLK)):
            file.write(
                json.dumps({"expert_ids": ids_TLK[part].tolist(), "token_ids": vocab_id_T[part].tolist()}) + "\n"
            )
    return folder / "plain.jsonl"


TRACES: dict[str, tuple[str, Callable[[Path, Ids, Ids, Weights], Path], bool]] = {
    "vllm, JSON lines": ("vllm", _vllm, False),
    "sglang, JSON lines": ("sglang", _sglang, False),
    "plain, Parquet, with weights": ("plain", _plain, True),
    "flame-moe, Parquet, with weights": ("flame-moe", _flame, True),
    "plain, JSON lines": ("plain", _plain_lines, False),
    "megatron, JSON lines": ("megatron", _megatron, False),
}
"""Name → format, writer, and whether the trace has weights."""

if __name__ == "__main__":
    main()
