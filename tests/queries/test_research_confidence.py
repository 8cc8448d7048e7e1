"""Results with their uncertainty: prompts shuffled and halved, errors over prompts, bounds of lifts."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse
from tests.support.brute_literature import divergence, loads
from tests.support.places import Place, Rows, assert_rows, assert_rows_in_any_order, routed
from tests.support.saved_queries import answer
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_run, random_warehouse, word, write_run

PRIME = 2**31 - 1


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    return random_warehouse(tmp_path_factory.mktemp("confidence") / "wh")


def prompts_of(run: Run) -> list[Prompt]:
    return [prompt for segment in run.segments for prompt in segment]


def dealt(run: Run, shuffle: int) -> list[str | None]:
    """Return each prompt's domain in a shuffle, as the header of shuffled_domains defines it."""

    def number(prompt_id: int) -> tuple[int, int]:
        x = (48271 * prompt_id + 69621 * shuffle + 11) % PRIME
        x = (x * x + 16807 * shuffle + prompt_id) % PRIME
        return (x * x + 69621 * x) % PRIME, prompt_id

    given: list[str | None] = [None] * len(prompts_of(run))
    for domain, prompt_id in zip(
        [prompt.domain for prompt in prompts_of(run)], sorted(range(len(given)), key=number), strict=True
    ):
        given[prompt_id] = domain
    return given


def by_domain(run: Run, layer: int, given: list[str | None]) -> dict[str | None, list[Place]]:
    """Return the tokens with rows at a layer, by the domain assigned to their prompt."""
    chosen = routed(run, layer)
    return {d: [p for p in chosen if given[p.prompt_id] == d] for d in {given[p.prompt_id] for p in chosen}}


def shares(run: Run, layer: int, chosen: list[Place]) -> np.ndarray:
    return np.array(loads(run, layer, chosen), np.float64) / (len(chosen) * run.layers[layer][1])


def p_value(real: float, shuffled: list[float]) -> float:
    return (1 + sum(value >= real - 1e-12 for value in shuffled)) / (1 + len(shuffled))


# ------------------------------------------------------------------------------------------ by hand

# One layer of two experts, top-1; four prompts of two tokens. Domain a has expert 0 in three of four tokens, b in one.
HAND = Run(
    "r",
    {0: (2, 1)},
    [
        [
            Prompt([Token(1, {0: [(expert, 1.0)]}) for expert in chosen], domain)
            for domain, chosen in [("a", (0, 0)), ("a", (0, 1)), ("b", (1, 1)), ("b", (1, 0))]
        ]
    ],
)


def test_divergence_confidence_by_hand(tmp_path: Path) -> None:
    """Three shuffles: the true groups, the two exchanged, and prompts 1 and 3, which do not differ."""
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, HAND)
    groups = [{p for p, domain in enumerate(dealt(HAND, shuffle)) if domain == "a"} for shuffle in (1, 2, 3)]
    assert groups == [{0, 1}, {2, 3}, {1, 3}]
    real = 1 - (2 - 0.75 * math.log2(3))
    assert_rows(
        answer(layout, "divergence_confidence", {"shuffles": 3}),
        [("r", 0, one, other, real, real * 2 / 3, real, 3, 3 / 4) for one, other in ("ab", "ba")],
    )


def test_specialization_confidence_by_hand(tmp_path: Path) -> None:
    """Of 2 and 1 tokens where 1.5 are expected: error^2 = 2 / 1 * (0.25 + 0.25) / 4^2, a quarter squared.

    One half has the first prompt of each domain: expert 0 has all tokens of a there and half of all. In the other it
    has half of both.
    """
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, HAND)
    high, low, z = (0.75, 1.5, 0.52, 2.48), (0.25, 0.5, -0.48, 1.48), math.sqrt(2)

    def row(
        domain: str, expert: int, tokens: int, shares: tuple[float, ...], z: float, *halves: float
    ) -> tuple[Any, ...]:
        share, lift, least, most = shares
        return ("r", domain, 0, expert, 2, tokens, share, 0.5, lift, least, most, z, *halves)

    assert_rows(
        answer(layout, "specialization_confidence", {}),
        [
            row("a", 0, 3, high, z, 2.0, 1.0),
            row("a", 1, 1, low, -z, 0.0, 1.0),
            row("b", 1, 3, high, z, 2.0, 1.0),
            row("b", 0, 1, low, -z, 0.0, 1.0),
        ],
    )


