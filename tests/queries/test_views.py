"""Every view: documented, right on three tokens by hand, and equal to a plain computation on random routing."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moewh.warehouse.answer.catalog import describe_views, empty_warehouse, list_queries
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.base import QUERIES, View, canned_names, open_warehouse, staging_views, view_names
from tests.support.synthetic import Prompt, Run, Token, random_warehouse, word, write_run

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
    # Two tokens have first choices at both layers: 0 → 1 and 0 → 0.
    "first_choice_transitions": [("hand", 1, 4, 0, 0, 1, 1 / 2, 1.0), ("hand", 1, 4, 0, 1, 1, 1 / 2, 1.0)],
    # The second token has no rows at layer 4.
    "first_choice_paths": [("hand", "code", "0-1", 1), ("hand", None, "0-0", 1)],
    # No entry occurs ten times.
    "vocabulary_specialization": [("hand", 1, None, 0), ("hand", 4, None, 0)],
    # One pair, {0, 1} then {1, 2}: first choices differ, expert 1 is shared; 1 - C(2, 2) / C(4, 2) by chance.
    "expert_repetition": [("hand", "code", 1, 1, 0.0, 1.0, 1 / 4, 5 / 6)],
    # Of no series, and without raw logits.
    "router_saturation": [],
    "router_confidence": [],
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


def test_vocabulary_specialization_by_hand(tmp_path: Path) -> None:
    """Entry 1 goes to expert 0 in 9 of 12 and to expert 1 in 6; entry 2 always to expert 2; entry 3 is too rare."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    chosen = [(1, [0, 1])] * 3 + [(1, [0, 2])] * 6 + [(1, [1, 2])] * 3 + [(2, [2, 0])] * 10 + [(3, [0, 1])] * 9
    tokens = [Token(vocab_id, {0: [(expert, 0.5) for expert in experts]}) for vocab_id, experts in chosen]
    special = [Token(3, {0: [(0, 0.5), (1, 0.5)]}, kind="special")]
    write_run(layout, Run("r", {0: (3, 2)}, [[Prompt(special + tokens[:20])], [Prompt(tokens[20:])]]))
    assert rows_of(layout, "vocabulary_specialization") == [("r", 0, (9 / 12 + 1) / 2, 2)]


def test_expert_repetition_of_random_routing_is_its_baseline(tmp_path: Path) -> None:
    """Top-1 of 8 repeats in 12.5 %; top-2 of 8 shares an expert in 1 - (6/8)(5/7) = 46.4 % (Mixtral, section 5)."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    rng = np.random.default_rng(0)
    tokens = [
        Token(
            1,
            {
                0: [(int(rng.integers(8)), 1.0)],
                1: [(int(e), 1 / (2 + n)) for n, e in enumerate(rng.permutation(8)[:2])],
            },
        )
        for _ in range(20_001)
    ]
    write_run(layout, Run("r", {0: (8, 1), 1: (8, 2)}, [[Prompt(tokens)]]))
    one, two = sorted(rows_of(layout, "expert_repetition"))
    assert one[:4] == ("r", None, 0, 20_000)
    assert one[6:] == (0.125, pytest.approx(0.125, rel=1e-14))
    assert two[6:] == (0.125, pytest.approx(1 - 6 / 8 * 5 / 7, rel=1e-14))
    error = 4 * math.sqrt(0.25 / 20_000)  # four standard errors of a share
    for row in (one, two):
        assert row[4:6] == pytest.approx(row[6:], abs=error)


def test_chance_values_of_the_metrics_page(tmp_path: Path) -> None:
    """Even, independent routing: 12 layers of 8 experts, top-2, then one of 6, top-3. What docs/metrics.md says."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    rng, N = np.random.default_rng(0), 3_000
    layers = {**dict.fromkeys(range(12), (8, 2)), 12: (6, 3)}
    tokens = [
        Token(
            1,
            {n: [(int(e), 1 / (2 + r)) for r, e in enumerate(rng.permutation(E)[:k])] for n, (E, k) in layers.items()},
        )
        for _ in range(N)
    ]
    write_run(layout, Run("r", layers, [[Prompt(tokens)]]))
    with open_warehouse(layout) as connection:

        def means(columns: str, view: str, layers: str) -> Any:
            averages = ", ".join(f"avg({column})" for column in columns.split(", "))
            return connection.execute(f"select {averages} from {view} where layer {layers}").fetchall()[0]

        pairs = means("conditional, jaccard, lift", "co_routing", "< 12")
        assert pairs == pytest.approx((1 / 7, 1 / 13, 8 / (2 * 7)), rel=0.01)
        assert means("conditional, lift", "layer_transitions", "= 11") == pytest.approx((3 / 6, 1), rel=0.01)
        assert means("conditional", "first_choice_transitions", "= 11") == pytest.approx((1 / 6,), rel=0.01)
        entropy, cv, gini, largest = means("normalized_entropy, cv, gini, max_over_mean", "load_balance", "< 12")
        assert 1 - entropy == pytest.approx((8 - 2) / (2 * 2 * N * math.log(8)), rel=0.4)
        assert cv == pytest.approx(math.sqrt((8 - 2) / (2 * N)), rel=0.2)
        assert gini == pytest.approx(cv / math.sqrt(math.pi), rel=0.2)
        assert largest - 1 == pytest.approx(cv * math.sqrt(2 * math.log(8)), rel=0.4)


