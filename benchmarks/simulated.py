"""Warehouses of OLMoE's shape and any size, without running a model.

16 layers, 64 experts, top-8; a vocabulary of 50,000 with Zipf's frequencies; prompts of 500 tokens in a few
domains. A token's router logits are the sum of a bias per expert, a part from its vocabulary entry, and noise;
`token_share` is the entry's share of the variance. Weights are softmax values rounded to bfloat16. The real
segment writer writes the segments.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.record import Identity, RunRecord
from moewh.ingest.routing import LayerRouting, RoutingBuffer, TokenisedSegment, TokenTexts
from moewh.ingest.write.run_files import write_run
from moewh.ingest.write.segment import write_segment
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import add_mark, commit, make_folder
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import write_manifest
from moewh.warehouse.files.tables import write_chunks
from moewh.warehouse.sealing.totals import write_totals

LAYERS, EXPERTS, TOP_K = 16, 64, 8
ROWS_PER_TOKEN = LAYERS * TOP_K
VOCABULARY = 50_000
PROMPT_TOKENS = 500
SEGMENT_TOKENS = 500_000
"""64 million routing rows, the default segment size of `moewh ingest`."""
RUN = "olmoe"
_BLOCK = 20_000
_NOISE = 400_009
"""Rows of noise drawn once; each block reads them from a random offset. A prime, so that blocks do not repeat."""


class Router:
    """Draws routing for tokens of the vocabulary: the same router for every segment."""

    def __init__(self, token_share: float, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._bias_LE = 0.5 * torch.randn(LAYERS, EXPERTS, generator=generator)
        self._entry_VE = 1.2 * token_share**0.5 * torch.randn(VOCABULARY, EXPERTS, generator=generator)
        self._noise_NE = 1.2 * (1 - token_share) ** 0.5 * torch.randn(_NOISE, EXPERTS, generator=generator)
        self._rng = np.random.default_rng(seed)

    def __call__(self, layer: int, vocab_id_T: npt.NDArray[np.int32]) -> LayerRouting:
        """Return one layer's [T, K] experts and weights."""
        blocks = [self._block(layer, block_T) for block_T in torch.from_numpy(vocab_id_T).long().split(_BLOCK)]
        ids, weights = zip(*blocks, strict=True)
        return LayerRouting(torch.cat(ids).numpy(), torch.cat(weights).numpy())

    def _block(self, layer: int, vocab_id_T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start = int(self._rng.integers(_NOISE - len(vocab_id_T)))
        # Each layer sees the vocabulary in a different order, so that layers differ.
        entry_TE = self._entry_VE[(vocab_id_T + 3_001 * layer) % VOCABULARY]
        logits_TE = entry_TE + self._noise_NE[start : start + len(vocab_id_T)] + self._bias_LE[layer]
        weights_TK, ids_TK = torch.softmax(logits_TE, -1).topk(TOP_K)
        return ids_TK.int(), weights_TK.bfloat16().float()


def vocabulary() -> pa.Array:
    """Return the text of every vocabulary entry."""
    return pa.array([f" word{vocab_id:x}" for vocab_id in range(VOCABULARY)])


def zipf_tokens(tokens: int, seed: int) -> npt.NDArray[np.int32]:
    """Draw vocabulary entries with frequencies proportional to 1 / rank."""
    frequency_V = 1 / np.arange(1, VOCABULARY + 1)
    cumulated_V = np.cumsum(frequency_V / frequency_V.sum())
    draws_T = np.random.default_rng(seed).random(tokens)
    return np.minimum(np.searchsorted(cumulated_V, draws_T), VOCABULARY - 1).astype(np.int32)


def simulated_tokens(tokens: int, first_prompt: int, domains: int, seed: int) -> TokenisedSegment:
    """Return the tokens of prompts of equal length with alternating domains; the first token is special."""
    prompts = tokens // PROMPT_TOKENS
    position_T = np.tile(np.arange(PROMPT_TOKENS, dtype=np.int32), prompts)
    text = pa.array(["x" * PROMPT_TOKENS] * prompts)
    named = {"text": text, "domain": pa.array([f"domain {n % domains}" for n in range(prompts)])}
    nothing = pa.nulls(prompts, pa.string())
    return TokenisedSegment(
        prompts=pa.table([named.get(name, nothing) for name in CANONICAL.names], schema=CANONICAL),
        text_P=text,
        first_prompt=first_prompt,
        status_P=["ok"] * prompts,
        num_tokens_P=np.full(prompts, PROMPT_TOKENS, np.int64),
        prompt_T=np.repeat(np.arange(first_prompt, first_prompt + prompts, dtype=np.int64), PROMPT_TOKENS),
        position_T=position_T,
        context_T=np.zeros(tokens, np.int32),
        vocab_id_T=zipf_tokens(tokens, seed),
        special_T=position_T == 0,
        start_C=np.arange(0, tokens, PROMPT_TOKENS, dtype=np.int64),
        length_C=np.full(prompts, PROMPT_TOKENS, np.int64),
    )


def build(
    root: Path,
    tokens: int,
    *,
    domains: int = 1,
    token_share: float = 0.5,
    segment_tokens: int = SEGMENT_TOKENS,
    progress: Callable[[str], None] = print,
) -> Layout:
    """Write a warehouse of one run with this many tokens, or complete an existing one."""
    layout = Layout(root)
    layout.create()
    router, texts = Router(token_share), TokenTexts(vocabulary())
    planned = max(1, tokens // segment_tokens)
    record = simulated_run(planned)
    write_run(layout, record)
    for number in range(planned):
        if layout.segment(RUN, number).is_dir():
            continue
        share = min(tokens, segment_tokens)
        segment = simulated_tokens(share, number * share // PROMPT_TOKENS, domains, seed=number)
        buffer = RoutingBuffer(share)
        for layer in range(LAYERS):
            buffer.add(np.arange(share), {layer: router(layer, segment.vocab_id_T)})
        write_segment(layout, record.identity, number, segment, buffer, texts=texts, last=number == planned - 1)
        progress(f"segment {number + 1} of {planned} written")
    return layout


def simulated_run(segments: int, run_id: str = RUN, **more: Any) -> RunRecord:
    """Return the record of a run with `segments` segments; `more` are other columns of `runs`."""
    shape = {"num_experts": EXPERTS, "top_k": TOP_K}
    facts = {"model": "simulated", "origin": "forward", "num_moe_layers": LAYERS, **shape, **more}
    layers = [{"layer": layer, **shape} for layer in range(LAYERS)]
    experts = [
        {"layer": layer, "expert": expert, "kind": "mlp"} for layer in range(LAYERS) for expert in range(EXPERTS)
    ]
    return RunRecord(Identity({}, run_id), {**facts, "segments_planned": segments}, layers, experts, vocabulary())


def repeat(source: Layout, root: Path, segments: int, runs: Sequence[str] = (RUN,)) -> Layout:
    """Make a warehouse of runs whose segments are repeated hard links to those of another warehouse's run."""
    layout = Layout(root)
    layout.create()
    there = len(list(source.segments(RUN).iterdir()))
    for run_id in runs:
        write_run(layout, simulated_run(segments, run_id))
        for number in range(segments):
            target = layout.segment(run_id, number)
            if target.is_dir():
                continue
            make_folder(target)
            for file in source.segment(RUN, number % there).iterdir():
                os.link(file, target / file.name)
    return layout


def seal_repeated(layout: Layout, source: Layout, times: int, run_id: str = RUN) -> None:
    """Seal a run that repeats the sealed run of `source`, by multiplying the counts of `source` with `times`.

    This equals what sealing writes, without adding up the same counts repeatedly.
    """
    if layout.sealed(run_id).is_dir():
        return
    with layout.staged(f"sealed.{run_id}") as folder:
        for table in (table for table in schema.MERGED if not table.opt_in):
            stored = schema.sealed(table)
            rows = pq.read_table(source.sealed(RUN) / stored.file, partitioning=None)
            write_chunks(folder / stored.file, stored, _by_kind(_repeated(table, rows, times).cast(stored.arrow())))
        write_totals(folder, layout.run(run_id) / schema.LAYERS.file)
        write_manifest(folder, None, None)
        add_mark(folder)
        commit(folder, layout.sealed(run_id))
    layout.unlink_unsealed(run_id)


def seal_linked(layout: Layout, like: str, run_id: str) -> None:
    """Seal a run that has the same segments as the run `like`, with hard links to that run's sealed files."""
    if layout.sealed(run_id).is_dir():
        return
    with layout.staged(f"sealed.{run_id}") as folder:
        for file in layout.sealed(like).iterdir():
            os.link(file, folder / file.name)
        commit(folder, layout.sealed(run_id))
    layout.unlink_unsealed(run_id)


def _repeated(table: schema.Table, rows: pa.Table, times: int) -> pa.Table:
    if table is schema.SEGMENTS:
        number = pa.array(np.arange(len(rows) * times, dtype=np.int32))
        return pa.concat_tables([rows] * times).set_column(0, "segment", number)
    for name, type_ in schema.split_columns(table)[1].items():
        if type_ != "VARCHAR":
            index = rows.column_names.index(name)
            rows = rows.set_column(index, name, pc.multiply(rows[name], times))
    return rows


def _by_kind(rows: pa.Table) -> list[pa.Table]:
    if "kind" not in rows.column_names:
        return [rows]
    return [rows.filter(pc.field("kind") == kind) for kind in sorted(rows["kind"].unique().to_pylist())]
