"""Bits a routing row takes on disk, at OLMoE's shape in bf16: moewh's file beside plainer ways to keep it.

    python -m benchmarks.storage [--tokens N]

Routing is simulated: normal logits with a bias per expert, softmax, top-8 of 64, weights rounded to bf16.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ingest.capture import LayerRouting
from ingest.readers import CANONICAL
from ingest.segment import RoutingBuffer, write_segment
from ingest.tokenise import TokenisedSegment, TokenTexts
from tests.models import byte_tokenizer
from warehouse.layout import Layout

LAYERS, EXPERTS, TOP_K = 16, 64, 8
PROMPT_TOKENS = 500


def simulated_routing(tokens: int, seed: int = 0) -> dict[int, LayerRouting]:
    """Return OLMoE-shaped routing of `tokens` tokens for every layer."""
    generator = torch.Generator().manual_seed(seed)
    routing = {}
    for layer in range(LAYERS):
        bias_E = 0.5 * torch.randn(EXPERTS, generator=generator)
        logits_TE = 1.2 * torch.randn(tokens, EXPERTS, generator=generator) + bias_E
        weights_TK, ids_TK = torch.softmax(logits_TE, -1).topk(TOP_K)
        routing[layer] = LayerRouting(ids_TK.int().numpy(), weights_TK.bfloat16().float().numpy())
    return routing


def simulated_segment(tokens: int) -> TokenisedSegment:
    """Return the tokens of prompts of equal length, with random letters."""
    prompts = tokens // PROMPT_TOKENS
    position_T = np.tile(np.arange(PROMPT_TOKENS, dtype=np.int32), prompts)
    texts = ["x" * PROMPT_TOKENS] * prompts
    nothing = pa.nulls(prompts, pa.string())
    return TokenisedSegment(
        prompts=pa.table([pa.array(texts), pa.array(["text"] * prompts), nothing, nothing, nothing], schema=CANONICAL),
        text_P=texts,
        first_prompt=0,
        status_P=["ok"] * prompts,
        num_tokens_P=np.full(prompts, PROMPT_TOKENS, np.int64),
        prompt_T=np.repeat(np.arange(prompts, dtype=np.int64), PROMPT_TOKENS),
        position_T=position_T,
        context_T=np.zeros(tokens, np.int32),
        vocab_id_T=np.random.default_rng(0).integers(1, 257, tokens).astype(np.int32),
        special_T=np.zeros(tokens, np.bool_),
        start_C=np.arange(0, tokens, PROMPT_TOKENS, dtype=np.int64),
        length_C=np.full(prompts, PROMPT_TOKENS, np.int64),
    )


def main() -> None:
    """Write one segment and print bits per row, column by column, beside the alternatives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=50_000, help="tokens to simulate (default: 50000)")
    tokens = parser.parse_args().tokens // PROMPT_TOKENS * PROMPT_TOKENS
    rows = tokens * LAYERS * TOP_K
    with tempfile.TemporaryDirectory() as folder:
        layout = Layout(Path(folder) / "wh")
        layout.create()
        buffer = RoutingBuffer(tokens)
        buffer.add(np.arange(tokens), simulated_routing(tokens))
        target = layout.segment("benchmark", 0)
        began = time.process_time()
        texts = TokenTexts(byte_tokenizer())
        write_segment(layout, target, simulated_segment(tokens), buffer, identity="0" * 64, texts=texts, last=True)
        seconds = time.process_time() - began
        path = target / "routing.parquet"
        plain = Path(folder) / "plain.parquet"
        pq.write_table(pq.read_table(path, partitioning=None), plain)
        sizes = {
            "moewh routing.parquet": path.stat().st_size,
            "pyarrow's default Parquet, same rows": plain.stat().st_size,
            "int32 ids alone, no weights": rows * 4,
            "all router logits in bf16": tokens * LAYERS * EXPERTS * 2,
        }
        print(f"{tokens:,} tokens x {LAYERS} layers x top-{TOP_K} of {EXPERTS} = {rows:,} rows; {platform.processor()}")
        print(f"python {platform.python_version()}, pyarrow {pa.__version__}")
        ours = sizes["moewh routing.parquet"]
        for name, size in sizes.items():
            print(f"{name:<38} {size * 8 / rows:6.2f} bits a row   {size / ours:5.2f} x moewh")
        for name, size in column_bytes(path).items():
            print(f"  {name:<10} {size * 8 / rows:6.3f} bits a row")
        print(f"ranking, writing, hashing and committing: {seconds / tokens * 1e6:.1f} core-microseconds a token")


def column_bytes(path: Path) -> dict[str, int]:
    """Return the compressed bytes of each column of a Parquet file."""
    metadata = pq.read_metadata(path)
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            sizes[column.path_in_schema] = sizes.get(column.path_in_schema, 0) + column.total_compressed_size
    return sizes


if __name__ == "__main__":
    main()
