"""The saved queries of published analyses: by hand, compared with plain Python, and under random routing."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moewh.warehouse.answer.query import Value, find_query
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse
from tests.support.brute_literature import ASKED, LITERATURE, loads, lru_hits, two_rates
from tests.support.places import Place, Rows, assert_rows, assert_rows_in_any_order, routed
from tests.support.saved_queries import answer
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_warehouse, word, write_run


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    """Layers that are not consecutive, dropped tokens, special and generated ones, three domains, one of them NULL;
    sealed and unsealed runs."""
    return random_warehouse(tmp_path_factory.mktemp("research") / "wh")


# ------------------------------------------------------------------------------------------ against plain Python


@pytest.mark.parametrize("name", LITERATURE)
def test_query_equals_plain_python(name: str, warehouse: tuple[Layout, list[Run]]) -> None:
    layout, runs = warehouse
    expected = [row for run in runs for row in LITERATURE[name](run)]
    assert expected
    got = answer(layout, name, ASKED.get(name, {}))
    assert_rows_in_any_order(got, expected)
    narrow: dict[str, Value] = {"run": "mixed", "layer": 3}
    some = [row for row in got if row[0] == "mixed" and 3 in (row[1], row[2])]
    some = [row for row in some if row[2 if isinstance(row[1], str | None) else 1] == 3]
    assert some
    assert_rows_in_any_order(answer(layout, name, {**ASKED.get(name, {}), **narrow}), some)


@pytest.mark.parametrize("name", ["prompt_against_generated", "risk_difference"])
def test_largest_difference_comes_first(name: str, warehouse: tuple[Layout, list[Run]]) -> None:
    values: dict[str, Value] = {"run": "007", "layer": 2}
    rows = answer(warehouse[0], name, values | ({"domain": "code"} if name == "risk_difference" else {}))
    sizes = [round(abs(row[7]), 12) for row in rows]
    assert len(sizes) > 3
    assert sizes == sorted(sizes, reverse=True)


def test_load_over_checkpoints_equals_plain_python(warehouse: tuple[Layout, list[Run]]) -> None:
    layout, runs = warehouse
    trained = [run for run in runs if run.fields.get("series")]
    expected: Rows = []
    for layer, (experts, _) in trained[0].layers.items():
        counts_RE = np.array([loads(run, layer, routed(run, layer)) for run in trained], np.float64)
        share_RE = counts_RE / counts_RE.sum(1, keepdims=True)
        for e in range(experts):
            levels = [float(np.percentile(share_RE[:, e], percent)) for percent in (0, 5, 50, 95, 100)]
            expected.append(("trained", "step-30", layer, e, len(trained), *levels, 1 / experts))
    assert_rows_in_any_order(answer(layout, "load_over_checkpoints", {}), expected)
    some = answer(layout, "load_over_checkpoints", {"series": "trained", "layer": 3})
    assert_rows_in_any_order(some, [row for row in expected if row[2] == 3])


GROUPS: dict[str, tuple[dict[str, Value], Any, Any]] = {
    "a domain against the rest": ({"domain": "code"}, lambda p: p.domain == "code", lambda p: p.domain != "code"),
    "a domain against a domain": (
        {"domain": "code", "other_domain": "prose"},
        lambda p: p.domain == "code",
        lambda p: p.domain == "prose",
    ),
    "prompts against prompts": (
        {"prompt_ids": "0, 3", "other_prompt_ids": "1,2,3"},
        lambda p: p.prompt_id in (0, 3),
        lambda p: p.prompt_id in (1, 2, 3),
    ),
    "a span against its prompt": (
        {"token_ids": f"{(1 << 24) + 1},{(1 << 24) + 2}", "other_prompt_ids": "1"},
        lambda p: p.prompt_id == 1 and p.position in (1, 2),
        lambda p: p.prompt_id == 1,
    ),
    "a span against a span": (
        {"token_ids": "1,2,3", "other_token_ids": f"{(1 << 24) + 1},{(1 << 24) + 2}", "domain": "code"},
        lambda p: p.domain == "code" and p.token_id in (1, 2, 3),
        lambda p: p.prompt_id == 1 and p.position in (1, 2),
    ),
}


@pytest.mark.parametrize("groups", GROUPS)
def test_risk_difference_equals_plain_python(groups: str, warehouse: tuple[Layout, list[Run]]) -> None:
    layout, runs = warehouse
    values, here, there = GROUPS[groups]
    expected: Rows = []
    for run in runs:
        for layer, (experts, _) in run.layers.items():
            first = [place for place in routed(run, layer) if here(place)]
            other = [place for place in routed(run, layer) if there(place)]
            if first and other:
                expected += rates(run, layer, experts, first, other)
    assert expected
    assert_rows_in_any_order(answer(layout, "risk_difference", values), expected)


def rates(run: Run, layer: int, experts: int, first: list[Place], other: list[Place]) -> Rows:
    """Without z where a token is in both groups: they are no two samples."""
    a, b, n, m = loads(run, layer, first), loads(run, layer, other), len(first), len(other)
    apart = {place.token_id for place in first}.isdisjoint(place.token_id for place in other)
    z_E = [two_rates(a[e], n, b[e], m) if apart else None for e in range(experts)]
    return [
        (run.run_id, layer, e, a[e], b[e], a[e] / n, b[e] / m, a[e] / n - b[e] / m, z_E[e])
        for e in range(experts)
        if a[e] or b[e]
    ]


def test_choice_information_reads_no_rows(warehouse: tuple[Layout, list[Run]]) -> None:
    """Flat in tokens: the plan reads only rollups, although the staging view could also read the rows."""
    plans = {}
    with open_warehouse(warehouse[0]) as connection:
        for name in ("choice_information", "first_choice_information"):
            plans[name] = str(connection.execute(f"explain (format json) {find_query(name).sql}").fetchall())
    assert "token_id" in plans["first_choice_information"]
    assert "token_id" not in plans["choice_information"]


# ------------------------------------------------------------------------------------------ by hand

# One layer of 4 experts, top-2. Domain a has four tokens {0, 1}; domain b two {0, 1} and two {2, 0}. Entries 1 and 2.
Choices = list[tuple[int, float | None]]
A: Choices = [(0, 0.75), (1, 0.25)]
B: Choices = [(0, 0.5), (1, 0.25)]
C: Choices = [(2, 0.75), (0, 0.5)]
HAND = Run(
    "r",
    {5: (4, 2)},
    [
        [Prompt([Token(9, {5: [(3, 1.0), (2, 0.5)]}, "special"), *[Token(1, {5: A})] * 4], "a")],
        [
            Prompt(
                [Token(1, {5: B}), Token(1, {5: B}), Token(2, {5: C}, "generated"), Token(2, {5: C}, "generated")], "b"
            )
        ],
    ],
)
H = math.log2(4) - 0.75 * math.log2(3)
"""Entropy of (1/4, 3/4) in bits."""
J = 0.875 + 0.375 * math.log2(8 / 3)
"""Entropy of (1/2, 3/8, 1/8)."""


def wilson(n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for n of n."""
    return n / (n + 1.96**2), 1.0


