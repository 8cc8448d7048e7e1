"""Under even, independent routing, each query gives the value that its header and docs/papers.md promise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from moewh.warehouse.answer.query import Value
from moewh.warehouse.files.layout import Layout
from tests.support.places import Rows
from tests.support.saved_queries import answer
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, write_run

LAYERS, EXPERTS, TOP_K, PROMPTS, TOKENS = 6, 8, 2, 60, 40
N = PROMPTS * TOKENS


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Six layers of eight experts, top-2; three domains of 20 prompts of 40 tokens, a quarter of them generated."""
    layout = empty_warehouse(tmp_path_factory.mktemp("chance") / "wh")
    rng = np.random.default_rng(11)

    def token(position: int) -> Token:
        chosen_LE = [rng.permutation(EXPERTS)[:TOP_K] for _ in range(LAYERS)]
        choices: dict[int, list[tuple[int, float | None]]] = {
            layer: [(int(e), 0.5 - rank / 4) for rank, e in enumerate(chosen)] for layer, chosen in enumerate(chosen_LE)
        }
        return Token(int(rng.integers(20)), choices, "generated" if position >= 30 else "prompt")

    prompts = [Prompt([token(position) for position in range(TOKENS)], "abc"[n % 3]) for n in range(PROMPTS)]
    write_run(layout, Run("r", dict.fromkeys(range(LAYERS), (EXPERTS, TOP_K)), [prompts[n::6] for n in range(6)]))
    return layout


def mean(rows: Rows, column: int) -> float:
    return float(np.mean([row[column] for row in rows]))


def test_load_violation(layout: Layout) -> None:
    rows = answer(layout, "load_violation", {})
    even = math.sqrt(2 * (EXPERTS - TOP_K) / (math.pi * TOP_K * N))
    assert mean(rows, 4) == pytest.approx(even, rel=0.25)
    assert all(row[3] < row[4] < row[2] < 4 * even for row in rows)


def test_coverage_curve(layout: Layout) -> None:
    assert all(0 <= row[4] - row[3] <= 1 for row in answer(layout, "coverage_curve", {}))


def test_top_expert_share(layout: Layout) -> None:
    """1 / E and k / E, and what the largest of eight adds."""
    rows = answer(layout, "top_expert_share", {})
    spread = math.sqrt((EXPERTS - TOP_K) / (TOP_K * N / 3))
    assert mean(rows, 6) * EXPERTS - 1 == pytest.approx(spread * 1.42, rel=0.25)
    assert mean(rows, 5) == pytest.approx(TOP_K * mean(rows, 6), rel=1e-12)
    assert mean(rows, 7) == pytest.approx(1 / EXPERTS, rel=0.25)
    assert {row[8] for row in rows} <= {4, 5}


INFORMATION = {"choice_information": 2, "position_information": 1, "first_choice_information": 3}
"""The query, and its number of groups of columns (parts, information, chance), from the fifth column on."""


@pytest.mark.parametrize("name", INFORMATION)
def test_information(name: str, layout: Layout) -> None:
    rows = answer(layout, name, {})
    assert mean(rows, 3) == pytest.approx(math.log2(EXPERTS), rel=0.01)
    for about in range(INFORMATION[name]):
        assert mean(rows, 5 + 3 * about) == pytest.approx(mean(rows, 6 + 3 * about), rel=0.45), about


def test_token_information_is_its_chance(layout: Layout) -> None:
    """Over 6 layers and 20 entries the mean is sharp: without the correction for k it would be a sixth too high."""
    rows = answer(layout, "choice_information", {})
    assert mean(rows, 5) == pytest.approx((EXPERTS - TOP_K) * 19 / (2 * TOP_K * N * math.log(2)), rel=0.12)


def test_association(layout: Layout) -> None:
    rows = answer(layout, "expert_token_association", {"most": 1000})
    assert len(rows) == LAYERS * EXPERTS * 20
    z = np.array([row[10] for row in rows])
    assert z.mean() == pytest.approx(0, abs=0.1)
    assert z.std() == pytest.approx(1, abs=0.1)
    assert np.mean([row[8] <= 1 <= row[9] for row in rows]) == pytest.approx(0.95, abs=0.02)
    assert abs(mean(rows, 11)) < 0.02


def test_divergence(layout: Layout) -> None:
    rows = answer(layout, "domain_divergence", {})
    assert mean(rows, 6) == pytest.approx(mean(rows, 8), rel=0.3)
    assert mean(rows, 7) == pytest.approx(mean(rows, 6) / math.log2(EXPERTS), rel=0.02)
    shuffled = answer(layout, "divergence_confidence", {})
    assert mean(shuffled, 5) == pytest.approx(mean(rows, 8), rel=0.15)
    assert mean(shuffled, 8) == pytest.approx(0.5, abs=0.25)