# ------------------------------------------------------------------------------------------ against plain Python


def test_divergence_confidence_equals_plain_python(warehouse: tuple[Layout, list[Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = []
    for run in runs:
        truth = [prompt.domain for prompt in prompts_of(run)]
        for layer in run.layers:
            dealings = [by_domain(run, layer, given) for given in (truth, *(dealt(run, s) for s in range(1, 7)))]
            for a in dealings[0]:
                for b in dealings[0]:
                    if a != b:
                        both = [of for of in dealings if a in of and b in of]
                        real, *others = [
                            divergence(shares(run, layer, of[a]), shares(run, layer, of[b])) for of in both
                        ]
                        chance = (sum(others) / len(others), max(others), len(others), p_value(real, others))
                        expected.append((run.run_id, layer, a, b, real, *chance))
    assert_rows_in_any_order(answer(layout, "divergence_confidence", {"shuffles": 6}), expected)
    some = answer(layout, "divergence_confidence", {"shuffles": 6, "run": "step-1", "layer": 3})
    assert_rows_in_any_order(some, [row for row in expected if row[:2] == ("step-1", 3)])


def test_specialization_shuffled_equals_plain_python(warehouse: tuple[Layout, list[Run]]) -> None:
    layout, runs = warehouse

    def best(run: Run, layer: int, of: dict[str | None, list[Place]], domain: str | None) -> tuple[float, int]:
        mine, overall = shares(run, layer, of[domain]), shares(run, layer, routed(run, layer))
        enough = [e for e in range(len(mine)) if mine[e] * run.layers[layer][1] >= 0.2 - 1e-12]
        return max((round(float(mine[e] / overall[e]), 12), -e) for e in enough)

    expected: Rows = []
    for run in runs:
        truth = [prompt.domain for prompt in prompts_of(run)]
        for layer in run.layers:
            real, *others = [by_domain(run, layer, given) for given in (truth, *(dealt(run, s) for s in range(1, 5)))]
            for domain in real:
                lift, expert = best(run, layer, real, domain)
                chance = [best(run, layer, of, domain)[0] for of in others if domain in of]
                mean = sum(chance) / len(chance)
                found = (-expert, lift, mean, max(chance), len(chance), p_value(lift, chance))
                expected.append((run.run_id, layer, domain, *found))
    got = answer(layout, "specialization_shuffled", {"shuffles": 4, "min_share": 0.2})
    assert_rows_in_any_order(got, expected)


def test_specialization_confidence_equals_plain_python(warehouse: tuple[Layout, list[Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = [row for run in runs for layer in run.layers for row in confidence(run, layer)]
    assert any(None in row[8:] for row in expected)
    assert sum(row[12] is not None for row in expected) > 50
    assert_rows_in_any_order(answer(layout, "specialization_confidence", {"min_share": 0.0}), expected, 1e-7)
    some = answer(layout, "specialization_confidence", {"run": "step-30", "layer": 3})
    wanted = [row for row in expected if row[0] == "step-30" and row[2] == 3 and row[6] >= 0.1]
    assert_rows_in_any_order(some, wanted, 1e-7)
    assert [round(row[9], 9) for row in some if row[1] == "code"] == sorted(
        (round(row[9], 9) for row in some if row[1] == "code"), reverse=True
    )


def confidence(run: Run, layer: int) -> Rows:
    """The rows of one layer, from a table of tokens by prompt and expert, zeros included."""
    prompts = prompts_of(run)
    counts_PE = np.array([loads(run, layer, of_prompt(run, layer, n)) for n in range(len(prompts))], np.float64)
    tokens_P = counts_PE.sum(1) / run.layers[layer][1]
    a_P = halves(prompts)
    has_P = tokens_P > 0
    rows: Rows = []
    for domain in {prompt.domain for prompt, has in zip(prompts, has_P, strict=True) if has}:
        mine_P = np.array([prompt.domain == domain for prompt in prompts])
        for expert in range(run.layers[layer][0]):
            n_P = counts_PE[:, expert]
            if not n_P[mine_P].sum():
                continue
            share, error = ratio(n_P[mine_P & has_P], tokens_P[mine_P & has_P])
            overall = n_P.sum() / tokens_P.sum()
            other, other_error = ratio(n_P[~mine_P & has_P], tokens_P[~mine_P & has_P])
            spread = None if error is None or other_error is None else math.hypot(error, other_error)
            z = (share - other) / spread if spread and spread > 1e-9 else None
            low, high = (None, None) if error is None else ((share + s * 1.96 * error) / overall for s in (-1, 1))
            halved = [lift(n_P, tokens_P, mine_P, half_P) for half_P in (a_P, ~a_P)]
            about = (run.run_id, domain, layer, expert, int((mine_P & has_P).sum()), int(n_P[mine_P].sum()))
            rows.append((*about, float(share), float(overall), float(share / overall), low, high, z, *halved))
    return rows


@pytest.mark.parametrize(("tokens", "chosen"), [(13, 2), (61, 11), (61, 22), (61, 2)])
def test_prompts_with_equal_shares_have_no_error(tokens: int, chosen: int, tmp_path: Path) -> None:
    """Rounding leaves no error of 1e-8, and no z of 1e8: both groups of prompts have equal shares within."""
    layout = empty_warehouse(tmp_path / "wh")
    mine = [Token(1, {0: [(0 if n < chosen else 1, 1.0)]}) for n in range(tokens)]
    others = [Token(1, {0: [(n % 3, 1.0)]}) for n in range(9)]
    prompts = [Prompt(mine, "a"), Prompt(mine, "a"), *[Prompt(others, "b")] * 3]
    write_run(layout, Run("r", {0: (3, 1)}, [prompts]))
    rows = answer(layout, "specialization_confidence", {"min_share": 0.0})
    assert len(rows) == 5
    for row in rows:
        assert row[8] == row[9] == row[10]
        assert row[11] is None


def of_prompt(run: Run, layer: int, prompt_id: int) -> list[Place]:
    return [place for place in routed(run, layer) if place.prompt_id == prompt_id]


def ratio(n_P: np.ndarray, tokens_P: np.ndarray) -> tuple[float, float | None]:
    """A ratio of sums over prompts and its standard error; None for a single prompt."""
    share = n_P.sum() / tokens_P.sum()
    if len(n_P) < 2:
        return share, None
    residuals = ((n_P - share * tokens_P) ** 2).sum() * len(n_P) / (len(n_P) - 1)
    return share, math.sqrt(residuals) / tokens_P.sum()


def lift(n_P: np.ndarray, tokens_P: np.ndarray, mine_P: np.ndarray, half_P: np.ndarray) -> float | None:
    """The lift within half of the prompts."""
    if not tokens_P[mine_P & half_P].sum() or not n_P[half_P].sum():
        return None
    share = n_P[mine_P & half_P].sum() / tokens_P[mine_P & half_P].sum()
    return float(share / (n_P[half_P].sum() / tokens_P[half_P].sum()))


def halves(prompts: list[Prompt]) -> np.ndarray:
    """Which prompts are in the first half: the odd ones of their domain, in order of a number made of their ids."""
    first = np.zeros(len(prompts), np.bool_)
    for domain in {prompt.domain for prompt in prompts}:
        mine = [n for n, prompt in enumerate(prompts) if prompt.domain == domain]
        mine.sort(key=lambda n: (((48271 * n + 11) % PRIME) ** 2 % PRIME, n))
        first[mine[::2]] = True
    return first


# ------------------------------------------------------------------------------------------ shuffles are shuffles


def test_shuffles_deal_every_domain_to_every_prompt(tmp_path: Path) -> None:
    """300 shuffles of 20 prompts, five of them `a`: each prompt gets it in a quarter of them, neighbours apart."""
    layout = empty_warehouse(tmp_path / "wh")
    prompts = [Prompt([Token(1, {0: [(0, 1.0)]})], "a" if n < 5 else "b") for n in range(20)]
    write_run(layout, Run("r", {0: (2, 1)}, [prompts]))
    with open_warehouse(layout) as connection:
        connection.execute("set variable shuffles = 300")
        rows = connection.execute("select shuffle, prompt_id, domain from shuffled_domains").fetchall()
    given = np.zeros((301, 20), np.bool_)
    for shuffle, prompt_id, domain in rows:
        given[shuffle, prompt_id] = domain == "a"
    assert len(rows) == 301 * 20
    assert given[0].tolist() == [True] * 5 + [False] * 15
    assert (given.sum(1) == 5).all()
    expected, error = 300 / 4, math.sqrt(300 * 3 / 16)
    assert np.abs(given[1:].sum(0) - expected).max() < 4 * error
    pairs = (given[1:].T.astype(np.int64) @ given[1:].astype(np.int64))[np.triu_indices(20, 1)]
    assert pairs.mean() == pytest.approx(300 * 5 * 4 / (20 * 19), rel=1e-12)
    assert pairs.std() < 1.5 * math.sqrt(300 / 19)
    assert len({tuple(row) for row in given.tolist()}) > 290


@pytest.mark.parametrize("name", ["divergence_confidence", "specialization_shuffled"])
def test_prompts_without_routed_tokens_are_not_shuffled(name: str, tmp_path: Path) -> None:
    """Empty prompts of a domain, of special tokens alone or never routed: random groups stay as small as the domain."""
    layout = empty_warehouse(tmp_path / "wh")
    whole = random_run("whole", 3, {0: (6, 2)}, 12)
    special = Token(1, {0: [(0, 0.5), (1, 0.5)]}, "special")
    nothing = [Prompt([], "code"), Prompt([special], "code"), Prompt([Token(1, {})], "code")]
    write_run(layout, whole)
    write_run(layout, replace(whole, run_id="padded", segments=[*whole.segments, nothing * 10]))
    plain, padded = ([row[1:] for row in answer(layout, name, {"run": run})] for run in ("whole", "padded"))
    assert plain
    assert_rows(padded, plain)


def test_many_shuffles_are_the_first_ones_and_more(warehouse: tuple[Layout, list[Run]]) -> None:
    with open_warehouse(warehouse[0]) as connection:
        few, more = (
            set(connection.execute(f"set variable shuffles = {n}; from shuffled_domains").fetchall()) for n in (3, 6)
        )
    assert few < more
    assert {row[1] for row in more} == {*range(7)}


# ------------------------------------------------------------------------------------------ what is real


def planted(*, real: bool) -> Run:
    """60 prompts of 30 tokens, ten layers of eight experts, top-2. At each layer, each prompt has its own favourite,
    an expert from 0 to 5; with `real`, expert 6 is the favourite of every prompt in domain `a`.
    """
    rng = np.random.default_rng(3)
    made = []
    for n in range(60):
        domain = "a" if n % 2 else "b"
        favourites = [6 if real and domain == "a" else int(rng.integers(6)) for _ in range(10)]
        tokens = []
        for _ in range(30):
            choices: dict[int, list[tuple[int, float | None]]] = {}
            for layer, favourite in enumerate(favourites):
                others = [int(e) for e in rng.permutation(8) if e != favourite]
                pair = [favourite, others[0]] if rng.random() < 0.9 else others[:2]
                choices[layer] = [(pair[0], 0.5), (pair[1], 0.25)]
            tokens.append(Token(int(rng.integers(5)), choices))
        made.append(Prompt(tokens, domain))
    return Run("r", dict.fromkeys(range(10), (8, 2)), [made])


@pytest.mark.parametrize("real", [True, False])
def test_prompts_that_are_alike_within_are_no_evidence(real: bool, tmp_path: Path) -> None:
    """900 tokens per domain, but only 30 prompts: counting tokens mistakes the prompts' favourites for the domain's."""
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, planted(real=real))
    by_tokens = np.array([row[8] for row in answer(layout, "risk_difference", {"domain": "a"})])
    rows = [row for row in answer(layout, "specialization_confidence", {"min_share": 0.0}) if row[1] == "a"]
    best = [row for row in answer(layout, "specialization_shuffled", {}) if row[2] == "a"]
    divergences = [row for row in answer(layout, "divergence_confidence", {}) if row[2] == "a"]
    by_prompts = np.array([row[11] for row in rows])
    if real:
        favourite = [row for row in rows if row[3] == 6]
        assert [row[3] for row in best] == [6] * 10
        assert min(row[9] for row in favourite) > 1.3
        assert min(row[11] for row in favourite) > 10
        assert min(min(row[12:]) for row in favourite) > 1.3
        assert {row[8] for row in best + divergences} == {1 / 21}
    else:
        assert by_tokens.std() > 2.3
        assert by_prompts.std() == pytest.approx(1, abs=0.2)
        covered = np.mean([row[9] <= 1 <= row[10] for row in rows])
        assert covered > 0.9
        for some in (best, divergences):
            p = np.array([row[8] for row in some])
            assert p.mean() == pytest.approx(0.5, abs=0.3)
            assert (p < 0.05).sum() <= 3
            shuffled = np.mean([row[4] / row[5] for row in some])
            assert shuffled == pytest.approx(1, abs=0.3)


def test_a_lift_over_few_tokens_comes_after_one_over_many(tmp_path: Path) -> None:
    """Entry 1: three of three; entry 2: 270 of 300. The second has the greater lower bound."""
    layout = empty_warehouse(tmp_path / "wh")
    chosen = [(1, 0)] * 3 + [(2, 0)] * 270 + [(2, 1)] * 30 + [(3, 1)] * 700
    write_run(layout, Run("r", {0: (2, 1)}, [[Prompt([Token(v, {0: [(e, 1.0)]}) for v, e in chosen])]]))
    first, second = answer(layout, "expert_token_association", {"layer": 0, "expert": 0})
    assert (first[3], second[3]) == (2, 1)
    assert first[7] < second[7]
    assert first[8] > second[8]
    assert first[10] > 20
    assert second[10] < 3


def test_association_parameters(warehouse: tuple[Layout, list[Run]]) -> None:
    layout, _ = warehouse
    every = answer(layout, "expert_token_association", {"most": 1000, "layer": 3})
    for values, column in (({"expert": 4}, 2), ({"token": word(4)}, 4)):
        wanted = next(iter(values.values()))
        some = answer(layout, "expert_token_association", {"most": 1000, "layer": 3, **values})
        assert some == [row for row in every if row[column] == wanted]
        assert some
    few = answer(layout, "expert_token_association", {"most": 2, "layer": 3})
    assert len(few) < len(every)
    for run_id, expert in {(row[0], row[2]) for row in every}:
        mine = [row for row in every if row[0] == run_id and row[2] == expert]
        assert [row for row in few if row[0] == run_id and row[2] == expert] == mine[:2]
        assert [round(row[8], 9) for row in mine] == sorted((round(row[8], 9) for row in mine), reverse=True)
