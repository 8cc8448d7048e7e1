"""Small warehouses made by hand or at random, without a model.

A run is described as what was chosen for each token: `Run` → segments → `Prompt` → `Token` → layer →
(expert, weight) by rank. `write_run` turns that into the files of format 1; tests compute what they expect
from the description, never from the files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.rollups import definition

WORDS = ("the", "quick", " brown", " fox", "", " lead", "|,\"'", "\n", "\\", "naïve", "日本")


@dataclass(frozen=True)
class Token:
    """One token: its entry in the vocabulary, its kind, and what it chose at each layer that has rows for it."""

    vocab_id: int
    choices: dict[int, list[tuple[int, float | None]]]
    """Layer → (expert, weight), rank 0 first."""
    kind: str = "prompt"
    logits: dict[int, list[float]] = field(default_factory=dict)
    """Layer → the router's E raw logits, where they were asked for."""

    @property
    def counted(self) -> bool:
        """True for the kinds that the canned matrices are over."""
        return self.kind in ("prompt", "generated")

    def experts(self, layer: int) -> list[int]:
        """The experts chosen at a layer, rank 0 first; none if the token has no rows there."""
        return [expert for expert, _ in self.choices.get(layer, [])]


@dataclass(frozen=True)
class Prompt:
    """One prompt and its tokens."""

    tokens: list[Token]
    domain: str | None = None


@dataclass(frozen=True)
class Run:
    """One run: its layers as layer → (experts, top-k), and its segments, each a list of prompts."""

    run_id: str
    layers: dict[int, tuple[int, int]]
    segments: list[list[Prompt]]
    fields: dict[str, Any] = field(default_factory=dict)
    """Columns of `runs` to set besides the run's identity."""
    scoring: dict[int, str] = field(default_factory=dict)
    """Layer → the function from logits to weights, where known."""
    selection_bias: dict[int, list[float]] = field(default_factory=dict)
    """Layer → what is added to each expert's score before the choice, where known."""

    def tokens(self) -> Iterator[Token]:
        """Every token of the run in order, specials included."""
        for segment in self.segments:
            for prompt in segment:
                yield from prompt.tokens


def word(vocab_id: int) -> str:
    """The text of a vocabulary entry."""
    return WORDS[vocab_id % len(WORDS)] + ("" if vocab_id < len(WORDS) else str(vocab_id))


