"""Every saved query, compared with a plain computation on random routing, and its parameters' defaults."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest

from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.parameters import KINDS, about_no_rows, kinds_of
from moewh.warehouse.answer.query import Query, Value, find_query, saved_names
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.check import shipped_checks
from moewh.warehouse.views.opening import open_warehouse
from tests.support.brute_force import brute_domain_specialization, brute_expert_load, brute_load_balance, confidence
from tests.support.places import Rows, assert_rows, places
from tests.support.saved_queries import answer, values_of
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_warehouse, word, write_run


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, dict[str, Run]]:
    layout, runs = random_warehouse(tmp_path_factory.mktemp("saved") / "wh")
    return layout, {run.run_id: run for run in runs}


def descending(value: float) -> float:
    """A sort key, rounded so that two ways to compute a ratio sort alike."""
    return -round(value, 12)


# ------------------------------------------------------------------------------------------ every file


@pytest.mark.parametrize("name", saved_names())
def test_saved_query_explains_itself(name: str) -> None:
    query = queries.find_query(name)
    first, *rest = query.header.splitlines()
    assert first.startswith(f"{name}: ")
    assert first.endswith((".", "?"))
    assert any(line.startswith("One row per ") for line in rest)
    parameters = query.header.partition("Parameters")[2]
    assert kinds_of(query).keys() == query.variables
    optional = query.variables - query.required
    assert not optional or "default" in parameters or "optional" in parameters


@pytest.mark.parametrize("name", saved_names())
def test_a_threshold_that_was_not_given_explains_an_answer_without_rows(name: str) -> None:
    query = queries.find_query(name)
    thresholds = dict(re.findall(r">=? coalesce\(getvariable\('(\w+)'\)(?:::double)?, ([\d.]+)\)", query.code))
    said = about_no_rows(query, {})
    assert re.findall(r"(\w+)=([\d.]*\d)", said) == list(thresholds.items())
    assert f"`moewh query {name} --describe`" in said
    assert not re.search(r"\w=\d", about_no_rows(query, thresholds))


@pytest.mark.parametrize("query", [*map(queries.find_query, saved_names()), *shipped_checks()], ids=lambda q: q.source)
def test_text_is_compared_as_text_in_a_plain_shell_too(query: Query) -> None:
    """A variable that was set to a number must not convert a text column to numbers."""
    for name, kind in kinds_of(query).items():
        if KINDS[kind].type == "VARCHAR":
            uses = re.findall(rf"getvariable\('{name}'\)(.{{0,12}})", query.code_read)
            assert uses
            assert all(use.startswith(("::varchar", " is null", " is not null")) for use in uses), uses


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return empty_warehouse(tmp_path_factory.mktemp("empty") / "wh")


@pytest.mark.parametrize("name", saved_names())
def test_saved_query_needs_what_it_says(name: str, empty: Layout) -> None:
    """Over an empty warehouse: no rows or an error that nothing is there, and one clear error for a missing value."""
    query = queries.find_query(name)
    known: dict[str, Value] = {"layer": 0, "other_layer": 0, "expert": 0, "placement": "0:0:0"}
    values = {variable: known.get(variable, "x") for variable in query.required}
    if values.keys() - {"placement"}:
        with pytest.raises(MoewhError, match=r"there is no .*Runs: none\.$"):
            answer(empty, name, values)
    else:
        assert answer(empty, name, values) == []
    for variable in query.required:
        with pytest.raises(Exception, match=f"needs the parameter {variable}"):
            answer(empty, name, {other: value for other, value in values.items() if other != variable})


EDGES: dict[str, tuple[Value, ...]] = {
    "count": (0, 1, 2**31 - 1),
    "whole number": (1, 2**31 - 1),
    "share": (0.0, 1.0),
    "ratio": (0.0, 1e308),
}
"""Kind of parameter → its least and greatest values."""


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        (name, parameter, value)
        for name in saved_names()
        for parameter, kind in kinds_of(find_query(name)).items()
        for value in EDGES.get(kind, ())
    ],
)
def test_every_value_of_a_kind_is_answered(
    name: str, parameter: str, value: Value, warehouse: tuple[Layout, dict[str, Run]]
) -> None:
    for row in answer(warehouse[0], name, {**values_of(name), parameter: value}):
        assert all(not isinstance(cell, float) or math.isfinite(cell) for cell in row), row


def test_a_parameter_does_not_outlive_its_query(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    query = queries.find_query("load_drift")
    with open_warehouse(warehouse[0]) as connection:
        for values, layers in (({"layer": 3}, {3}), ({}, {0, 3, 4})):
            found = queries.prepare(connection, query, values)
            assert found is not None
            assert {row[2] for row in found.execute().fetchall()} == layers


# ------------------------------------------------------------------------------------------ tokens and contexts


@pytest.mark.parametrize("values", [{}, {"run": "mixed"}, {"layer": 3}], ids=str)
def test_token_experts(values: dict[str, Value], warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = []
    for run_id in sorted(runs):
        for layer, (experts, _) in sorted(runs[run_id].layers.items()):
            rows = []
            tokens = [p.token for p in places(runs[run_id]) if p.token.experts(layer)]
            mine = [t for t in tokens if t.vocab_id == 4]
            for expert in range(experts):
                n_xi, n_i = (sum(expert in t.experts(layer) for t in some) for some in (mine, tokens))
                if n_xi:
                    share, lift = n_xi / len(mine), n_xi * len(tokens) / (len(mine) * n_i)
                    rows.append((run_id, layer, expert, 4, n_xi, share, lift))
            if run_id == values.get("run", run_id) and layer == values.get("layer", layer):
                expected += sorted(rows, key=lambda row: (-row[4], row[2]))
    assert expected
    assert_rows(answer(layout, "token_experts", {"token": word(4), **values}), expected)


@pytest.mark.parametrize(("width", "strongest"), [(None, None), (2, 5)])
def test_expert_contexts(width: int | None, strongest: int | None, warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    given = {"width": width, "strongest": strongest}
    values: dict[str, Value] = {name: value for name, value in given.items() if value is not None}
    layer, expert, reach = 3, 4, width or 10
    expected: Rows = []
    for run_id in sorted(runs):
        found = []
        for place in places(runs[run_id]):
            for rank, (chosen, weight) in enumerate(place.token.choices.get(layer, [])):
                if chosen == expert:
                    near = [p for p in places(runs[run_id]) if p.prompt_id == place.prompt_id]
                    near = [p for p in near if abs(p.position - place.position) <= reach]
                    before = "".join(word(p.token.vocab_id) for p in near if p.position < place.position)
                    after = "".join(word(p.token.vocab_id) for p in near if p.position > place.position)
                    text = word(place.token.vocab_id)
                    found.append((run_id, place.token_id, place.domain, rank, weight, before, text, after))
        expected += sorted(found, key=lambda row: (-(row[4] or 0), row[1]))[: strongest or 20]
    assert len(expected) > 5
    assert_rows(answer(layout, "expert_contexts", {"layer": layer, "expert": expert, **values}), expected)


# ------------------------------------------------------------------------------------------ contrasts and loads


def test_contrast_domains(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = []
    for run_id in sorted(runs):
        rows = {row[1:4]: row for row in brute_domain_specialization(runs[run_id])}
        pairs = [(rows[key], rows["prose", *key[1:]]) for key in rows if key[0] == "code"]
        expected += sorted(
            (
                (run_id, *here[2:4], here[4], there[4], here[5], there[5], here[5] - there[5], ratio(here[5], there[5]))
                for here, there in pairs
            ),
            key=lambda row: (descending(abs(row[7])), row[1], row[2]),
        )
    got = answer(layout, "contrast_domains", {"domain": "code", "other_domain": "prose"})
    assert_rows(sorted(got, key=contrast_order), expected)
    assert [abs(row[7]) for row in got if row[0] == "007"] == sorted(
        (abs(row[7]) for row in got if row[0] == "007"), reverse=True
    )
    some = answer(layout, "contrast_domains", {"domain": "code", "other_domain": "prose", "run": "007", "layer": 2})
    assert some == [row for row in got if row[:2] == ("007", 2)]


def ratio(one: float, other: float) -> float | None:
    return one / other if other else None


def contrast_order(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return row[0], descending(abs(row[7])), row[1], row[2]


def test_contrast_runs(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    here_rows = {row[1:3]: row for row in brute_expert_load(runs["step-1"])}
    there_rows = {row[1:3]: row for row in brute_expert_load(runs["step-30"])}
    pairs = [(key, here_rows[key], there_rows[key]) for key in here_rows]
    expected = [
        (*key, here[3], there[3], here[4], there[4], here[4] - there[4], ratio(here[4], there[4]))
        for key, here, there in pairs
    ]
    expected.sort(key=lambda row: (descending(abs(row[6])), row[0], row[1]))
    assert_rows(answer(layout, "contrast_runs", {"run": "step-1", "other_run": "step-30"}), expected)


def test_load_matrix_is_the_load_in_order(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    rows = answer(layout, "load_matrix", {"run": "wide.v-1"})
    loads = {row[1:3]: row[3] for row in brute_expert_load(runs["wide.v-1"])}
    assert [(row[0], row[1]) for row in rows] == [("wide.v-1", 0), ("wide.v-1", 1)]
    assert [json.loads(row[2]) for row in rows] == [[loads[layer, e] for e in range(16)] for layer in (0, 1)]
    assert len(answer(layout, "load_matrix", {})) == sum(len(run.layers) for run in runs.values())


# ------------------------------------------------------------------------------------------ across layers


def entropy(shares: list[float]) -> float:
    return -sum(share * math.log2(share) for share in shares if share)


def test_layer_information(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = []
    for run_id in sorted(runs):
        for here, there in pairwise(sorted(runs[run_id].layers)):
            tokens = [p.token for p in places(runs[run_id]) if p.token.experts(here) and p.token.experts(there)]
            n = len(tokens)
            firsts = [(t.experts(here)[0], t.experts(there)[0]) for t in tokens]
            joint = entropy([count / n for count in Counter(firsts).values()])
            sides = [Counter(pair[side] for pair in firsts) for side in (0, 1)]
            one, two = (entropy([count / n for count in side.values()]) for side in sides)
            chance = (len(sides[0]) - 1) * (len(sides[1]) - 1) / (2 * n * math.log(2))
            information = one + two - joint
            normalized = information / min(one, two) if min(one, two) else None
            expected.append((run_id, here, there, n, information, one, two, normalized, chance))
    assert_rows(answer(layout, "layer_information", {}), expected)
    assert_rows(answer(layout, "layer_information", {"run": "007"}), [row for row in expected if row[0] == "007"])


def test_layer_information_by_hand(tmp_path: Path) -> None:
    """A layer that determines the next shares one bit with it; an independent one shares none."""
    layout = empty_warehouse(tmp_path / "wh")
    tokens = [Token(1, {0: [(a, 1.0)], 1: [(a, 1.0)], 2: [(b, 1.0)]}) for a, b in [(0, 0), (1, 0), (0, 1), (1, 1)] * 2]
    write_run(layout, Run("r", dict.fromkeys(range(3), (2, 1)), [[Prompt(tokens)]]))
    chance = 1 / (2 * 8 * math.log(2))
    expected: Rows = [("r", 0, 1, 8, 1.0, 1.0, 1.0, 1.0, chance), ("r", 1, 2, 8, 0.0, 1.0, 1.0, 0.0, chance)]
    assert_rows(answer(layout, "layer_information", {}), expected)


def test_layer_pair_jaccard(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = []
    for run_id in sorted(run_id for run_id in runs if {0, 5} <= runs[run_id].layers.keys()):
        expected += jaccards(runs[run_id], 5, 0)
    got = answer(layout, "layer_pair_jaccard", {"layer": 5, "other_layer": 0})
    assert expected
    assert_rows(sorted(got, key=lambda row: row[:3]), sorted(expected, key=lambda row: row[:3]))
    assert [row[4] for row in got] == sorted((row[4] for row in got), reverse=True)


def jaccards(run: Run, layer: int, other: int) -> Rows:
    sets = [(p.token.experts(layer), p.token.experts(other)) for p in places(run)]
    sets = [(here, there) for here, there in sets if here and there]
    rows = []
    for i in range(run.layers[layer][0]):
        for j in range(run.layers[other][0]):
            both = sum(i in here and j in there for here, there in sets)
            n_i, n_j = sum(i in here for here, _ in sets), sum(j in there for _, there in sets)
            if both:
                rows.append((run.run_id, i, j, both, both / (n_i + n_j - both), both * len(sets) / (n_i * n_j)))
    return rows


@pytest.mark.parametrize("domain", [None, "code"])
def test_expert_paths_and_their_coverage(domain: str | None, warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    values: dict[str, Value] = {"domain": domain} if domain else {}
    expected, covered = [], []
    for run_id in sorted(runs):
        layers = sorted(runs[run_id].layers)
        paths = Counter(
            "-".join(str(p.token.experts(layer)[0]) for layer in layers)
            for p in places(runs[run_id])
            if all(p.token.experts(layer) for layer in layers) and domain in (None, p.domain)
        )
        n = paths.total()
        ranked = sorted(paths.items(), key=lambda item: (-item[1], item[0]))
        sums = list(accumulate(count for _, count in ranked))
        expected += [
            (run_id, path, count, count / n, total / n)
            for (path, count), total in list(zip(ranked, sums, strict=True))[:7]
        ]
        for share in (0.5, 0.8, 0.95):
            least = next(number for number, total in enumerate(sums, 1) if total >= share * n)
            covered.append((run_id, share, least, len(ranked), n))
    assert_rows(answer(layout, "expert_paths", {"most": 7, **values}), expected)
    assert_rows(answer(layout, "expert_path_coverage", values), covered)


# ------------------------------------------------------------------------------------------ over training


def test_saturation_over_training_is_in_order(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, _ = warehouse
    rows = answer(layout, "saturation_over_training", {"layer": 3})
    assert [row[:6] for row in rows] == [("trained", "step-30", 3, step, None, f"step-{step}") for step in (1, 20, 30)]
    assert rows[0][7] < rows[1][7] < rows[2][7] == 1.0
    assert {row[0] for row in answer(layout, "saturation_over_training", {"series": "trained"})} == {"trained"}


def test_changed_tokens(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    one, two = runs["step-1"], runs["step-30"]
    expected: Rows = []
    for here, there in zip(places(one), places(two), strict=True):
        layers = [n for n in one.layers if here.token.experts(n) and there.token.experts(n)]
        if layers:
            shared = sum(len({*here.token.experts(n)} & {*there.token.experts(n)}) for n in layers)
            kept = shared / sum(one.layers[n][1] for n in layers)
            about = (here.token_id, here.prompt_id, here.position, here.domain, word(here.token.vocab_id))
            expected.append((*about, len(layers), kept))
    expected.sort(key=lambda row: (round(row[6], 12), row[0]))
    asked: dict[str, Value] = {"run": "step-1", "other_run": "step-30"}
    assert_rows(answer(layout, "changed_tokens", asked), expected[:50])
    assert_rows(answer(layout, "changed_tokens", {**asked, "most": 3}), expected[:3])
    with pytest.raises(MoewhError, match="do not have the same tokens"):
        answer(layout, "changed_tokens", {"run": "step-1", "other_run": "007"})


def test_specialization_changes(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    here_rows = {row[1:4]: row for row in brute_domain_specialization(runs["step-30"])}
    there_rows = {row[1:4]: row for row in brute_domain_specialization(runs["step-1"])}

    def special(row: tuple[Any, ...]) -> bool:
        return (row[7] or 0) >= 1.05 and row[5] >= 0.2

    pairs = [(key, here, there_rows[key]) for key, here in here_rows.items()]
    expected = [
        ("appeared" if special(here) else "vanished", *key, there[5], here[5], there[7] or 0.0, here[7] or 0.0)
        for key, here, there in pairs
        if special(here) != special(there)
    ]
    assert {row[0] for row in expected} == {"appeared", "vanished"}
    asked: dict[str, Value] = {"run": "step-30", "other_run": "step-1", "min_lift": 1.05, "min_share": 0.2}
    got = answer(layout, "specialization_changes", asked)
    assert_rows(sorted(got, key=str), sorted(expected, key=str))
    changes = [abs(row[7] - row[6]) for row in got]
    assert changes == sorted(changes, reverse=True)


def test_load_drift(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    steps = ["step-1", "step-20", "step-30"]
    loads = {name: {row[1:3]: row[4] for row in brute_expert_load(runs[name])} for name in steps}
    balance = {(name, row[1]): row for name in steps for row in brute_load_balance(runs[name])}
    expected: Rows = []
    for layer, (experts, _) in sorted(runs["step-30"].layers.items()):
        for before, name in zip([None, *steps], steps, strict=False):
            moved = before and sum(abs(loads[name][layer, e] - loads[before][layer, e]) for e in range(experts)) / 2
            about = ("trained", "step-30", layer, runs[name].fields["train_step"], name, before, moved)
            expected.append((*about, balance[name, layer][4], balance[name, layer][7]))
    assert_rows(answer(layout, "load_drift", {}), expected)
    assert_rows(answer(layout, "load_drift", {"layer": 3}), [row for row in expected if row[2] == 3])


# ------------------------------------------------------------------------------------------ confidence


def test_confidence_by_expert_and_domain(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    run = runs["step-20"]
    by_expert: dict[tuple[Any, ...], Rows] = defaultdict(list)
    by_domain: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for place in places(run):
        for layer, logits in place.token.logits.items():
            numbers = confidence(logits, run.scoring[layer], run.selection_bias[layer], run.layers[layer][1])
            by_domain[run.run_id, place.domain, layer].append(numbers)
            for expert in place.token.experts(layer):
                by_expert[run.run_id, layer, expert].append(numbers)
    for name, grouped in (("confidence_by_expert", by_expert), ("confidence_by_domain", by_domain)):
        expected = [
            (*key, len(rows), *(sum(values) / len(values) for values in zip(*rows, strict=True)))
            for key, rows in sorted(grouped.items(), key=lambda item: tuple((v is None, v) for v in item[0]))
        ]
        assert expected
        assert_rows(answer(layout, name, {}), expected)
        assert answer(layout, name, {"run": "007"}) == []
