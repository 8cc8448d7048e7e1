"""The cost of a token besides the forward pass, in core-microseconds: tokenising, rows, rollups, hashing.

    python -m benchmarks.costs

At OLMoE's shape (16 layers, 64 experts, top-8; simulated routing), on one thread at a time; text and tokenizer
are the demo's. On a GPU all of this runs alongside the forward passes, on a CPU in between them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
from transformers import AutoTokenizer

from benchmarks.simulated import LAYERS, SEGMENT_TOKENS, Router, simulated_tokens, vocabulary
from benchmarks.timing import best, machine
from moewh.ingest import demo
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.tokenise import TokenRules, tokenise
from moewh.ingest.routing import RoutingBuffer, TokenTexts
from moewh.ingest.write.rollups import RollupCounter, one_blas_thread
from moewh.ingest.write.segment import write_routing
from moewh.warehouse.files import schema
from moewh.warehouse.files.manifest import file_sha256


def main() -> None:
    """Measure and print the table."""
    print(f"{machine()}; core-microseconds per token, best of 3\n")
    print("| | |\n|---|---:|")
    for name, cost in costs(SEGMENT_TOKENS).items():
        print(f"| {name} | {cost:.1f} |")


def costs(tokens: int, domains: int = 1, token_share: float = 0.5) -> dict[str, float]:
    """Return the core-microseconds per token of each stage, over one segment of `tokens` tokens."""
    segment, router = simulated_tokens(tokens, 0, domains, 0), Router(token_share)
    buffer = RoutingBuffer(tokens)
    for layer in range(LAYERS):
        buffer.add(np.arange(tokens), {layer: router(layer, segment.vocab_id_T)})
    texts = TokenTexts(vocabulary())
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1) as worker, one_blas_thread():
        folder = Path(scratch)
        ranked = list(buffer.layers(worker))

        def rollups() -> None:
            counter = RollupCounter(segment, texts)
            for layer, layer_ranked in ranked:
                counter.add(layer, layer_ranked, worker).result()
            counter.write(folder)

        def rows() -> None:
            write_routing(
                folder / schema.ROUTING.file, segment, buffer, cast(RollupCounter, _Uncounted()), "0123456789ab"
            )

        def cost(stage: Callable[[], object]) -> float:
            return best(stage, 3).cores / tokens * 1e6

        ranking = cost(lambda: list(buffer.layers(worker)))
        return {
            "tokenising": _tokenising(),
            "ranking": ranking,
            "routing rows, written": cost(rows) - ranking,
            "rollups, counted and written": cost(rollups),
            "hashing (sha256)": cost(lambda: [file_sha256(path) for path in folder.iterdir()]),
        }


def _tokenising() -> float:
    """Return the core-microseconds per token of the demo's tokenizer over its own prompts, repeated 20 times."""
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint_path())
    texts = [json.loads(line)["text"] for line in demo.PROMPTS.read_text(encoding="utf-8").splitlines()] * 20
    table = pa.Table.from_pylist([{"text": text, "form": "text"} for text in texts], schema=CANONICAL)
    rules = TokenRules(4_096, "truncate", special_tokens=True)
    tokens = len(tokenise(table, 0, tokenizer, rules).vocab_id_T)
    return best(lambda: tokenise(table, 0, tokenizer, rules), 3).cores / tokens * 1e6


class _Uncounted:
    """Replaces the rollups where only rows are timed."""

    def add(self, *_: object) -> Future[None]:
        """Count nothing."""
        done: Future[None] = Future()
        done.set_result(None)
        return done


if __name__ == "__main__":
    main()