TIGHT = 1 / (16 * math.log(2))
"""Bits by chance in eight choices of two experts, in two parts."""

# Weights: (3/4, 1/4, 0) in domain a, (1/2, 1/8, 3/8) in b: entropies H and J, of their mean M.
M = 0.625 * math.log2(1.6) + 0.375 * math.log2(16 / 3)
BY_HAND: dict[str, Rows] = {
    # 8, 6, 2 and 0 of 16 choices: 4 p - 1 = 1, 0.5, -0.5 and -1.
    "load_violation": [("r", 5, 1.0, 0.5, 0.75, 1.0)],
    "coverage_curve": [
        ("r", 5, 0.5, 1, 2, 3, 4, 16),
        ("r", 5, 0.8, 2, 4, 3, 4, 16),
        ("r", 5, 0.9, 3, 4, 3, 4, 16),
        ("r", 5, 0.95, 3, 4, 3, 4, 16),
    ],
    # Expert 0 has 4 of 8 choices in either domain, which is not over half.
    "top_expert_share": [("r", "a", 5, 0, 4, 1.0, 0.5, 1.0, 2), ("r", "b", 5, 0, 4, 1.0, 0.5, 0.5, 2)],
    # p = (1/2, 1/2, 0, 0), q = (1/2, 1/4, 1/4, 0): entropies 1 and 1.5, of their mean J.
    "domain_divergence": [
        (
            "r",
            5,
            one,
            other,
            4,
            4,
            J - 1.25,
            (J - 1.25) / 1.25,
            1 / (16 * math.log(2)),
            M - (H + J) / 2,
            M * 2 / (H + J) - 1,
        )
        for one, other in ("ab", "ba")
    ],
    # Ranks in a: 0, 1. In b: 0, 2. So only 0 is present in 80 % of the domains.
    "standing_committee": [("r", 5, 0, 2, 2, 1.0, 0.0, 0.625, 1)],
    # Entry 1 (6 tokens) goes to {0, 1}, entry 2 (2 tokens) to {0, 2}.
    "expert_token_association": [
        ("r", 5, 0, 1, word(1), 6, 6.0, 1.0, *wilson(6), None, 0.0),
        ("r", 5, 0, 2, word(2), 2, 2.0, 1.0, *wilson(2), None, 0.0),
        ("r", 5, 1, 1, word(1), 6, 4.5, 4 / 3, wilson(6)[0] * 4 / 3, 4 / 3, math.sqrt(7), 1.0),
        ("r", 5, 2, 2, word(2), 2, 0.5, 4.0, wilson(2)[0] * 4, 4.0, math.sqrt(7), 1.0),
    ],
    # Within a domain the choices have 1 and 1.5 bits, the first ones 0 and 1; within an entry 1 bit, the first ones 0.
    "choice_information": [("r", 5, 8, J, 2, J - 1, TIGHT / 2, 2, J - 1.25, TIGHT / 2)],
    # Counted from 1, position 1 has first choice 0, 2 and 3 have 0 thrice and 2 once, 4 and 5 have 0 twice and 2 once.
    "first_choice_information": [
        ("r", 5, 8, H, 2, H, TIGHT, 2, H - 0.5, TIGHT, 3, H / 2 - 0.375 * math.log2(3) + 0.25, 2 * TIGHT)
    ],
    # Prompt: 6 tokens {0, 1}; generated: 2 tokens {0, 2}.
    "prompt_against_generated": [
        ("r", 5, 1, 6, 0, 1.0, 0.0, -1.0, -math.sqrt(8)),
        ("r", 5, 2, 0, 2, 0.0, 1.0, 1.0, math.sqrt(8)),
        ("r", 5, 0, 6, 2, 1.0, 1.0, 0.0, None),
        ("r", 5, 3, 0, 0, 0.0, 0.0, 0.0, None),
    ],
}

