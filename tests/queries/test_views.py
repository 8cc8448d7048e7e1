"""Every view: documented, right on three tokens by hand, and equal to a plain computation on random routing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest

from moewh.warehouse.answer.catalog import describe_views, list_queries
from moewh.warehouse.answer.catalog import empty_warehouse as tables_without_rows
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import QUERIES, View, canned_names, staging_views, view_names
from tests.support.brute_force import BRUTE_FORCE, Rows, assert_same_rows, brute_expert_load, brute_router_saturation
from tests.support.opened import opened, viewed
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_run, random_warehouse, word, write_run

CANNED = [path.stem for path in sorted((QUERIES / "views").glob("*.sql"))]


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    return random_warehouse(tmp_path_factory.mktemp("random") / "wh")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return empty_warehouse(tmp_path_factory.mktemp("empty") / "wh")


def rows_of(layout: Layout, view: str) -> Rows:
    return viewed(layout).execute(f"from {view}").fetchall()


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
def test_view_empty_warehouse_answers(name: str, empty: Layout) -> None:
    assert rows_of(empty, name) == []


@pytest.mark.parametrize("name", view_names())
def test_view_types_are_those_described(name: str, random: tuple[Layout, list[Run]]) -> None:
    described = opened(random[0].root).execute(f"describe {name}").fetchall()
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
                    Token(
                        9,
                        {1: [(0, 0.5), (3, 0.5)], 4: [(0, 1.0)]},
                        kind="special",
                        outputs={1: [(100.0, 1.0), (100.0, 1.0)], 4: [(100.0, 1.0)]},
                    ),
                    Token(
                        5,
                        {1: [(0, 0.75), (1, 0.25)], 4: [(1, 1.0)]},
                        outputs={1: [(2.0, 0.5), (4.0, 1.0)], 4: [(1.0, 1.0)]},
                    ),
                    Token(5, {1: [(1, 0.5), (2, 0.25)]}, outputs={1: [(8.0, None), (None, None)]}),
                ],
                domain="code",
            )
        ],
        [
            Prompt(
                [
                    Token(
                        6,
                        {1: [(0, 0.5), (2, 0.25)], 4: [(0, 0.5)]},
                        kind="generated",
                        outputs={1: [(6.0, -0.5), (20.0, 0.25)], 4: [(3.0, 1.0)]},
                    )
                ]
            )
        ],
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
    # Choices; sum and mean of norms, of weight * norm (REAP); mean square, greatest, cosine; six ranks. Expert 0 puts
    # out 2 and 6 with weights 0.75 and 0.5; expert 1 4 and 8, 0.25 and 0.5; expert 2 20, 0.25, and one unknown.
    "expert_saliency": [
        ("hand", 1, 0, 2, 8.0, 4.0, 4.5, 2.25, 20.0, 6.0, 0.0, 1, 3, 3, 3, 3, 3),
        ("hand", 1, 1, 2, 12.0, 6.0, 5.0, 2.5, 40.0, 8.0, 1.0, 2, 2, 2, 1, 2, 2),
        ("hand", 1, 2, 1, 20.0, 20.0, 5.0, 5.0, 400.0, 20.0, 0.25, 3, 1, 1, 2, 1, 1),
        ("hand", 1, 3, 0, 0.0, None, 0.0, None, None, None, None, 4, 4, 4, 4, 4, 4),
        ("hand", 4, 0, 1, 3.0, 3.0, 1.5, 1.5, 9.0, 3.0, 1.0, 1, 1, 1, 1, 1, 1),
        ("hand", 4, 1, 1, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2, 2, 2, 2, 2, 2),
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
    # In no series, and without raw logits.
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


@pytest.fixture(scope="module")
def by_hand(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = empty_warehouse(tmp_path_factory.mktemp("by_hand") / "wh")
    write_run(layout, BY_HAND)
    return layout


@pytest.mark.parametrize("name", CANNED)
def test_view_three_tokens_exact_rows(name: str, by_hand: Layout) -> None:
    assert_same_rows(name, rows_of(by_hand, name), HAND_ROWS[name])


def test_runs_counts_what_is_committed(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, BY_HAND)
    write_run(layout, Run("half", {0: (2, 1)}, [[Prompt([Token(1, {})])]], {"segments_planned": 2}))
    write_run(layout, Run("none", {0: (2, 1)}, [], {"segments_planned": 2}))
    with open_warehouse(layout) as connection:
        rows = connection.execute(
            "select run_id, status, segments, prompts, tokens from runs order by run_id"
        ).fetchall()
    assert rows == [("half", "running", 1, 1, 1), ("hand", "complete", 2, 2, 4), ("none", "running", 0, 0, 0)]


def test_load_balance_of_a_layer_without_tokens(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, Run("idle", {0: (2, 1), 1: (1, 1)}, [[Prompt([Token(1, {1: [(0, 1.0)]})])]]))
    assert sorted(rows_of(layout, "load_balance")) == [
        ("idle", 0, None, None, None, None, None, 2),
        ("idle", 1, 0.0, None, 0.0, 0.0, 1.0, 0),
    ]


def test_vocabulary_specialization_by_hand(tmp_path: Path) -> None:
    """Entry 1 goes to expert 0 in 9 of 12 and to expert 1 in 6; entry 2 always to expert 2; entry 3 is too rare."""
    layout = empty_warehouse(tmp_path / "wh")
    chosen = [(1, [0, 1])] * 3 + [(1, [0, 2])] * 6 + [(1, [1, 2])] * 3 + [(2, [2, 0])] * 10 + [(3, [0, 1])] * 9
    tokens = [Token(vocab_id, {0: [(expert, 0.5) for expert in experts]}) for vocab_id, experts in chosen]
    special = [Token(3, {0: [(0, 0.5), (1, 0.5)]}, kind="special")]
    write_run(layout, Run("r", {0: (3, 2)}, [[Prompt(special + tokens[:20])], [Prompt(tokens[20:])]]))
    assert rows_of(layout, "vocabulary_specialization") == [("r", 0, (9 / 12 + 1) / 2, 2)]


def test_expert_repetition_of_random_routing_is_its_baseline(tmp_path: Path) -> None:
    """Top-1 of 8 repeats in 12.5 %; top-2 of 8 shares an expert in 1 - (6/8)(5/7) = 46.4 % (Mixtral, section 5)."""
    layout = empty_warehouse(tmp_path / "wh")
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
    layout = empty_warehouse(tmp_path / "wh")
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
    layout = empty_warehouse(tmp_path / "wh")
    token = Token(1, {0: [(0, 0.5), (1, 0.5)], 1: [(0, 0.5), (1, 0.5)]})
    write_run(layout, Run("r", {0: (3, 2), 1: (4, 2)}, [[Prompt([token, token])]]))
    assert [row[7] for row in sorted(rows_of(layout, "expert_repetition"))] == [1.0, pytest.approx(5 / 6)]


TRAINED = {"series": "s", "tokens_key": "t"}


def test_router_saturation_by_hand(tmp_path: Path) -> None:
    """The reference is the greatest step of the same series and tokens; other series and unknown steps stay out."""
    layout = empty_warehouse(tmp_path / "wh")

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
    layout = empty_warehouse(tmp_path / "wh")
    prompts = [Prompt([Token(1, {0: [(n, 1.0)]})]) for n in range(4)]
    write_run(layout, Run("one", {0: (4, 1)}, [prompts], {**TRAINED, "train_step": 2}))
    write_run(layout, Run("many", {0: (4, 1)}, [[prompt] for prompt in prompts], {**TRAINED, "train_step": 1}))
    assert sorted(row[3:6] for row in rows_of(layout, "router_saturation")) == [(0, 4, 1.0), (0, 4, 1.0)]


def test_router_confidence_by_hand(tmp_path: Path) -> None:
    """Even logits; one that takes all, however large; a bias that moves the margin; an unknown scoring function."""
    layout = empty_warehouse(tmp_path / "wh")
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
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, Run("ids-only", {0: (2, 1)}, [[Prompt([Token(1, {0: [(1, None)]})])]]))
    assert sorted(rows_of(layout, "expert_load")) == [
        ("ids-only", 0, 0, 0, 0.0, 0, 0.0, None),
        ("ids-only", 0, 1, 1, 1.0, 1, None, None),
    ]


# ------------------------------------------------------------------------------------------ brute force


@pytest.mark.parametrize("name", CANNED)
def test_view_equals_brute_force(name: str, random: tuple[Layout, list[Run]]) -> None:
    layout, runs = random
    if name == "router_saturation":
        expected = [row for run in runs for row in brute_router_saturation(run, runs)]
    else:
        expected = [row for run in runs for row in BRUTE_FORCE[name](run)]
    assert expected
    assert_same_rows(name, rows_of(layout, name), expected)


def test_random_warehouse_has_the_awkward_cases(random: tuple[Layout, list[Run]]) -> None:
    """The data really holds the cases that the comparison above claims to cover."""
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
    with viewed(random[0]) as connection:
        pairs = connection.execute(IDENTITIES[identity]).fetchall()
    assert pairs
    assert all(math.isclose(total, expected, rel_tol=1e-12) for total, expected in pairs)


def test_run_id_and_segment_keep_their_types(random: tuple[Layout, list[Run]]) -> None:
    with viewed(random[0]) as connection:
        row = connection.execute(
            "select distinct run_id, typeof(run_id), typeof(segment) from routing where run_id = '007'"
        ).fetchall()
    assert row == [("007", "VARCHAR", "INTEGER")]


@pytest.mark.parametrize("view", staging_views(), ids=lambda view: view.name)
def test_staging_view_documented(view: View) -> None:
    assert view.header.startswith(f"{view.name}: ")
    assert "One row per " in view.header
    with tables_without_rows() as connection:
        named = "select coalesce(comment, '') from duckdb_views() where view_name = $name"
        columns = "select coalesce(comment, '') from duckdb_columns() where table_name = $name"
        comments = connection.execute(f"{named} union all {columns}", {"name": view.name}).fetchall()
    assert len(comments) > 2
    assert all(comment for (comment,) in comments)
    assert view.name not in describe_views()
    assert view.name not in list_queries()


def test_canned_names_are_the_files() -> None:
    assert list(canned_names()) == CANNED


# ------------------------------------------------------------------------------------------ the cost of routes


AT_THE_COST_OF_A_SCAN = (
    "select count(*) from routes",
    "select domain, count(*) from routes group by domain",
    "select layer, expert, sum(weight) from routes where kind = 'prompt' and position > 3 group by all",
    "select prompt_id, max(rank) from routes where run_id = '007' group by prompt_id",
)


@pytest.mark.parametrize("asked", AT_THE_COST_OF_A_SCAN)
def test_routes_without_text_are_a_scan(asked: str, random: tuple[Layout, list[Run]]) -> None:
    """DuckDB 2 drops a join to a unique key whose columns are unused; 1.5 keeps it and gives the same rows."""
    with viewed(random[0]) as connection:
        plan = str(connection.execute(f"explain {asked}").fetchall())
        with_text = str(connection.execute("explain select min(token) from routes").fetchall())
    assert "join" in with_text.lower()
    if int(duckdb.__version__.partition(".")[0]) >= 2:
        assert "join" not in plan.lower()


@pytest.mark.parametrize("kinds", [("special", "prompt"), ("special", "prompt", "generated"), ("special", "generated")])
def test_expert_token_affinity_of_a_sealed_run_adds_up_its_kinds(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """A sealed run with one kind besides specials is not grouped again; others and unsealed runs are."""
    layout, runs = empty_warehouse(tmp_path / "wh"), []
    for run_id in ("open", "sealed"):
        drawn = random_run(run_id, 5, {0: (8, 3), 2: (6, 2)}, prompts=24)
        kept = [
            [replace(prompt, tokens=[token for token in prompt.tokens if token.kind in kinds]) for prompt in prompts]
            for prompts in drawn.segments
        ]
        runs.append(replace(drawn, segments=kept))
        write_run(layout, runs[-1])
    assert seal(layout, "sealed")
    assert not layout.sealed("open").is_dir()
    expected = [row for run in runs for row in BRUTE_FORCE["expert_token_affinity"](run)]
    assert_same_rows("expert_token_affinity", rows_of(layout, "expert_token_affinity"), expected)
