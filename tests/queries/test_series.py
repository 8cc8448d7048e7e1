"""Series-wide results compare like with like: a series with other prompts, two runs of a step, an unfinished run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.answer.query import Value, find_query
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from tests.support.opened import engine_of
from tests.support.synthetic import (
    Prompt,
    Run,
    Token,
    checkpoint_of,
    empty_warehouse,
    random_run,
    random_warehouse,
    write_run,
)

Rows = list[tuple[Any, ...]]
LAYERS = {0: (6, 2), 3: (5, 3)}
CURVES = {
    "last": ["first", "twin-a", "twin-b", "last"],
    "other-9": ["other-1", "other-9"],
    "alone": ["alone"],
}
"""Reference run → the runs of its curve, in order of training. All are of one series."""


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, dict[str, Run]]:
    layout, _ = random_warehouse(tmp_path_factory.mktemp("series") / "wh")
    last = replace(random_run("last", 1, LAYERS, 24), fields={"series": "s", "tokens_key": "t", "train_step": 40})
    other = replace(random_run("other-9", 2, LAYERS, 9), fields={"series": "s", "tokens_key": "u", "train_step": 90})
    runs = [
        last,
        checkpoint_of(last, "first", 3, 11, changed=0.9),
        checkpoint_of(last, "twin-a", 20, 12, changed=0.5),
        checkpoint_of(last, "twin-b", 20, 13, changed=0.5),
        other,
        checkpoint_of(other, "other-1", 20, 14, changed=0.7),
        replace(random_run("alone", 3, LAYERS, 5), fields={"series": "s", "tokens_key": "v", "train_step": 3}),
    ]
    half = checkpoint_of(last, "half", 30, 15, changed=0.5)
    for run in [*runs, replace(half, segments=half.segments[:1], fields={**half.fields, "segments_planned": 2})]:
        write_run(layout, run)
    write_run(layout, replace(random_run("unknown", 4, LAYERS, 5), fields={"series": "s", "train_step": 50}))
    return layout, {run.run_id: run for run in [*runs, half]}


def answer(layout: Layout, name: str, values: dict[str, Value]) -> Rows:
    found = engine_of(layout)(find_query(name), values)
    assert found is not None
    return found.execute().fetchall()


def shares(run: Run, layer: int) -> dict[int, float]:
    """Each expert's share of the choices at a layer."""
    counts = Counter(expert for token in run.tokens() if token.counted for expert in token.experts(layer))
    return {expert: counts[expert] / counts.total() for expert in range(run.layers[layer][0])}