F = math.log2(5) - 0.6 * math.log2(3)
"""Entropy of (3/5, 1/5, 1/5)."""
# Two layers of three experts, top-1: one prompt's choices at both, token by token.
FLOW = Run(
    "r",
    {0: (3, 1), 2: (3, 1)},
    [[Prompt([Token(1, {0: [(a, 1.0)], 2: [(b, 1.0)]}) for a, b in [(0, 1), (0, 1), (1, 2), (0, 1), (2, 0)]])]],
)
FLOWING: dict[str, tuple[dict[str, Value], Rows]] = {
    # 0 goes to 1 three times, 1 to 2 and 2 to 0: each predicts the next; from the load alone, the guess is 1.
    "next_layer_recall": ({"guesses": 1}, [("r", 0, 2, 5, 1, 1.0, 0.6, 1 / 3)]),
    # 0, 0, 1, 0, 2: a cache of one finds the second 0, one of two also the third.
    "expert_cache": (
        {"layer": 0},
        [
            ("r", 0, 1, 5, 1, 0.2, 0.6, 1 / 3),
            ("r", 0, 2, 5, 2, 0.4, 0.8, 2 / 3),
            ("r", 0, 3, 5, 2, 0.4, 1.0, 1.0),
        ],
    ),
    "expert_reuse": ({"layer": 0}, [("r", None, 0, 4, 0.25, 0.25, 11 / 25, 1 / 3)]),
    "load_by_position": (
        {"layer": 0, "width": 3},
        [
            ("r", 0, 0, 0, 2, 2 / 3, 0.6, 10 / 9, 1.0),
            ("r", 0, 0, 1, 1, 1 / 3, 0.2, 5 / 3, 1.0),
            ("r", 0, 0, 2, 0, 0.0, 0.2, 0.0, 1.0),
            ("r", 0, 3, 0, 1, 0.5, 0.6, 5 / 6, 1.0),
            ("r", 0, 3, 1, 0, 0.0, 0.2, 0.0, 1.0),
            ("r", 0, 3, 2, 1, 0.5, 0.2, 2.5, 1.0),
        ],
    ),
    # Counted from 1: positions 1, 2 to 3 and 4 to 5 have {0}, {0, 1} and {0, 2}: no bits, one and one.
    "position_information": ({"layer": 0}, [("r", 0, 5, F, 3, F - 0.8, 4 / (10 * math.log(2)))]),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_eight_tokens_by_hand(name: str, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, HAND)
    assert_rows(answer(layout, name, {}), BY_HAND[name])


@pytest.mark.parametrize("name", FLOWING)
def test_five_tokens_in_a_row_by_hand(name: str, tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, FLOW)
    values, expected = FLOWING[name]
    assert_rows(answer(layout, name, values), expected)


def test_load_over_segments_by_hand(tmp_path: Path) -> None:
    """Half, all and none of three segments' choices; one segment has no tokens at the layer."""
    layout = empty_warehouse(tmp_path / "wh")
    chosen = [[0, 1], [0], [1, 1], []]
    segments = [[Prompt([Token(1, {0: [(e, 1.0)]}) for e in experts] or [Token(1, {})])] for experts in chosen]
    write_run(layout, Run("r", {0: (3, 1)}, segments))
    assert_rows(
        answer(layout, "load_over_segments", {}),
        [
            ("r", 0, 0, 3, 0.4, 0.0, 0.05, 0.5, 0.95, 1.0),
            ("r", 0, 1, 3, 0.6, 0.0, 0.05, 0.5, 0.95, 1.0),
            ("r", 0, 2, 3, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),
        ],
    )


def test_load_over_checkpoints_by_hand(tmp_path: Path) -> None:
    """A quarter, half and all of four tokens: 5 % lies at 0.1 of the way to the second, 95 % at 0.9 to the third."""
    layout = empty_warehouse(tmp_path / "wh")
    for step, chosen in enumerate([[0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]):
        fields = {"series": "s", "tokens_key": "t", "train_step": step}
        tokens = [Token(1, {0: [(expert, 1.0)]}) for expert in chosen]
        write_run(layout, Run(f"step-{step}", {0: (2, 1)}, [[Prompt(tokens)]], fields))
    assert_rows(
        answer(layout, "load_over_checkpoints", {}),
        [
            ("s", "step-2", 0, 0, 3, 0.25, 0.275, 0.5, 0.95, 1.0, 0.5),
            ("s", "step-2", 0, 1, 3, 0.0, 0.05, 0.5, 0.725, 0.75, 0.5),
        ],
    )


def test_risk_difference_by_hand(tmp_path: Path) -> None:
    """All of a's and half of b's four tokens: pooled 3/4, so that the standard error is root of 3/16 (1/4 + 1/4)."""
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, HAND)
    z = 0.5 / math.sqrt(3 / 32)
    assert_rows(
        answer(layout, "risk_difference", {"domain": "a"}),
        [
            ("r", 5, 1, 4, 2, 1.0, 0.5, 0.5, z),
            ("r", 5, 2, 0, 2, 0.0, 0.5, -0.5, -z),
            ("r", 5, 0, 4, 4, 1.0, 1.0, 0.0, None),
        ],
    )


def test_outputs_by_rank_by_hand(tmp_path: Path) -> None:
    """Weight times norm: 3 and 3, then 4 and 3. A token with an unknown norm is left out."""
    layout = empty_warehouse(tmp_path / "wh")
    tokens = [
        Token(1, {0: [(2, 0.75), (0, 0.25)]}, outputs={0: [(4.0, 0.5), (12.0, 0.5)]}),
        Token(1, {0: [(1, 0.5), (3, 0.5)]}, outputs={0: [(8.0, 0.25), (6.0, 0.75)]}),
        Token(1, {0: [(1, 0.5), (3, 0.5)]}, outputs={0: [(None, None), (64.0, 1.0)]}),
    ]
    write_run(layout, Run("r", {0: (4, 2)}, [[Prompt(tokens)]]))
    assert_rows(
        answer(layout, "outputs_by_rank", {}),
        [
            ("r", 0, 0, 2, 0.625, 6.0, 1.5, 0.375, (math.sqrt(1 / 2) + 4 / 5) / 2),
            ("r", 0, 1, 2, 0.375, 9.0, 1.5, 0.625, (math.sqrt(1 / 2) + 3 / 5) / 2),
        ],
    )


def test_equal_norms_favour_no_choice(tmp_path: Path) -> None:
    """Identity experts put out their input: the norms of a token are equal, whatever the weights."""
    layout = empty_warehouse(tmp_path / "wh")
    token = Token(1, {0: [(2, 0.5), (0, 0.25), (1, 0.125)]}, outputs={0: [(4.0, 1.0), (4.0, 1.0), (4.0, 1.0)]})
    write_run(layout, Run("r", {0: (4, 3)}, [[Prompt([token])]]))
    assert [row[6] for row in answer(layout, "outputs_by_rank", {})] == [2, 2, 2]


def test_weights_below_zero_have_no_shares(tmp_path: Path) -> None:
    """A share of a sum with both signs is no share: NULL, never NaN; a single weight below zero may cancel out."""
    layout = empty_warehouse(tmp_path / "wh")
    one = [Token(1, {0: [(0, 0.5), (1, -0.25)], 1: [(0, 0.5), (1, -0.25)]}), Token(1, {1: [(1, 0.5), (0, 0.25)]})]
    other = [Token(1, {0: [(0, 0.5), (2, 0.25)], 1: [(0, 0.5), (2, 0.25)]})]
    write_run(layout, Run("r", {0: (3, 2), 1: (3, 2)}, [[Prompt(one, "a"), Prompt(other, "b")]]))
    rows = answer(layout, "domain_divergence", {})
    assert {row[1]: (row[9], row[10]) == (None, None) for row in rows} == {0: True, 1: False}
    assert all(0 <= row[9] <= 1 for row in rows if row[1] == 1)

    listed = answer(layout, "standing_committee", {"min_share": 0.0})
    assert listed
    assert {(row[1], row[7] is None) for row in listed} == {(0, True), (1, False)}


def test_tokens_of_the_other_stack_are_not_dropped(tmp_path: Path) -> None:
    """An encoder's three tokens, one of them dropped, and two that its decoder generates, in one range of positions."""
    layout = empty_warehouse(tmp_path / "wh")
    read = [Token(1, {0: [(0, 1.0)]}), Token(1, {0: [(1, 1.0)]}), Token(1, {})]
    written = [Token(1, {4: [(0, 1.0)]}, "generated"), Token(1, {4: [(1, 1.0)]}, "generated")]
    stacks = {0: "encoder", 4: "decoder"}
    write_run(layout, Run("r", {0: (2, 1), 4: (2, 1)}, [[Prompt([*read, *written])]], stacks=stacks))
    rows = answer(layout, "load_by_position", {})
    assert {row[1]: row[8] for row in rows} == {0: pytest.approx(2 / 3), 4: 1}


@pytest.mark.parametrize("name", ["contrast_domains", "contrast_runs", "specialization_changes"])
def test_equal_differences_are_in_order_of_layer_and_expert(name: str, tmp_path: Path) -> None:
    """Equal differences of shares and of lifts, which differ in the last bits of their floating-point numbers."""
    layout = empty_warehouse(tmp_path / "wh")
    counts = {"a": (2, 8, 5), "b": (5, 2, 8), "c": (8, 5, 2)}
    if name == "specialization_changes":
        counts = {"a": (8, 9, 13), "b": (12, 13, 5), "c": (10, 8, 12)}

    def run(run_id: str, like: str) -> Run:
        chosen = {name: [e for e, n in enumerate(n_E) for _ in range(n)] for name, n_E in counts.items()}
        tokens = {name: [Token(1, {0: [(e, 1.0)], 1: [(2 - e, 1.0)]}) for e in chosen[name]] for name in counts}
        prompts = [Prompt(tokens[name], domain) for domain, name in zip("abc", like, strict=True)]
        return Run(run_id, {0: (3, 1), 1: (3, 1)}, [prompts], {"tokens_key": "t"})

    write_run(layout, run("here", "abc" if name != "contrast_runs" else "aaa"))
    write_run(layout, run("there", "bca" if name != "contrast_runs" else "bbb"))
    values: dict[str, Value] = {
        "contrast_domains": {"domain": "a", "other_domain": "b", "run": "here"},
        "contrast_runs": {"run": "here", "other_run": "there"},
        "specialization_changes": {"run": "here", "other_run": "there", "min_lift": 1.01, "min_share": 0.0},
    }[name]  # type: ignore[assignment]
    rows = answer(layout, name, values)
    place = {"contrast_domains": slice(1, 3), "contrast_runs": slice(0, 2), "specialization_changes": slice(1, 4)}[name]

    def size(row: tuple[Any, ...]) -> float:
        return abs(float(row[7] - row[6] if name == "specialization_changes" else row[-2]))

    assert len({round(size(row), 12) for row in rows}) < len({size(row) for row in rows})
    assert rows == sorted(rows, key=lambda row: (-round(size(row), 12), row[place]))


def test_expert_reuse_stops_at_a_new_context(tmp_path: Path) -> None:
    """Two prompts of one token and of two: one pair, not two; the pairs are those that expert_repetition counts."""
    layout = empty_warehouse(tmp_path / "wh")
    token = Token(1, {0: [(0, 0.5), (1, 0.5)]})
    write_run(layout, Run("r", {0: (4, 2)}, [[Prompt([token]), Prompt([token, token])]]))
    assert_rows(answer(layout, "expert_reuse", {}), [("r", None, 0, 1, 1.0, 1.0, 1.0, 0.5)])


@pytest.mark.parametrize("name", ["domain_divergence", "standing_committee"])
def test_a_run_without_weights(name: str, tmp_path: Path) -> None:
    """Values that depend on weights are NULL, or there is no row."""
    layout = empty_warehouse(tmp_path / "wh")

    def bare(prompt: Prompt) -> Prompt:
        choices: list[dict[int, Choices]] = [
            {layer: [(expert, None) for expert, _ in pairs] for layer, pairs in token.choices.items()}
            for token in prompt.tokens
        ]
        return replace(prompt, tokens=[replace(t, choices=c) for t, c in zip(prompt.tokens, choices, strict=True)])

    write_run(layout, replace(HAND, segments=[[bare(prompt) for prompt in prompts] for prompts in HAND.segments]))
    without = {"domain_divergence": [(*row[:9], None, None) for row in BY_HAND[name]], "standing_committee": []}
    assert_rows(answer(layout, name, {}), without[name])


@pytest.mark.parametrize("name", ["expert_cache", "next_layer_recall", "load_by_position"])
def test_parameters_at_their_edges(name: str, warehouse: tuple[Layout, list[Run]]) -> None:
    layout, _ = warehouse
    if name == "expert_cache":
        every = answer(layout, name, {"run": "007"})
        assert answer(layout, name, {"run": "007", "capacity": 2}) == [row for row in every if row[2] == 2]
        assert answer(layout, name, {"run": "007", "capacity": 99}) == []
        assert {row[3] for row in answer(layout, name, {"run": "007", "prompt_ids": "0,1"})} < {*range(1, 60)}
    elif name == "next_layer_recall":
        everything = answer(layout, name, {"guesses": 99})
        assert {row[5:] for row in everything} == {(1.0, 1.0, 1.0)}
        assert {row[5] for row in answer(layout, name, {"guesses": 0})} == {0.0}
    else:
        assert {row[2] for row in answer(layout, name, {"width": 1000})} == {0}
        assert answer(layout, name, {"width": 0}) == answer(layout, name, {"width": 1})


def test_lru_of_the_tests_by_hand() -> None:
    assert [lru_hits([[0, 1], [1, 2], [0, 2]], capacity) for capacity in (1, 2, 3)] == [0, 2, 3]
