"""Small warehouses made by hand or at random, without a model.

A run is described as what was chosen for each token: `Run` → segments → `Prompt` → `Token` → layer →
(expert, weight) by rank. `write_run` hands that to the real writer; tests compute what they expect
from the description, never from the files.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import combinations, cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.record import Identity, RunRecord
from moewh.ingest.routing import NO_ENTRY, LayerRouting, RoutingBuffer, TokenisedSegment, VectorBuffer
from moewh.ingest.write import run_files
from moewh.ingest.write import segment as segments
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal

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
    outputs: dict[int, list[tuple[float | None, float | None]]] = field(default_factory=dict)
    """Layer → (norm, cosine) of each choice's output, rank 0 first, where they were asked for."""

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
    ordered: bool = True
    """False where no rank is known: then no weight is, either."""
    selection_bias: dict[int, list[float]] = field(default_factory=dict)
    stacks: dict[int, str] = field(default_factory=dict)
    """Layer → encoder or decoder, where known."""
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
        drawn = rng.random() < changed
        return replace(token, choices=_random_choices(rng, run.layers), outputs={}) if drawn else token

    segments = [[replace(p, tokens=[rerouted(t) for t in p.tokens]) for p in prompts] for prompts in run.segments]
    return replace(run, run_id=run_id, segments=segments, fields={**run.fields, "train_step": train_step})


def without_ranks(run: Run, run_id: str, *, entries: bool = True) -> Run:
    """The run as an engine that returns ids alone tells of it: no ranks, no weights; without `entries`, no text."""

    def told(token: Token) -> Token:
        choices: dict[int, list[tuple[int, float | None]]] = {
            layer: [(expert, None) for expert, _ in pairs] for layer, pairs in token.choices.items()
        }
        return replace(token, choices=choices, vocab_id=token.vocab_id if entries else NO_ENTRY, outputs={})

    segments = [[replace(p, tokens=[told(t) for t in p.tokens]) for p in prompts] for prompts in run.segments]
    return replace(run, run_id=run_id, segments=segments, ordered=False)


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


def with_outputs(run: Run, seed: int) -> Run:
    """The run with random norms and cosines for every choice; one norm in twenty is no finite number."""
    rng = np.random.default_rng(seed)

    def drawn(token: Token) -> Token:
        return replace(token, outputs={n: [_random_output(rng) for _ in pairs] for n, pairs in token.choices.items()})

    segments = [[replace(p, tokens=[drawn(t) for t in p.tokens]) for p in prompts] for prompts in run.segments]
    return replace(run, segments=segments)


def _random_output(rng: np.random.Generator) -> tuple[float | None, float | None]:
    norm, cosine, missing = round(rng.gamma(2) * 64) / 64, round(rng.uniform(-1, 1) * 64) / 64, rng.random()
    return (None, None) if missing < 0.05 else (norm, None if missing < 0.1 else cosine)


def empty_warehouse(root: Path) -> Layout:
    """A warehouse without runs: what `Layout.create` makes, created once per process and copied from then on."""
    shutil.copytree(_empty_warehouse().name, root, dirs_exist_ok=True, symlinks=True)
    return Layout(root)


@cache
def _empty_warehouse() -> TemporaryDirectory[str]:
    folder = TemporaryDirectory()
    Layout(Path(folder.name)).create()
    return folder


def random_warehouse(root: Path) -> tuple[Layout, list[Run]]:
    """Write random runs, one of them called `007`; layers are not consecutive and differ in top-k.

    The last three are checkpoints of one series, the middle one with raw logits. The first three have a geometry. The
    second (sealed) and that middle one (not sealed) have what their experts put out.
    Every other run is sealed.
    Written once per process, and copied from then on.
    """
    folder, runs = _random_warehouse()
    shutil.copytree(folder.name, root, dirs_exist_ok=True, symlinks=True)
    return Layout(root), runs


@cache
def _random_warehouse() -> tuple[TemporaryDirectory[str], list[Run]]:
    folder = TemporaryDirectory()
    layout = Layout(Path(folder.name))
    layout.create()
    runs = [
        random_run("007", 1, {0: (6, 2), 2: (6, 2), 5: (6, 2)}),
        with_outputs(random_run("mixed", 2, {1: (4, 1), 3: (8, 3), 4: (5, 2)}), 8),
        random_run("wide.v-1", 3, {0: (16, 4), 1: (16, 4)}, prompts=5),
    ]
    last = random_run("step-30", 4, {0: (6, 2), 3: (5, 3), 4: (4, 2)}, prompts=32)
    last = replace(last, fields={"series": "trained", "tokens_key": "t", "train_step": 30})
    for seed, run in enumerate(runs):
        write_random_geometry(layout, run, seed)
    runs += [
        checkpoint_of(last, "step-1", 1, 5, changed=0.9),
        with_outputs(with_logits(checkpoint_of(last, "step-20", 20, 6, changed=0.3), 7), 9),
        last,
    ]
    for number, run in enumerate(runs):
        write_run(layout, run)
        if number % 2:  # counts come from segments and from sealed sets
            assert seal(layout, run.run_id)
    return folder, runs


def write_run(layout: Layout, run: Run) -> None:
    """Write a run and all its segments with the real writer, which takes them as plain data."""
    record = record_of(run)
    run_files.write_run(layout, record)
    first_prompt = 0
    for number, prompts in enumerate(run.segments):
        last = number + 1 == len(run.segments)
        write_segment(
            layout, record.identity, number, prompts, first_prompt, layers=run.layers, last=last, ordered=run.ordered
        )
        first_prompt += len(prompts)


