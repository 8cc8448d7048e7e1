"""Rollups: the segment writer's counts equal the SQL that defines them, and the SQL equals counting by hand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.vocabulary import vocabulary_texts
from moewh.ingest.record import Identity, RunRecord
from moewh.ingest.routing import NO_ROUTE, LayerRouting, RoutingBuffer, TokenisedSegment, TokenTexts
from moewh.ingest.write import run_files
from moewh.ingest.write.segment import write_segment
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing import merge
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.trust import rollups
from moewh.warehouse.trust.rollups import compare
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import QUERIES, staging_read_by
from tests.support.models import byte_tokenizer
from tests.support.synthetic import Run, Token, random_run, random_warehouse, word, write_run

Rows = list[tuple[Any, ...]]
ROLLUPS = [table.name for table in schema.ROLLUPS if not table.opt_in]
"""The rollups of every segment; `tests.ingest.test_expert_outputs` covers the opt-in one."""

# layer → (experts, top-k): dense layers between, different shapes, one expert per token, over 64 experts, a layer so
# wide that pairs are counted one by one instead of by one-hot products, and more experts than tokens could choose.
SHAPES: dict[str, dict[int, tuple[int, int]]] = {
    "plain": {0: (8, 2), 1: (8, 2), 2: (8, 2)},
    "mixed": {1: (4, 1), 3: (96, 3), 4: (300, 2), 9: (8, 8)},
    "one layer": {5: (16, 4)},
    "very many": {0: (8, 2), 1: (9_000, 3), 2: (5_000, 2)},
}


def random_segment(layers: dict[int, tuple[int, int]], seed: int, prompts: int = 30) -> tuple[TokenisedSegment, Any]:
    """Tokens in prompts of up to two contexts with a special token each, and routing with one token in ten dropped."""
    rng = np.random.default_rng(seed)
    length_C = rng.integers(1, 40, 2 * prompts)
    length_P = length_C.reshape(prompts, 2).sum(1)
    start_C = np.cumsum(length_C) - length_C
    tokens = int(length_C.sum())
    special_T = np.zeros(tokens, np.bool_)
    special_T[start_C] = True
    domains = pa.array([["code", None, "prose", "Ünï"][n % 4] for n in range(prompts)], pa.string())
    text = pa.array(["x"] * prompts)
    nothing = pa.nulls(prompts, pa.string())
    columns = {"text": text, "domain": domains}
    segment = TokenisedSegment(
        prompts=pa.table([columns.get(name, nothing) for name in CANONICAL.names], schema=CANONICAL),
        text_P=text,
        first_prompt=7,
        status_P=["ok"] * prompts,
        num_tokens_P=length_P,
        prompt_T=np.repeat(np.arange(7, 7 + prompts), length_P),
        position_T=np.concatenate([np.arange(n, dtype=np.int32) for n in length_P]),
        context_T=np.repeat(np.tile(np.array([0, 1], np.int32), prompts), length_C),
        vocab_id_T=(rng.zipf(1.5, tokens) % 250 + 1).astype(np.int32),
        special_T=special_T,
        start_C=start_C,
        length_C=length_C,
    )
    return segment, {layer: random_routing(rng, tokens, *shape) for layer, shape in layers.items()}


def random_routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> LayerRouting:
    preference_E = rng.normal(size=experts)
    ids_TK = np.argsort(rng.normal(size=(tokens, experts)) + preference_E, axis=1)[:, :top_k].astype(np.int32)
    weights_TK = rng.random((tokens, top_k)).astype(np.float32)
    dropped = rng.random(tokens) < 0.1
    ids_TK[dropped], weights_TK[dropped] = NO_ROUTE, np.nan
    return LayerRouting(ids_TK, weights_TK)


def write_random_run(layout: Layout, layers: dict[int, tuple[int, int]], seed: int) -> Path:
    """Write a run of one segment with the real segment writer; return the segment's folder."""
    layout.create()
    identity = Identity({}, "r")
    described = [{"layer": n, "num_experts": e, "top_k": k} for n, (e, k) in layers.items()]
    texts = vocabulary_texts(byte_tokenizer())
    run_files.write_run(layout, RunRecord(identity, {"segments_planned": 1}, described, [], texts))
    segment, routing = random_segment(layers, seed)
    buffer = RoutingBuffer(len(segment.vocab_id_T))
    buffer.add(np.arange(len(segment.vocab_id_T)), routing)
    write_segment(layout, identity, 0, segment, buffer, texts=TokenTexts(texts), last=True)
    return layout.segment("r", 0)


