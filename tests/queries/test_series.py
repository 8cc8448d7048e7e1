"""Series-wide results compare like with like: a series with other prompts, two runs of a step, an unfinished run."""

from __future__ import annotations

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