@pytest.mark.parametrize("layer", LAYERS)
def test_load_drift_follows_each_curve_alone(layer: int, warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    pairs = [
        ("alone", "alone", None),
        ("last", "first", None),
        ("last", "twin-a", "first"),
        ("last", "twin-b", "first"),
        ("last", "last", "twin-a"),
        ("last", "last", "twin-b"),
        ("other-9", "other-1", None),
        ("other-9", "other-9", "other-1"),
    ]
    expected = []
    for reference, name, before in pairs:
        moved = None
        if before:
            here, there = shares(runs[name], layer), shares(runs[before], layer)
            moved = pytest.approx(sum(abs(here[e] - there[e]) for e in here) / 2, rel=1e-12)
        expected.append(("s", reference, layer, runs[name].fields["train_step"], name, before, moved))
    rows = answer(layout, "load_drift", {"series": "s", "layer": layer})
    assert [row[:7] for row in rows] == expected


def test_load_drift_of_all_series_keeps_them_apart(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    rows = answer(warehouse[0], "load_drift", {"layer": 3})
    assert {(row[0], row[1]) for row in rows} == {("s", name) for name in CURVES} | {("trained", "step-30")}


def test_saturation_compares_the_same_tokens_alone(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    layout, runs = warehouse
    expected: Rows = []
    for reference, names in sorted(CURVES.items()):
        for layer, (_, top_k) in LAYERS.items():
            for name in [*names[:-1], "half", names[-1]] if reference == "last" else names:
                pairs = zip(runs[name].tokens(), runs[reference].tokens(), strict=True)
                kept = runs[name].segments[0] if name == "half" else None
                number = sum(len(prompt.tokens) for prompt in kept) if kept else None
                both = [(a.experts(layer), b.experts(layer)) for a, b in list(pairs)[:number] if a.counted]
                both = [(a, b) for a, b in both if a and b]
                shared = sum(len({*a} & {*b}) for a, b in both) / (top_k * len(both))
                step = runs[name].fields["train_step"]
                expected.append(("s", reference, layer, step, None, name, len(both), pytest.approx(shared, rel=1e-12)))
    rows = answer(layout, "saturation_over_training", {"series": "s"})
    assert [row[:8] for row in rows] == expected


@pytest.mark.parametrize("name", ["changed_tokens", "specialization_changes"])
@pytest.mark.parametrize("other", ["other-1", "alone", "unknown", "007"])
def test_runs_over_other_tokens_are_not_compared(
    name: str, other: str, warehouse: tuple[Layout, dict[str, Run]]
) -> None:
    for pair in (("last", other), (other, "last")):
        with pytest.raises(MoewhError, match="do not have the same tokens"):
            answer(warehouse[0], name, dict(zip(("run", "other_run"), pair, strict=True)))
    thresholds: dict[str, Value] = {"min_lift": 1.05} if name == "specialization_changes" else {}
    assert answer(warehouse[0], name, {"run": "last", "other_run": "first", **thresholds})


@pytest.mark.parametrize("pair", [("last", "half"), ("half", "last")])
def test_domains_of_an_unfinished_run_are_not_compared(
    pair: tuple[str, str], warehouse: tuple[Layout, dict[str, Run]]
) -> None:
    """Its domains have fewer tokens than those of the other run, also in a plain shell."""
    values: dict[str, Value] = {"run": pair[0], "other_run": pair[1], "min_lift": 1.0, "min_share": 0.0}
    with pytest.raises(MoewhError, match=r"run half is running, .* Run its ingest command again"):
        answer(warehouse[0], "specialization_changes", values)
    with open_engine("duckdb", None, warehouse[0], Limits()) as ask:
        found = ask.run(find_query("specialization_changes"), values)
        assert found is not None
        assert found.execute().fetchall() == []


def test_changed_tokens_of_runs_with_other_top_k(tmp_path: Path) -> None:
    """A token that goes to one more expert has not kept all of them, whichever run is named first."""
    layout = empty_warehouse(tmp_path / "wh")
    one, two = Token(1, {0: [(0, 1.0)]}), Token(1, {0: [(0, 0.5), (1, 0.5)]})
    for run_id, token, top_k in (("one", one, 1), ("two", two, 2)):
        write_run(layout, Run(run_id, {0: (3, top_k)}, [[Prompt([token])]], {"tokens_key": "t"}))
    for pair in (("one", "two"), ("two", "one")):
        rows = answer(layout, "changed_tokens", dict(zip(("run", "other_run"), pair, strict=True)))
        assert [row[-1] for row in rows] == [0.5]


def test_a_plain_shell_compares_no_other_tokens_either(warehouse: tuple[Layout, dict[str, Run]]) -> None:
    """The SQL itself compares only runs of equal tokens_key, without moewh's lookups before it."""
    with open_engine("duckdb", None, warehouse[0], Limits()) as ask:
        for name in ("changed_tokens", "specialization_changes"):
            found = ask.run(find_query(name), {"run": "last", "other_run": "other-1"})
            assert found is not None
            assert found.execute().fetchall() == []


def test_saturation_by_hand_of_one_series_with_other_prompts(tmp_path: Path) -> None:
    """Two runs of one step over other prompts: each is measured against its own last checkpoint."""
    layout = empty_warehouse(tmp_path / "wh")
    for run_id, key, step, expert in [("a1", "a", 1, 0), ("a2", "a", 2, 0), ("b1", "b", 1, 0), ("b2", "b", 2, 1)]:
        fields = {"series": "s", "tokens_key": key, "train_step": step}
        write_run(layout, Run(run_id, {0: (2, 1)}, [[Prompt([Token(1, {0: [(expert, 1.0)]})])]], fields))
    rows = answer(layout, "saturation_over_training", {})
    assert [(row[1], row[5], row[7]) for row in rows] == [
        ("a2", "a1", 1.0),
        ("a2", "a2", 1.0),
        ("b2", "b1", 0.0),
        ("b2", "b2", 1.0),
    ]


OF_A_SERIES = ("saturation_over_training", "saturation_of_prompts", "load_drift", "load_over_checkpoints")
OF_TWO_RUNS = ("changed_tokens", "specialization_changes", "contrast_runs")
OTHER_EXPERTS: dict[str, tuple[dict[int, tuple[int, int]], str]] = {
    "wider": ({0: (9, 2), 3: (5, 3)}, "6 and 9 at layer 0"),
    "narrower": ({0: (6, 2), 3: (4, 3)}, "5 and 4 at layer 3"),
    "deeper": ({0: (6, 2), 3: (5, 3), 4: (5, 3)}, "deeper has an MoE layer 4, last has none"),
    "shallower": ({0: (6, 2)}, "last has an MoE layer 3, shallower has none"),
    "shifted": ({1: (6, 2), 3: (5, 3)}, "last has an MoE layer 0, shifted has none"),
}
"""Run → layers, of which at least one differs from those of `last`, and how messages say so."""


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """Runs of other experts under one series and tokens_key; `last` and `first` have the same, with another top_k."""
    layout = empty_warehouse(tmp_path_factory.mktemp("unlike") / "wh")
    fields = {"series": "s", "tokens_key": "t"}
    last = replace(random_run("last", 1, LAYERS, 12), fields={**fields, "train_step": 40})
    write_run(layout, last)
    first = replace(random_run("first", 2, {0: (6, 3), 3: (5, 1)}, 12), fields={**fields, "train_step": 1})
    write_run(layout, first)
    for step, (name, (layers, _)) in enumerate(OTHER_EXPERTS.items()):
        write_run(layout, replace(random_run(name, step, layers, 12), fields={**fields, "train_step": 50 + step}))
    return layout


@pytest.mark.parametrize("name", OF_A_SERIES)
def test_a_curve_has_runs_of_the_same_experts_alone(name: str, unlike: Layout) -> None:
    """Expert 3 of 6 and expert 3 of 9 have nothing in common, whatever the user calls their series."""
    with open_engine("duckdb", None, unlike, Limits()) as ask:
        answered = ask.run(find_query(name), {})
        assert answered is not None
        relation = answered.relation()
        rows = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    runs: dict[str, set[str]] = {}
    for row in rows:
        runs.setdefault(row["reference_run_id"], set()).add(str(row.get("run_id")))
        if name == "load_over_checkpoints":
            assert row["checkpoints"] == (2 if row["reference_run_id"] == "last" else 1)
    alone = {other: {other} for other in OTHER_EXPERTS}
    if name != "load_over_checkpoints":
        assert runs == {"last": {"first", "last"}} | alone
    assert runs.keys() == {"last", *OTHER_EXPERTS}


@pytest.mark.parametrize("name", ["saturation_over_training", "saturation_of_prompts"])
def test_saturation_by_chance_counts_the_reference_runs_choices(name: str, unlike: Layout) -> None:
    """Of k experts, K of E random ones are k K / E on average: K / E of them."""
    found = [row for row in answer(unlike, name, {}) if row[1] == "last"]
    assert [(row[2], row[5], row[8]) for row in found] == [
        (0, "first", 2 / 6),
        (0, "last", 2 / 6),
        (3, "first", 3 / 5),
        (3, "last", 3 / 5),
    ]


@pytest.mark.parametrize("name", OF_TWO_RUNS)
def test_runs_of_other_experts_are_not_compared(name: str, unlike: Layout) -> None:
    thresholds: dict[str, Value] = {"min_lift": 1.05} if name == "specialization_changes" else {}
    assert answer(unlike, name, {"run": "last", "other_run": "first", **thresholds})
    with open_engine("duckdb", None, unlike, Limits()) as ask:
        for other, (_, says) in OTHER_EXPERTS.items():
            with pytest.raises(MoewhError, match=re.escape(f"({says}), so they cannot be compared.")) as refused:
                ask(find_query(name), {"run": "last", "other_run": other})
            assert str(refused.value).endswith("experts of last: first.")
            plain = ask.run(find_query(name), {"run": "last", "other_run": other, **thresholds})
            assert plain is not None
            assert plain.execute().fetchall() == []