def defined(folder: Path, name: str, layers: dict[int, tuple[int, int]]) -> Rows:
    """Run a rollup's SQL file over only a segment's own tables."""
    with duckdb.connect() as connection:
        for table in ("prompts", "tokens", "routing"):
            source = f"read_parquet('{folder / table}.parquet', hive_partitioning = false)"
            connection.execute(f"create table {table} as select 'r' as run_id, 0 as segment, * from {source}")
        connection.execute("create table layers (run_id varchar, layer integer, top_k integer)")
        rows = [[layer, top_k] for layer, (_, top_k) in layers.items()]
        connection.executemany("insert into layers values ('r', ?, ?)", rows)
        sql = (QUERIES / "rollups" / f"{name}.sql").read_text()
        for view in staging_read_by(sql):
            connection.execute(view.create)
        return connection.execute(f"select * exclude (run_id, segment) from ({sql}) order by all").fetchall()


@pytest.fixture(scope="module", params=SHAPES)
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A shape and a segment of it."""
    root = tmp_path_factory.mktemp("written") / "wh"
    return request.param, write_random_run(Layout(root), SHAPES[request.param], seed=1)


@pytest.mark.parametrize("name", ROLLUPS)
def test_written_rollup_equals_its_sql(name: str, written: tuple[str, Path]) -> None:
    shape, folder = written
    file = pq.read_table(folder / f"{name}.parquet", partitioning=None)
    stored = [tuple(row.values()) for row in file.to_pylist()]
    expected = defined(folder, name, SHAPES[shape])
    if name == "expert_counts":
        assert [row[-1] for row in stored] == pytest.approx([row[-1] for row in expected], rel=1e-9)
        stored, expected = [row[:-1] for row in stored], [row[:-1] for row in expected]
    assert stored == expected  # in this order too: the file is sorted by all its columns
    assert stored or (name == "transition_counts" and len(SHAPES[shape]) == 1)


def test_random_segment_has_the_awkward_cases(tmp_path: Path) -> None:
    folder = write_random_run(Layout(tmp_path), SHAPES["mixed"], seed=1)
    kinds = pq.read_table(folder / "expert_counts.parquet", partitioning=None)
    assert set(kinds["kind"].to_pylist()) == {"prompt", "special"}
    assert set(kinds["domain"].to_pylist()) == {"Ünï", "code", "prose", None}
    tokens = pq.read_table(folder / "tokens.parquet", partitioning=None)
    routed = pq.read_table(folder / "routing.parquet", partitioning=None)
    per_layer = Counter(routed.filter(pa.compute.equal(routed["rank"], 0))["layer"].to_pylist())
    assert all(0.8 * len(tokens) < count < len(tokens) for count in per_layer.values())


def test_weights_add_up_in_row_order(tmp_path: Path) -> None:
    """Without tolerance: exactly the sum that one thread gets, row by row."""
    folder = write_random_run(Layout(tmp_path), SHAPES["plain"], seed=3)
    with open_warehouse(Layout(tmp_path)) as connection:
        rows = connection.execute("""
            select kind, domain, layer, expert, weight from routes order by layer, token_id, "rank"
        """).fetchall()
    sums: dict[tuple[Any, ...], float] = {}
    for *key, weight in rows:
        sums[tuple(key)] = sums.get(tuple(key), 0.0) + weight
    stored = pq.read_table(folder / "expert_counts.parquet", partitioning=None).to_pylist()
    assert {tuple(row[c] for c in ("kind", "domain", "layer", "expert")): row["weight_sum"] for row in stored} == sums


# ------------------------------------------------------------------------------------------ the SQL, by hand


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    return random_warehouse(tmp_path_factory.mktemp("rollups") / "wh")


def each_token(run: Run) -> Iterator[tuple[int, str | None, Token]]:
    """Every token with its segment and domain."""
    for number, prompts in enumerate(run.segments):
        for prompt in prompts:
            for token in prompt.tokens:
                yield number, prompt.domain, token


def counted(rows: Iterator[tuple[Any, ...]]) -> Rows:
    return [(*key, n) for key, n in Counter(rows).items()]


def brute_expert_counts(run: Run) -> Rows:
    found: dict[tuple[Any, ...], list[Any]] = {}
    for segment, domain, token in each_token(run):
        for layer, chosen in token.choices.items():
            for rank, (expert, weight) in enumerate(chosen):
                entry = found.setdefault((segment, token.kind, domain, layer, expert), [0, 0, 0.0])
                entry[0] += 1
                entry[1] += rank == 0
                entry[2] += weight
    return [(*key, *entry) for key, entry in found.items()]


def brute_pair_counts(run: Run) -> Rows:
    return counted(
        (segment, token.kind, domain, layer, a, b)
        for segment, domain, token in each_token(run)
        for layer in token.choices
        for a, b in combinations(sorted(token.experts(layer)), 2)
    )


def brute_transition_counts(run: Run) -> Rows:
    both: Counter[tuple[Any, ...]] = Counter()
    first: Counter[tuple[Any, ...]] = Counter()
    for segment, domain, token in each_token(run):
        for layer, following in pairwise(sorted(run.layers)):
            here, there = token.experts(layer), token.experts(following)
            key = (segment, token.kind, domain, layer, following)
            both.update((*key, i, j) for i in here for j in there)
            first.update((*key, i, j) for i, j in zip(here[:1], there[:1], strict=False))
    return [(*key, n, first[key]) for key, n in both.items()]


def brute_affinity_counts(run: Run) -> Rows:
    return counted(
        (segment, token.kind, layer, expert, token.vocab_id)
        for segment, _, token in each_token(run)
        for layer in token.choices
        for expert in token.experts(layer)
    )


def brute_vocab_counts(run: Run) -> Rows:
    return counted(
        (segment, token.kind, layer, token.vocab_id, word(token.vocab_id))
        for segment, _, token in each_token(run)
        for layer in token.choices
    )


def brute_repetition_counts(run: Run) -> Rows:
    found: dict[tuple[Any, ...], list[int]] = {}
    for number, prompts in enumerate(run.segments):
        for prompt in prompts:
            for a, b in pairwise(prompt.tokens):
                for layer in a.choices.keys() & b.choices.keys():
                    if a.counted and b.counted:
                        entry = found.setdefault((number, prompt.domain, layer), [0, 0, 0])
                        entry[0] += 1
                        entry[1] += a.experts(layer)[0] == b.experts(layer)[0]
                        entry[2] += bool({*a.experts(layer)} & {*b.experts(layer)})
    return [(*key, *entry) for key, entry in found.items()]


@pytest.mark.parametrize("name", ROLLUPS)
def test_rollup_sql_equals_brute_force(name: str, random: tuple[Layout, list[Run]]) -> None:
    layout, runs = random
    brute = globals()[f"brute_{name}"]
    with open_warehouse(layout) as connection:
        rows = connection.execute((QUERIES / "rollups" / f"{name}.sql").read_text()).fetchall()
    expected = sorted(((run.run_id, *row) for run in runs for row in brute(run)), key=repr)
    got = sorted(rows, key=repr)
    if name == "expert_counts":
        assert [row[-1] for row in got] == pytest.approx([row[-1] for row in expected], rel=1e-12)
        got, expected = [row[:-1] for row in got], [row[:-1] for row in expected]
    assert got == expected


def test_rollup_files_are_the_tables() -> None:
    assert sorted(path.stem for path in (QUERIES / "rollups").glob("*.sql")) == sorted(
        table.name for table in schema.ROLLUPS
    )


@pytest.mark.parametrize("name", ROLLUPS)
def test_rollup_columns_are_those_of_the_table(name: str, random: tuple[Layout, list[Run]]) -> None:
    with open_warehouse(random[0]) as connection:
        sql = (QUERIES / "rollups" / f"{name}.sql").read_text()
        defined_columns = connection.execute(f"describe ({sql})").fetchall()
        stored_columns = connection.execute(f"describe {name}").fetchall()
    assert [row[:2] for row in defined_columns] == [row[:2] for row in stored_columns]


# ------------------------------------------------------------------------------------------ a file that is not there

READERS = {
    "expert_counts": ("expert_load", "load_balance", "domain_specialization", "expert_token_affinity"),
    "pair_counts": ("co_routing",),
    "transition_counts": ("layer_transitions",),
    "affinity_counts": ("expert_token_affinity",),
    "vocab_counts": ("expert_token_affinity",),
    "repetition_counts": (),
}
NARROW = ("", "where layer = 2", "where run_id = '007'", "where run_id = 'no such run'")


@pytest.mark.parametrize("name", ROLLUPS)
def test_segment_that_lacks_a_rollup_is_named(name: str, tmp_path: Path) -> None:
    """No query on any view over it gives a result that leaves the segment out."""
    layout, _ = random_warehouse(tmp_path / "wh")
    folder = layout.segment("007", 1)  # of a run that is not sealed
    (folder / f"{name}.parquet").unlink()
    with open_warehouse(layout) as connection:
        for view in (name, *READERS[name]):
            for narrow in NARROW if view == name else ("",):
                with pytest.raises(duckdb.Error, match=re.escape(f"segment {folder} lacks {name}.parquet")):
                    connection.execute(f"select count(*) from {view} {narrow}").fetchall()
        assert connection.execute("select count(*) > 0 from routes").fetchall() == [(True,)]


# ------------------------------------------------------------------------------------------ the comparison


def test_compare_finds_nothing_in_what_was_written(tmp_path: Path) -> None:
    write_random_run(Layout(tmp_path), SHAPES["mixed"], seed=2)
    with open_engine("duckdb", None, Layout(tmp_path), Limits()) as ask:
        assert list(compare(ask)) == []


@pytest.mark.parametrize("change", ["changed", "missing", "added"])
def test_compare_finds_one_wrong_row_of_each_rollup(change: str, tmp_path: Path) -> None:
    folder = write_random_run(Layout(tmp_path), SHAPES["plain"], seed=2)
    for table in (table for table in schema.ROLLUPS if table.name in ROLLUPS):
        rows = pq.read_table(folder / table.file, partitioning=None).to_pylist()
        if change == "changed":
            rows[3][table.columns[-1].name] += 1
        elif change == "missing":
            del rows[3]
        else:
            rows.append({**rows[3], "layer": 99})
        pq.write_table(pa.Table.from_pylist(rows, table.arrow()), folder / table.file)
    with open_engine("duckdb", None, Layout(tmp_path), Limits()) as ask:
        faults = list(compare(ask))
    assert sorted(fault.table for fault in faults) == sorted(ROLLUPS)
    for fault in faults:
        assert (fault.run_id, fault.segment) == ("r", 0)
        assert {"changed": fault.stored and fault.expected, "missing": fault.expected, "added": fault.stored}[change]
        assert (fault.stored is None, fault.expected is None) == (change == "missing", change == "added")
        assert "layer = " in fault.key


def test_compare_says_the_same_of_runs_together_and_segment_by_segment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of two segments that are counted one by one, and two sealed ones."""
    layout = Layout(tmp_path)
    layout.create()
    for seed, run_id in enumerate("abcd"):
        write_run(layout, random_run(run_id, seed, {0: (4, 2)}))
        assert run_id in "ab" or seal(layout, run_id)
    expected = [("a", 0), ("a", 1), ("b", 0), ("b", 1), ("c", None), ("d", None)]
    for run_id, segment in expected:
        folder = layout.sealed(run_id) if segment is None else layout.segment(run_id, segment)
        rows = pq.read_table(folder / schema.PAIR_COUNTS.file, partitioning=None)
        pq.write_table(rows.slice(2), folder / schema.PAIR_COUNTS.file)
    found = {}
    with open_engine("duckdb", None, layout, Limits()) as ask:
        for at_once, units in ((rollups.ROWS_AT_ONCE, 2), (0, 6)):
            monkeypatch.setattr(rollups, "ROWS_AT_ONCE", at_once)
            assert len(list(rollups._units(rollups._rows(ask, rollups._SEGMENTS)))) == units
            found[units] = list(compare(ask))
    pairs = [fault for fault in found[2] if fault.table == schema.PAIR_COUNTS.name]
    assert [(fault.run_id, fault.segment) for fault in pairs] == [case for case in expected for _ in range(2)]
    totals = {(fault.table, fault.run_id) for fault in found[2] if fault not in pairs}
    assert totals == {(schema.PAIR_TOTALS.name, run_id) for run_id in "cd"}
    assert sorted(found[6], key=repr) == sorted(found[2], key=repr)


def test_a_run_of_one_segment_is_sealed_as_if_it_was_merged(tmp_path: Path) -> None:
    folder = write_random_run(Layout(tmp_path), SHAPES["mixed"], seed=3)
    sealed = Layout(tmp_path).sealed("r")
    assert seal(Layout(tmp_path), "r")
    with duckdb.connect() as connection:
        for table in (table for table in schema.MERGED if not table.opt_in):
            merged = pa.concat_tables(merge._merged(connection, table, [folder / table.file]))
            assert len(merged) > 0
            assert pq.read_table(sealed / table.file, partitioning=None).equals(merged), table.name
