"""Every view: documented, right on three tokens by hand, and equal to a plain computation on random routing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.synthetic import Prompt, Run, Token, random_warehouse, word, write_run
from warehouse import schema
from warehouse.catalog import describe_views
from warehouse.layout import Layout
from warehouse.views import QUERIES, canned_names, open_warehouse, view_names

Rows = list[tuple[Any, ...]]
CANNED = [path.stem for path in sorted((QUERIES / "views").glob("*.sql"))]


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    return random_warehouse(tmp_path_factory.mktemp("random") / "wh")


def rows_of(layout: Layout, view: str) -> Rows:
    with open_warehouse(layout) as connection:
        return connection.execute(f"from {view}").fetchall()


# ------------------------------------------------------------------------------------------ documentation


@pytest.mark.parametrize("name", [*(table.name for table in schema.TABLES), *CANNED])
def test_view_documented(name: str) -> None:
    view = describe_views()[name]
    assert view.comment
    assert all(column.comment for column in view.columns), view.columns
    assert view.columns[0].name == "run_id"


@pytest.mark.parametrize("name", CANNED)
def test_view_file_names_itself(name: str) -> None:
    text = (QUERIES / "views" / f"{name}.sql").read_text(encoding="utf-8")
    assert text.startswith(f"-- {name}: ")
    assert f"create or replace view {name} as\n" in text
    assert "-- One row per " in text
    assert describe_views()[name].header.count("\n") >= 2


@pytest.mark.parametrize("name", view_names())
def test_view_empty_warehouse_answers(name: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    assert rows_of(layout, name) == []


@pytest.mark.parametrize("name", view_names())
def test_view_types_are_those_described(name: str, random: tuple[Layout, list[Run]]) -> None:
    with open_warehouse(random[0]) as connection:
        described = connection.execute(f"describe {name}").fetchall()
    assert [(row[0], row[1]) for row in described] == [
        (column.name, column.type) for column in describe_views()[name].columns
    ]


# ------------------------------------------------------------------------------------------ three tokens by hand

# Layer 1 has 3 experts, top-2; layer 4 has 2 experts, top-1. The special token and the missing rows must not count.
BY_HAND = Run(
    "hand",
    {1: (4, 2), 4: (2, 1)},
    [
        [
            Prompt(
                [
                    Token(9, {1: [(0, 0.5), (3, 0.5)], 4: [(0, 1.0)]}, kind="special"),
                    Token(5, {1: [(0, 0.75), (1, 0.25)], 4: [(1, 1.0)]}),
                    Token(5, {1: [(1, 0.5), (2, 0.25)]}),
                ],
                domain="code",
            )
        ],
        [Prompt([Token(6, {1: [(0, 0.5), (2, 0.25)], 4: [(0, 0.5)]}, kind="generated")])],
    ],
)

SECOND = 1 << schema.POSITION_BITS

HAND_ROWS: dict[str, Rows] = {
    # N = 3; N_0 = N_1 = N_2 = 2; each pair shares one token: 1/2, 1/3, 1*3/4. Layer 4 is top-1: no pairs.
    "co_routing": [("hand", 1, a, b, 1, 1 / 2, 1 / 3, 3 / 4) for a in range(3) for b in range(3) if a != b],
    "expert_token_affinity": [
        ("hand", 1, 0, 5, word(5), 1, 1 / 2, 1 / 2, 3 / 4),
        ("hand", 1, 0, 6, word(6), 1, 1.0, 1 / 2, 3 / 2),
        ("hand", 1, 1, 5, word(5), 2, 1.0, 1.0, 3 / 2),
        ("hand", 1, 2, 5, word(5), 1, 1 / 2, 1 / 2, 3 / 4),
        ("hand", 1, 2, 6, word(6), 1, 1.0, 1 / 2, 3 / 2),
        ("hand", 4, 0, 6, word(6), 1, 1.0, 1.0, 2.0),
        ("hand", 4, 1, 5, word(5), 1, 1.0, 1.0, 2.0),
    ],
    # Two tokens are routed at both layers: {0, 1} → 1 and {0, 2} → 0, so N = 2, N_0 = 2, N_1 = N_2 = 1.
    "layer_transitions": [
        ("hand", 1, 4, 0, 0, 1, 1 / 2, 1.0),
        ("hand", 1, 4, 0, 1, 1, 1 / 2, 1.0),
        ("hand", 1, 4, 1, 1, 1, 1.0, 2.0),
        ("hand", 1, 4, 2, 0, 1, 1.0, 2.0),
    ],
    "expert_load": [
        ("hand", 1, 0, 2, 1 / 3, 2, 1.25, 0.625),
        ("hand", 1, 1, 2, 1 / 3, 1, 0.75, 0.375),
        ("hand", 1, 2, 2, 1 / 3, 0, 0.5, 0.25),
        ("hand", 1, 3, 0, 0.0, 0, 0.0, None),
        ("hand", 4, 0, 1, 1 / 2, 1, 0.5, 0.5),
        ("hand", 4, 1, 1, 1 / 2, 1, 1.0, 1.0),
    ],
    # Layer 1: 2, 2, 2 and 0 tokens of 6; layer 4: 1 and 1.
    "load_balance": [
        ("hand", 1, math.log2(3), math.log2(3) / 2, math.sqrt(3 / 4) / 1.5, 1 / 4, 4 / 3, 1),
        ("hand", 4, 1.0, 1.0, 0.0, 0.0, 1.0, 0),
    ],
    # Layer 1: code has 2 of the 3 tokens, {0, 1} and {1, 2}; no domain has {0, 2}. Layer 4: one token each.
    "domain_specialization": [
        ("hand", "code", 1, 0, 1, 1 / 2, 2 / 3, 3 / 4),
        ("hand", "code", 1, 1, 2, 1.0, 2 / 3, 3 / 2),
        ("hand", "code", 1, 2, 1, 1 / 2, 2 / 3, 3 / 4),
        ("hand", "code", 1, 3, 0, 0.0, 0.0, None),
        ("hand", "code", 4, 0, 0, 0.0, 1 / 2, 0.0),
        ("hand", "code", 4, 1, 1, 1.0, 1 / 2, 2.0),
        ("hand", None, 1, 0, 1, 1.0, 2 / 3, 3 / 2),
        ("hand", None, 1, 1, 0, 0.0, 2 / 3, 0.0),
        ("hand", None, 1, 2, 1, 1.0, 2 / 3, 3 / 2),
        ("hand", None, 1, 3, 0, 0.0, 0.0, None),
        ("hand", None, 4, 0, 1, 1.0, 1 / 2, 2.0),
        ("hand", None, 4, 1, 0, 0.0, 1 / 2, 0.0),
    ],
    "routes": [
        ("hand", 0, 0, 1, 0, 0, 0.5, word(9), "special", 0, 0, "code"),
        ("hand", 0, 0, 1, 1, 3, 0.5, word(9), "special", 0, 0, "code"),
        ("hand", 0, 0, 4, 0, 0, 1.0, word(9), "special", 0, 0, "code"),
        ("hand", 0, 1, 1, 0, 0, 0.75, word(5), "prompt", 1, 0, "code"),
        ("hand", 0, 1, 1, 1, 1, 0.25, word(5), "prompt", 1, 0, "code"),
        ("hand", 0, 1, 4, 0, 1, 1.0, word(5), "prompt", 1, 0, "code"),
        ("hand", 0, 2, 1, 0, 1, 0.5, word(5), "prompt", 2, 0, "code"),
        ("hand", 0, 2, 1, 1, 2, 0.25, word(5), "prompt", 2, 0, "code"),
        ("hand", 1, SECOND, 1, 0, 0, 0.5, word(6), "generated", 0, 1, None),
        ("hand", 1, SECOND, 1, 1, 2, 0.25, word(6), "generated", 0, 1, None),
        ("hand", 1, SECOND, 4, 0, 0, 0.5, word(6), "generated", 0, 1, None),
    ],
}


@pytest.mark.parametrize("name", CANNED)
def test_view_three_tokens_exact_rows(name: str, tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, BY_HAND)
    assert_same_rows(name, rows_of(layout, name), HAND_ROWS[name])


def test_runs_counts_what_is_committed(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, BY_HAND)
    write_run(layout, Run("half", {0: (2, 1)}, [[Prompt([Token(1, {})])]], {"segments_planned": 2}))
    write_run(layout, Run("none", {0: (2, 1)}, [], {"segments_planned": 2}))
    with open_warehouse(layout) as connection:
        rows = connection.execute(
            "select run_id, status, segments, prompts, tokens from runs order by run_id"
        ).fetchall()
    assert rows == [("half", "running", 1, 1, 1), ("hand", "complete", 2, 2, 4), ("none", "running", 0, 0, 0)]


def test_load_balance_of_a_layer_without_tokens(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, Run("idle", {0: (2, 1), 1: (1, 1)}, [[Prompt([Token(1, {1: [(0, 1.0)]})])]]))
    assert sorted(rows_of(layout, "load_balance")) == [
        ("idle", 0, None, None, None, None, None, 2),
        ("idle", 1, 0.0, None, 0.0, 0.0, 1.0, 0),
    ]


def test_expert_load_without_weights_has_none(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, Run("ids-only", {0: (2, 1)}, [[Prompt([Token(1, {0: [(1, None)]})])]]))
    assert sorted(rows_of(layout, "expert_load")) == [
        ("ids-only", 0, 0, 0, 0.0, 0, 0.0, None),
        ("ids-only", 0, 1, 1, 1.0, 1, None, None),
    ]


# ------------------------------------------------------------------------------------------ brute force


def brute_co_routing(run: Run) -> Rows:
    rows = []
    for layer, (experts, _) in run.layers.items():
        sets = [set(t.experts(layer)) for t in run.tokens() if t.counted and t.experts(layer)]
        for a in range(experts):
            for b in range(experts):
                both = sum({a, b} <= s for s in sets)
                if a != b and both:
                    n_a, n_b = sum(a in s for s in sets), sum(b in s for s in sets)
                    ratios = (both / n_a, both / (n_a + n_b - both), both * len(sets) / (n_a * n_b))
                    rows.append((run.run_id, layer, a, b, both, *ratios))
    return rows


def brute_expert_token_affinity(run: Run) -> Rows:
    rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and t.experts(layer)]
        for expert in range(experts):
            mine = [t for t in tokens if expert in t.experts(layer)]
            for vocab_id, n_xi in Counter(t.vocab_id for t in mine).items():
                n_x = sum(t.vocab_id == vocab_id for t in tokens)
                ratios = (n_xi / n_x, n_xi / len(mine), n_xi * len(tokens) / (n_x * len(mine)))
                rows.append((run.run_id, layer, expert, vocab_id, word(vocab_id), n_xi, *ratios))
    return rows


def brute_layer_transitions(run: Run) -> Rows:
    rows = []
    layers = sorted(run.layers)
    for layer, following in pairwise(layers):
        moves = [(t.experts(layer), t.experts(following)) for t in run.tokens() if t.counted]
        moves = [(here, there) for here, there in moves if here and there]
        for i in range(run.layers[layer][0]):
            for j in range(run.layers[following][0]):
                both = sum(i in here and j in there for here, there in moves)
                if both:
                    n_i, n_j = sum(i in here for here, _ in moves), sum(j in there for _, there in moves)
                    rows.append((run.run_id, layer, following, i, j, both, both / n_i, both * len(moves) / (n_i * n_j)))
    return rows


def brute_expert_load(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and t.experts(layer)]
        choices = sum(len(t.experts(layer)) for t in tokens)
        for expert in range(experts):
            weights = [w for t in tokens for e, w in t.choices[layer] if e == expert and w is not None]
            first = sum(t.experts(layer)[0] == expert for t in tokens)
            mean = sum(weights) / len(weights) if weights else None
            rows.append((run.run_id, layer, expert, len(weights), len(weights) / choices, first, sum(weights), mean))
    return rows


def brute_load_balance(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        chosen = [expert for t in run.tokens() if t.counted for expert in t.experts(layer)]
        n = [chosen.count(expert) for expert in range(experts)]
        mean = sum(n) / experts
        entropy = -sum(x / sum(n) * math.log2(x / sum(n)) for x in n if x)
        cv = math.sqrt(sum((x - mean) ** 2 for x in n) / experts) / mean
        gini = sum(abs(x - y) for x in n for y in n) / (2 * experts**2 * mean)
        rows.append((run.run_id, layer, entropy, entropy / math.log2(experts), cv, gini, max(n) / mean, n.count(0)))
    return rows


def brute_domain_specialization(run: Run) -> Rows:
    rows: Rows = []
    prompts = [prompt for segment in run.segments for prompt in segment]
    for layer, (experts, _) in run.layers.items():
        sets = [(p.domain, t.experts(layer)) for p in prompts for t in p.tokens if t.counted and t.experts(layer)]
        for domain in {domain for domain, _ in sets}:
            mine = [chosen for d, chosen in sets if d == domain]
            for expert in range(experts):
                n_i = sum(expert in chosen for _, chosen in sets)
                tokens = sum(expert in chosen for chosen in mine)
                share, overall = tokens / len(mine), n_i / len(sets)
                lift = share / overall if n_i else None
                rows.append((run.run_id, domain, layer, expert, tokens, share, overall, lift))
    return rows


def brute_routes(run: Run) -> Rows:
    rows: Rows = []
    prompt_id = 0
    for segment, prompts in enumerate(run.segments):
        for prompt in prompts:
            for position, token in enumerate(prompt.tokens):
                about = (word(token.vocab_id), token.kind, position, prompt_id, prompt.domain)
                for layer, chosen in token.choices.items():
                    for rank, (expert, weight) in enumerate(chosen):
                        token_id = prompt_id * 2**24 + position
                        rows.append((run.run_id, segment, token_id, layer, rank, expert, weight, *about))
            prompt_id += 1
    return rows


BRUTE_FORCE: dict[str, Callable[[Run], Rows]] = {
    "co_routing": brute_co_routing,
    "expert_token_affinity": brute_expert_token_affinity,
    "layer_transitions": brute_layer_transitions,
    "expert_load": brute_expert_load,
    "load_balance": brute_load_balance,
    "domain_specialization": brute_domain_specialization,
    "routes": brute_routes,
}


@pytest.mark.parametrize("name", CANNED)
def test_view_equals_brute_force(name: str, random: tuple[Layout, list[Run]]) -> None:
    layout, runs = random
    assert_same_rows(name, rows_of(layout, name), [row for run in runs for row in BRUTE_FORCE[name](run)])


def assert_same_rows(name: str, got: Rows, expected: Rows) -> None:
    """Rows in any order: all but computed floats to the letter, those to 1e-12."""
    inexact = [column.type == "DOUBLE" for column in describe_views()[name].columns]

    def key(row: tuple[Any, ...]) -> str:
        return repr([value for value, is_float in zip(row, inexact, strict=True) if not is_float])

    assert len(got) == len(expected)
    for row, wanted in zip(sorted(got, key=key), sorted(expected, key=key), strict=True):
        for value, target, is_float in zip(row, wanted, inexact, strict=True):
            near = is_float and target is not None
            assert value == (pytest.approx(target, rel=1e-12, abs=1e-15) if near else target), (row, wanted)


def test_random_warehouse_has_the_awkward_cases(random: tuple[Layout, list[Run]]) -> None:
    """What the comparison above claims to cover is really there."""
    _, runs = random
    tokens = [(run, token) for run in runs for token in run.tokens()]
    assert any(len(token.choices) < len(run.layers) for run, token in tokens)
    assert {token.kind for _, token in tokens} == {"prompt", "special", "generated"}
    assert None in {prompt.domain for run in runs for segment in run.segments for prompt in segment}
    assert any(row[3] == 0 for run in runs for row in brute_expert_load(run))


IDENTITIES = {
    "co_routing conditional = k - 1": """
        select sums.total, layers.top_k - 1 from layers
        join (select run_id, layer, expert_a, sum(conditional) as total from co_routing group by all) as sums
            on sums.run_id = layers.run_id and sums.layer = layers.layer""",
    "layer_transitions conditional = k'": """
        select sums.total, layers.top_k from layers
        join (select run_id, next_layer, expert, sum(conditional) as total from layer_transitions group by all) as sums
            on sums.run_id = layers.run_id and sums.next_layer = layers.layer""",
    "expert_load share = 1": "select sum(share), 1 from expert_load group by run_id, layer",
    "domain_specialization share = k": """
        select sums.total, layers.top_k from layers
        join (select run_id, domain, layer, sum(share) as total from domain_specialization group by all) as sums
            on sums.run_id = layers.run_id and sums.layer = layers.layer""",
    "expert_token_affinity share_of_expert = 1": """
        select sum(share_of_expert), 1 from expert_token_affinity group by run_id, layer, expert""",
    "expert_token_affinity share_of_token = k": """
        select sums.total, layers.top_k from layers
        join (select run_id, layer, vocab_id, sum(share_of_token) as total from expert_token_affinity group by all)
            as sums on sums.run_id = layers.run_id and sums.layer = layers.layer""",
}


@pytest.mark.parametrize("identity", IDENTITIES)
def test_view_identity_holds(identity: str, random: tuple[Layout, list[Run]]) -> None:
    with open_warehouse(random[0]) as connection:
        pairs = connection.execute(IDENTITIES[identity]).fetchall()
    assert pairs
    assert all(math.isclose(total, expected, rel_tol=1e-12) for total, expected in pairs)


def test_run_id_and_segment_keep_their_types(random: tuple[Layout, list[Run]]) -> None:
    with open_warehouse(random[0]) as connection:
        row = connection.execute(
            "select distinct run_id, typeof(run_id), typeof(segment) from routing where run_id = '007'"
        ).fetchall()
    assert row == [("007", "VARCHAR", "INTEGER")]


def test_canned_names_are_the_files() -> None:
    assert list(canned_names()) == CANNED