def test_expert_repetition_baseline_where_two_tokens_must_share(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    token = Token(1, {0: [(0, 0.5), (1, 0.5)], 1: [(0, 0.5), (1, 0.5)]})
    write_run(layout, Run("r", {0: (3, 2), 1: (4, 2)}, [[Prompt([token, token])]]))
    assert [row[7] for row in sorted(rows_of(layout, "expert_repetition"))] == [1.0, pytest.approx(5 / 6)]


TRAINED = {"series": "s", "tokens_key": "t"}


def test_router_saturation_by_hand(tmp_path: Path) -> None:
    """The reference is the greatest step of the same series and tokens; other series and unknown steps stay out."""
    layout = Layout(tmp_path / "wh")
    layout.create()

    def one(run_id: str, sets: list[list[int]], **fields: Any) -> None:
        tokens = [Token(1, {2: [(e, 0.5) for e in experts]} if experts else {}) for experts in sets]
        write_run(layout, Run(run_id, {2: (4, 2)}, [[Prompt(tokens[:1]), Prompt(tokens[1:])]], fields))

    one("late", [[0, 1], [2, 3], [0, 2], []], **TRAINED, train_step=20)
    one("early", [[1, 0], [0, 1], [2, 1], [0, 1]], **TRAINED, train_step=3)
    one("unknown", [[0, 1], [2, 3], [], [0, 1]], **TRAINED)
    one("other-series", [[0, 1]] * 4, series="z", tokens_key="t", train_step=99)
    one("other-tokens", [[0, 1]] * 4, series="s", tokens_key="u")
    assert sorted(rows_of(layout, "router_saturation"), key=str) == [
        ("early", "late", 3, 2, 3, 0.5, 0.5),
        ("late", "late", 20, 2, 3, 1.0, 0.5),
        ("other-series", "other-series", 99, 2, 4, 1.0, 0.5),
        ("unknown", "late", None, 2, 2, 1.0, 0.5),
    ]


def test_router_saturation_of_other_segments(tmp_path: Path) -> None:
    """Runs cut into other segments still compare the same tokens."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    prompts = [Prompt([Token(1, {0: [(n, 1.0)]})]) for n in range(4)]
    write_run(layout, Run("one", {0: (4, 1)}, [prompts], {**TRAINED, "train_step": 2}))
    write_run(layout, Run("many", {0: (4, 1)}, [[prompt] for prompt in prompts], {**TRAINED, "train_step": 1}))
    assert sorted(row[3:6] for row in rows_of(layout, "router_saturation")) == [(0, 4, 1.0), (0, 4, 1.0)]


def test_router_confidence_by_hand(tmp_path: Path) -> None:
    """Even logits; one that takes all, however large; a bias that moves the margin; a scoring nobody knows."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    even, sure, biased, unknown, full = 0, 1, 2, 3, 4
    logits = {even: [1.0] * 4, sure: [1000.0, 0.0, 0.0, 0.0], biased: [0.0] * 4, unknown: [0.0] * 4, full: [0.0] * 2}
    choices: dict[int, list[tuple[int, float | None]]] = {n: [(0, 0.5)] for n in logits}
    choices[full] = [(0, 0.5), (1, 0.5)]
    run = Run(
        "r",
        {even: (4, 1), sure: (4, 1), biased: (4, 1), unknown: (4, 1), full: (2, 2)},
        [[Prompt([Token(1, choices, logits=logits)])]],
        scoring={even: "softmax", sure: "softmax", biased: "sigmoid", full: "softmax"},
        selection_bias={n: [0.0] * 4 for n in (even, sure)} | {biased: [0.75, 0.25, 0.0, 0.0], full: [0.0, 0.0]},
    )
    write_run(layout, run)
    assert sorted(row[3:] for row in rows_of(layout, "router_confidence")) == [
        (even, 2.0, 0.25, 0.0),
        (sure, 0.0, 1.0, 1.0),
        (biased, 2.0, 0.25, 0.5),
        (unknown, None, None, None),
        (full, 1.0, 1.0, None),
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


def brute_first_choice_transitions(run: Run) -> Rows:
    rows = []
    for layer, following in pairwise(sorted(run.layers)):
        moves = [(t.experts(layer)[:1], t.experts(following)[:1]) for t in run.tokens() if t.counted]
        moves = [(here, there) for here, there in moves if here and there]
        for (here, there), both in Counter((here[0], there[0]) for here, there in moves).items():
            n_i, n_j = sum(h == [here] for h, _ in moves), sum(t == [there] for _, t in moves)
            ratios = (both / n_i, both * len(moves) / (n_i * n_j))
            rows.append((run.run_id, layer, following, here, there, both, *ratios))
    return rows


def brute_first_choice_paths(run: Run) -> Rows:
    layers = sorted(run.layers)
    prompts = [prompt for segment in run.segments for prompt in segment]
    paths = Counter(
        (prompt.domain, "-".join(str(token.experts(layer)[0]) for layer in layers))
        for prompt in prompts
        for token in prompt.tokens
        if token.counted and all(token.experts(layer) for layer in layers)
    )
    return [(run.run_id, domain, path, tokens) for (domain, path), tokens in paths.items()]


def brute_vocabulary_specialization(run: Run) -> Rows:
    rows: Rows = []
    for layer, (experts, _) in run.layers.items():
        tokens = [t for t in run.tokens() if t.counted and t.experts(layer)]
        largest = []
        for vocab_id, n_x in Counter(t.vocab_id for t in tokens).items():
            mine = [t.experts(layer) for t in tokens if t.vocab_id == vocab_id]
            if n_x >= 10:
                largest.append(max(sum(expert in chosen for chosen in mine) for expert in range(experts)) / n_x)
        rows.append((run.run_id, layer, sum(largest) / len(largest) if largest else None, len(largest)))
    return rows


def brute_expert_repetition(run: Run) -> Rows:
    rows: Rows = []
    prompts = [prompt for segment in run.segments for prompt in segment]
    for layer, (experts, top_k) in run.layers.items():
        sets = list(combinations(range(experts), top_k))
        shares_any = sum(bool({*sets[0]} & {*other}) for other in sets) / len(sets)
        for domain in {prompt.domain for prompt in prompts}:
            pairs = [
                (here.experts(layer), there.experts(layer))
                for prompt in prompts
                for here, there in pairwise(prompt.tokens)
                if prompt.domain == domain and here.counted and there.counted
            ]
            pairs = [(here, there) for here, there in pairs if here and there]
            if pairs:
                first = sum(here[0] == there[0] for here, there in pairs) / len(pairs)
                any_ = sum(bool({*here} & {*there}) for here, there in pairs) / len(pairs)
                rows.append((run.run_id, domain, layer, len(pairs), first, any_, 1 / experts, shares_any))
    return rows


def brute_router_saturation(run: Run, runs: list[Run]) -> Rows:
    series = [r for r in runs if r.fields.get("series") and r.fields["series"] == run.fields.get("series")]
    if not series:
        return []
    last = max(series, key=lambda r: r.fields["train_step"])
    rows: Rows = []
    for layer, (experts, top_k) in run.layers.items():
        both = [
            (here.experts(layer), there.experts(layer))
            for here, there in zip(run.tokens(), last.tokens(), strict=True)
            if here.counted and here.experts(layer) and there.experts(layer)
        ]
        saturation = sum(len({*here} & {*there}) / top_k for here, there in both) / len(both)
        about = (run.run_id, last.run_id, run.fields["train_step"], layer, len(both))
        rows.append((*about, saturation, top_k / experts))
    return rows


def brute_router_confidence(run: Run) -> Rows:
    rows: Rows = []
    prompt_id = 0
    for segment, prompts in enumerate(run.segments):
        for prompt in prompts:
            for position, token in enumerate(prompt.tokens):
                token_id = prompt_id * 2**24 + position
                for layer, logits in token.logits.items():
                    numbers = confidence(logits, run.scoring[layer], run.selection_bias[layer], run.layers[layer][1])
                    rows.append((run.run_id, segment, token_id, layer, *numbers))
            prompt_id += 1
    return rows


def confidence(logits: list[float], scoring: str, bias: list[float], top_k: int) -> tuple[float, float, float | None]:
    """Entropy, mass of the k greatest shares, and margin, with numpy."""
    z_E = np.asarray(logits, np.float64)
    scores_E = np.exp(z_E) / np.exp(z_E).sum() if scoring == "softmax" else 1 / (1 + np.exp(-z_E))
    shares_E = scores_E / scores_E.sum()
    selection_E = np.sort(scores_E + np.asarray(bias, np.float64))[::-1]
    margin = float(selection_E[top_k - 1] - selection_E[top_k]) if top_k < len(logits) else None
    return float(-(shares_E * np.log2(shares_E)).sum()), float(np.sort(shares_E)[::-1][:top_k].sum()), margin


BRUTE_FORCE: dict[str, Callable[[Run], Rows]] = {
    "first_choice_transitions": brute_first_choice_transitions,
    "first_choice_paths": brute_first_choice_paths,
    "vocabulary_specialization": brute_vocabulary_specialization,
    "expert_repetition": brute_expert_repetition,
    "router_confidence": brute_router_confidence,
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
    if name == "router_saturation":
        expected = [row for run in runs for row in brute_router_saturation(run, runs)]
    else:
        expected = [row for run in runs for row in BRUTE_FORCE[name](run)]
    assert expected
    assert_same_rows(name, rows_of(layout, name), expected)


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
    "first_choice_transitions conditional = 1": """
        select sum(conditional), 1 from first_choice_transitions group by run_id, layer, expert""",
    "router_saturation of the reference = 1": """
        select saturation, 1 from router_saturation where run_id = reference_run_id""",
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


@pytest.mark.parametrize("view", staging_views(), ids=lambda view: view.name)
def test_staging_view_documented(view: View) -> None:
    assert view.header.startswith(f"{view.name}: ")
    assert "One row per " in view.header
    with empty_warehouse() as connection:
        named = "select coalesce(comment, '') from duckdb_views() where view_name = $name"
        columns = "select coalesce(comment, '') from duckdb_columns() where table_name = $name"
        comments = connection.execute(f"{named} union all {columns}", {"name": view.name}).fetchall()
    assert len(comments) > 2
    assert all(comment for (comment,) in comments)
    assert view.name not in describe_views()
    assert view.name not in list_queries()


def test_canned_names_are_the_files() -> None:
    assert list(canned_names()) == CANNED