def test_specialization(layout: Layout) -> None:
    rows = answer(layout, "specialization_confidence", {"min_share": 0.0})
    assert np.std([row[11] for row in rows]) == pytest.approx(1, abs=0.15)
    assert np.mean([row[9] <= 1 <= row[10] for row in rows]) > 0.9
    best = answer(layout, "specialization_shuffled", {})
    assert mean(best, 4) == pytest.approx(mean(best, 5), rel=0.05)
    assert mean(best, 8) == pytest.approx(0.5, abs=0.25)


def test_standing_committee(layout: Layout) -> None:
    """An expert is among the first k of each of three domains with probability (k / E)^3: of 48, less than one."""
    assert len(answer(layout, "standing_committee", {})) <= 4
    one_domain = answer(layout, "standing_committee", {"min_share": 0.3})
    expected = LAYERS * EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** 3)
    assert len(one_domain) == pytest.approx(expected, abs=3 * math.sqrt(expected / 2))


@pytest.mark.parametrize(
    ("name", "values", "column"),
    [("prompt_against_generated", {}, 8), ("risk_difference", {"domain": "a", "other_domain": "b"}, 8)],
)
def test_differences(name: str, values: dict[str, Value], column: int, layout: Layout) -> None:
    z = [row[column] for row in answer(layout, name, values)]
    assert np.std(z) == pytest.approx(1, abs=0.3)
    assert np.mean(z) == pytest.approx(0, abs=0.1)


def test_load_by_position(layout: Layout) -> None:
    rows = answer(layout, "load_by_position", {"width": 10})
    assert {row[2] for row in rows} == {0, 10, 20, 30}
    assert mean(rows, 7) == pytest.approx(1, abs=0.01)
    assert np.std([row[7] for row in rows]) == pytest.approx(math.sqrt((EXPERTS - TOP_K) / (TOP_K * N / 4)), rel=0.3)
    assert {row[8] for row in rows} == {1.0}


def test_expert_reuse(layout: Layout) -> None:
    rows = answer(layout, "expert_reuse", {})
    assert mean(rows, 4) == pytest.approx(TOP_K / EXPERTS, rel=0.02)
    assert mean(rows, 6) == pytest.approx(TOP_K / EXPERTS, rel=0.02)
    both, one = 1 / 28, 2 * 6 / 28
    assert mean(rows, 5) == pytest.approx(both + one / 3, rel=0.03)
    assert {row[7] for row in rows} == {TOP_K / EXPERTS}


def test_next_layer_recall(layout: Layout) -> None:
    """C / E', and a little more, because the guesses come from the counts that they are compared with."""
    rows = answer(layout, "next_layer_recall", {"guesses": 3})
    assert {row[7] for row in rows} == {3 / EXPERTS}
    assert mean(rows, 6) == pytest.approx(3 / EXPERTS, rel=0.05)
    assert mean(rows, 6) < mean(rows, 5) < 3 / EXPERTS * 1.15


def test_expert_cache(layout: Layout) -> None:
    for row in answer(layout, "expert_cache", {}):
        assert row[5] == pytest.approx(row[7], abs=0.03)
        assert row[6] == pytest.approx(row[7], abs=0.03)


def test_load_over_segments(layout: Layout) -> None:
    rows = answer(layout, "load_over_segments", {})
    assert {row[3] for row in rows} == {6}
    assert mean(rows, 7) == pytest.approx(1 / EXPERTS, rel=0.01)
    error = math.sqrt((1 - TOP_K / EXPERTS) / (EXPERTS * TOP_K * N / 6))
    largest_of_six = 1.27  # the expected maximum of six standard normals
    assert (mean(rows, 9) - mean(rows, 5)) / 2 == pytest.approx(largest_of_six * error, rel=0.15)


def test_outputs_by_rank(tmp_path: Path) -> None:
    """Norms independent of weights: the mean rank of a choice's norm is (k + 1) / 2."""
    tokens, top_k, rng = 2_000, 4, np.random.default_rng(12)

    def token() -> Token:
        choices: list[tuple[int, float | None]] = [
            (int(e), 0.5 - rank / 8) for rank, e in enumerate(rng.permutation(EXPERTS)[:top_k])
        ]
        outputs: list[tuple[float | None, float | None]] = [(float(norm), 0.5) for norm in rng.gamma(2, size=top_k)]
        return Token(1, {0: choices}, outputs={0: outputs})

    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, Run("r", {0: (EXPERTS, top_k)}, [[Prompt([token() for _ in range(tokens)])]]))
    error = math.sqrt((top_k**2 - 1) / 12 / tokens)
    ranks = [row[6] for row in answer(layout, "outputs_by_rank", {})]
    assert ranks == pytest.approx([(top_k + 1) / 2] * top_k, abs=4 * error)