def record_of(run: Run) -> RunRecord:
    """What describes a run."""
    experts, top_ks = zip(*run.layers.values(), strict=True)
    facts = {
        "tokens_key": None,
        "model": "synthetic",
        "num_moe_layers": len(run.layers),
        "num_experts": max(experts),
        "top_k": max(top_ks),
        "segments_planned": len(run.segments),
        "origin": "forward",
        **run.fields,
    }
    layers = [
        {
            "layer": layer,
            "num_experts": e,
            "top_k": k,
            "scoring": run.scoring.get(layer),
            "stack": run.stacks.get(layer),
        }
        for layer, (e, k) in run.layers.items()
    ]
    rows = [
        {"layer": layer, "expert": n, "kind": "mlp"}
        | ({"selection_bias": run.selection_bias[layer][n]} if layer in run.selection_bias else {})
        for layer, (e, _) in run.layers.items()
        for n in range(e)
    ]
    return RunRecord(Identity({"synthetic": run.run_id}, run.run_id), facts, layers, rows, vocabulary(run))


def vocabulary(run: Run) -> pa.Array:
    """The text of every vocabulary entry up to the greatest that the run has."""
    entries = 1 + max((token.vocab_id for token in run.tokens()), default=-1)
    return pa.array([word(vocab_id) for vocab_id in range(entries)], pa.string())


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


def write_segment(
    layout: Layout,
    identity: Identity,
    number: int,
    prompts: list[Prompt],
    first_prompt: int,
    *,
    layers: dict[int, tuple[int, int]],
    last: bool,
    ordered: bool = True,
) -> None:
    """Write one segment; its first prompt's id is `first_prompt`, its run's MoE layers are `layers`."""
    tokens = [token for prompt in prompts for token in prompt.tokens]
    segment = tokenised(prompts, first_prompt)
    routing = RoutingBuffer(len(tokens), _vectors(layout, tokens))
    for layer, (_, top_k) in layers.items():
        rows = np.array([place for place, token in enumerate(tokens) if layer in token.choices], np.int64)
        if len(rows):
            chosen = [tokens[place].choices[layer] for place in rows]
            ids = np.array([[expert for expert, _ in pairs] for pairs in chosen], np.int32).reshape(-1, top_k)
            weights = [[weight for _, weight in pairs] for pairs in chosen]
            known = None not in weights[0]
            weights_TK = np.array(weights, np.float32) if known else None
            routing.add(rows, {layer: LayerRouting(ids, weights_TK, ordered)})
    segments.write_segment(layout, identity, number, segment, routing, texts=_texts, last=last)


def tokenised(prompts: list[Prompt], first_prompt: int) -> TokenisedSegment:
    """The tokens of some prompts, each in one context."""
    tokens = [token for prompt in prompts for token in prompt.tokens]
    length_P = np.array([len(prompt.tokens) for prompt in prompts], np.int64)
    nothing = [None] * len(prompts)
    texts = ["".join(word(token.vocab_id) for token in prompt.tokens) for prompt in prompts]
    columns = {"text": texts, "domain": [prompt.domain for prompt in prompts]}
    return TokenisedSegment(
        prompts=pa.table({name: columns.get(name, nothing) for name in CANONICAL.names}, schema=CANONICAL),
        text_P=texts,
        first_prompt=first_prompt,
        status_P=["ok"] * len(prompts),
        num_tokens_P=length_P,
        prompt_T=np.repeat(np.arange(first_prompt, first_prompt + len(prompts)), length_P),
        position_T=np.concatenate([np.arange(length, dtype=np.int32) for length in (*length_P, 0)]),
        context_T=np.zeros(len(tokens), np.int32),
        vocab_id_T=np.array([token.vocab_id for token in tokens], np.int32),
        special_T=np.array([token.kind == "special" for token in tokens], np.bool_),
        generated_T=np.array([token.kind == "generated" for token in tokens], np.bool_),
        start_C=np.cumsum(length_P) - length_P,
        length_C=length_P,
    )


def _texts(vocab_id_T: npt.NDArray[np.int32]) -> pa.Array:
    return pa.array([word(int(vocab_id)) for vocab_id in vocab_id_T], pa.string())


def _vectors(layout: Layout, tokens: list[Token]) -> VectorBuffer | None:
    """The raw logits and the experts' outputs of the tokens that have some; norms and cosines side by side."""
    given: dict[schema.Table, list[dict[int, list[float]]]] = {
        schema.ROUTER_LOGITS: [token.logits for token in tokens],
        schema.EXPERT_OUTPUTS: [
            {layer: [np.nan if n is None else n for n in (*norms, *cosines)] for layer, norms, cosines in _split(token)}
            for token in tokens
        ],
    }
    given = {table: of_T for table, of_T in given.items() if any(of_T)}
    if not given:
        return None
    buffer = VectorBuffer(len(tokens), list(given), layout.staging)
    for table, of_T in given.items():
        for layer in sorted({layer for numbers in of_T for layer in numbers}):
            rows = np.array([place for place, numbers in enumerate(of_T) if layer in numbers], np.int64)
            buffer.add(rows, {(table, layer): np.array([of_T[place][layer] for place in rows], np.float32)})
    return buffer


def _split(token: Token) -> Iterator[tuple[int, tuple[float | None, ...], tuple[float | None, ...]]]:
    for layer, outputs in token.outputs.items():
        norms, cosines = zip(*outputs, strict=True)
        yield layer, norms, cosines


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