def random_run(run_id: str, seed: int, layers: dict[int, tuple[int, int]], prompts: int = 8) -> Run:
    """Random routing in two segments: three domains (one NULL), a special token per prompt, generated tokens,
    one token in eight without rows at some layer, a skewed choice of experts so that some are never chosen.
    """
    rng = np.random.default_rng(seed)
    domains = ("code", None, "prose")
    made = [Prompt(_random_tokens(rng, layers), domains[n % 3]) for n in range(prompts)]
    return Run(run_id, layers, [made[: prompts // 2], made[prompts // 2 :]])


def checkpoint_of(run: Run, run_id: str, train_step: int, seed: int, changed: float) -> Run:
    """The same tokens as in `run` at another training step: a share of the choices is drawn anew."""
    rng = np.random.default_rng(seed)

    def rerouted(token: Token) -> Token:
        return replace(token, choices=_random_choices(rng, run.layers)) if rng.random() < changed else token

    segments = [[replace(p, tokens=[rerouted(t) for t in p.tokens]) for p in prompts] for prompts in run.segments]
    return replace(run, run_id=run_id, segments=segments, fields={**run.fields, "train_step": train_step})


def with_logits(run: Run, seed: int) -> Run:
    """The run with random raw logits for every routed token, its layers softmax and sigmoid in turn."""
    rng = np.random.default_rng(seed)

    def drawn(token: Token) -> Token:
        return replace(
            token, logits={n: rng.normal(size=run.layers[n][0]).astype(np.float32).tolist() for n in token.choices}
        )

    segments = [[replace(p, tokens=[drawn(t) for t in p.tokens]) for p in prompts] for prompts in run.segments]
    known = dict(zip(run.layers, cycle(("softmax", "sigmoid")), strict=False))
    biases = {n: rng.normal(size=run.layers[n][0]).astype(np.float32).tolist() for n in known}
    return replace(run, segments=segments, scoring=known, selection_bias=biases)


def random_warehouse(root: Path) -> tuple[Layout, list[Run]]:
    """Write random runs, one of them called `007`; layers are not consecutive and differ in top-k.

    The last three are checkpoints of one series, the middle one with raw logits. The first three have a geometry.
    """
    layout = Layout(root)
    layout.create()
    runs = [
        random_run("007", 1, {0: (6, 2), 2: (6, 2), 5: (6, 2)}),
        random_run("mixed", 2, {1: (4, 1), 3: (8, 3), 4: (5, 2)}),
        random_run("wide.v-1", 3, {0: (16, 4), 1: (16, 4)}, prompts=5),
    ]
    last = random_run("step-30", 4, {0: (6, 2), 3: (5, 3), 4: (4, 2)}, prompts=32)
    last = replace(last, fields={"series": "trained", "tokens_key": "t", "train_step": 30})
    for seed, run in enumerate(runs):
        write_random_geometry(layout, run, seed)
    runs += [
        checkpoint_of(last, "step-1", 1, 5, changed=0.9),
        with_logits(checkpoint_of(last, "step-20", 20, 6, changed=0.3), 7),
        last,
    ]
    for run in runs:
        write_run(layout, run)
    return layout, runs


def write_run(layout: Layout, run: Run) -> None:
    """Write a run and all its segments."""
    folder = layout.run(run.run_id)
    experts, top_ks = zip(*run.layers.values(), strict=True)
    row = {
        "model": "synthetic",
        "num_moe_layers": len(run.layers),
        "num_experts": max(experts),
        "top_k": max(top_ks),
        "created_at": datetime(2026, 1, 1),
        "segments_planned": len(run.segments),
        **run.fields,
    }
    layers = [
        {"layer": layer, "num_experts": e, "top_k": k, "scoring": run.scoring.get(layer)}
        for layer, (e, k) in run.layers.items()
    ]
    experts_rows = [
        {"layer": layer, "expert": n, "kind": "mlp"}
        | ({"selection_bias": run.selection_bias[layer][n]} if layer in run.selection_bias else {})
        for layer, (e, _) in run.layers.items()
        for n in range(e)
    ]
    write_table(folder, schema.RUNS, [row])
    write_table(folder, schema.LAYERS, layers)
    write_table(folder, schema.EXPERTS, experts_rows)
    prompt_id = 0
    for number, prompts in enumerate(run.segments):
        folder = layout.segment(run.run_id, number)
        write_segment(folder, prompts, prompt_id, layers=run.layers, last=number + 1 == len(run.segments))
        prompt_id += len(prompts)


def write_random_geometry(layout: Layout, run: Run, seed: int) -> None:
    """Write a geometry of random numbers for a run; some are NULL, some pairs are equally alike."""
    rng = np.random.default_rng(seed)
    tables = (schema.EXPERT_GEOMETRY, schema.ROUTER_SIMILARITY, schema.EXPERT_SIMILARITY)
    for table in tables:
        rows = []
        for layer, (experts, _) in run.layers.items():
            places: list[dict[str, Any]] = [{"expert": expert} for expert in range(experts)]
            if table is not schema.EXPERT_GEOMETRY:
                places = [{"expert_a": a, "expert_b": b} for a, b in combinations(range(experts), 2)]
            for place in places:
                numbers = {column.name: round(float(rng.random()), 1) for column in table.columns[2:]}
                nulls = {name: None for name in numbers if rng.random() < 0.05}
                rows.append({**numbers, **nulls, "subspace_rank": 2, **place, "layer": layer})
        names = {column.name for column in table.columns}
        kept = [{name: value for name, value in row.items() if name in names} for row in rows]
        write_table(layout.geometry(run.run_id), table, kept)


def write_segment(folder: Path, prompts: list[Prompt], first_prompt: int, *, layers: Iterable[int], last: bool) -> None:
    """Write one segment; its first prompt's id is `first_prompt`, its run's MoE layers are `layers`."""
    prompt_rows, token_rows, routing_rows, logit_rows = [], [], [], []
    for prompt_id, prompt in enumerate(prompts, first_prompt):
        text = "".join(word(token.vocab_id) for token in prompt.tokens)
        prompt_rows.append(
            {"prompt_id": prompt_id, "domain": prompt.domain, "text": text, "num_tokens": len(prompt.tokens)}
            | {"status": "ok"}
        )
        for position, token in enumerate(prompt.tokens):
            token_id = (prompt_id << schema.POSITION_BITS) + position
            ids = {"token_id": token_id, "prompt_id": prompt_id, "position": position, "context": 0}
            token_rows.append(ids | {"vocab_id": token.vocab_id, "token": word(token.vocab_id), "kind": token.kind})
            routing_rows += [
                {"token_id": token_id, "layer": layer, "rank": rank, "expert": expert, "weight": weight}
                for layer, chosen in token.choices.items()
                for rank, (expert, weight) in enumerate(chosen)
            ]
            logit_rows += [{"token_id": token_id, "layer": layer, "logits": z} for layer, z in token.logits.items()]
    routing_rows.sort(key=lambda row: (row["layer"], row["token_id"], row["rank"]))
    counts = {"prompts": len(prompt_rows), "tokens": len(token_rows), "routing_rows": len(routing_rows)}
    write_table(folder, schema.SEGMENTS, [counts | {"last": last}])
    write_table(folder, schema.PROMPTS, prompt_rows)
    write_table(folder, schema.TOKENS, token_rows)
    write_table(folder, schema.ROUTING, routing_rows)
    if logit_rows:
        write_table(folder, schema.ROUTER_LOGITS, logit_rows)
    write_rollups(folder, layers)


def write_rollups(folder: Path, layers: Iterable[int]) -> None:
    """Write the rollups of the segment in `folder` just as their SQL defines them."""
    with duckdb.connect() as connection:
        for table in (schema.PROMPTS, schema.TOKENS, schema.ROUTING):
            connection.register(f"{table.name}_rows", pq.read_table(folder / table.file, partitioning=None))
            connection.execute(
                f"create view {table.name} as select 'r' as run_id, 0 as segment, * from {table.name}_rows"
            )
        connection.register("layer_rows", pa.table({"layer": pa.array(layers, pa.int32())}))
        connection.execute("create view layers as select 'r' as run_id, layer from layer_rows")
        for table in schema.ROLLUPS:
            columns = ", ".join(column.name for column in table.columns)
            rows = connection.sql(f"select {columns} from ({definition(table)}) order by all")
            pq.write_table(rows.to_arrow_table().cast(table.arrow()), folder / table.file)


def write_table(folder: Path, table: schema.Table, rows: list[dict[str, Any]]) -> None:
    """Write one table's file; columns a row lacks are NULL."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, table.arrow()), folder / table.file)


def _random_tokens(rng: np.random.Generator, layers: dict[int, tuple[int, int]]) -> list[Token]:
    length = int(rng.integers(1, 12))
    kinds = ["special", *["prompt"] * length, *["generated"] * int(rng.integers(0, 4))]
    return [Token(int(rng.integers(0, 12)), _random_choices(rng, layers), kind) for kind in kinds]


def _random_choices(
    rng: np.random.Generator, layers: dict[int, tuple[int, int]]
) -> dict[int, list[tuple[int, float | None]]]:
    choices: dict[int, list[tuple[int, float | None]]] = {}
    for layer, (experts, top_k) in layers.items():
        if rng.random() < 0.125:
            continue
        likelihood_E = np.arange(experts, dtype=np.float64) ** 2
        chosen_K = rng.choice(experts, top_k, replace=False, p=likelihood_E / likelihood_E.sum())
        weights_K = np.sort(rng.random(top_k).astype(np.float32))[::-1]
        choices[layer] = [(int(e), float(w)) for e, w in zip(chosen_K, weights_K, strict=True)]
    return choices
