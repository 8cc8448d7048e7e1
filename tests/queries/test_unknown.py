"""Runs with unknown values, such as imported ones: ranks, weights, vocabulary entries.

Each view and saved query is asked of a run that is known whole and of the same choices without ranks and weights, and
without entries. The answers are equal but for what cannot be known, which each case below lists: a view that is not
listed must not depend on it. So a new view is tested by existing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.warehouse.answer.catalog import describe_views
from moewh.warehouse.answer.query import Value, find_query, saved_names
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.verify import check, plan
from moewh.warehouse.views.base import canned_names
from tests.support.opened import engine_of, viewed
from tests.support.saved_queries import VALUES
from tests.support.synthetic import (
    checkpoint_of,
    empty_warehouse,
    random_run,
    with_logits,
    with_outputs,
    without_ranks,
    write_random_geometry,
    write_run,
)

LAYERS = {0: (6, 2), 3: (5, 3), 4: (4, 2)}
KINDS = ("known", "unranked", "unnamed")

NOT_WITHOUT_RANKS: dict[str, set[str] | None] = {
    "first_choice_transitions": None,
    "first_choice_paths": None,
    "layer_information": None,
    "expert_paths": None,
    "expert_path_coverage": None,
    "expert_load": {"first_choice_tokens", "weight_sum", "mean_weight"},
    "expert_repetition": {"first_choice"},
    "routes": {"rank", "weight"},
    "expert_contexts": {"choice", "weight"},
    "first_choice_information": None,
    "standing_committee": None,
    "top_expert_share": {"first_choice_share"},
    "expert_saliency": None,
    "saliency_by_domain": None,
    "outputs_by_rank": None,
    "domain_divergence": {"weight_divergence", "weight_normalized"},
}
"""View or saved query → its columns that are NULL without ranks and weights; None: it has no rows then."""
NOT_WITHOUT_ENTRIES: dict[str, set[str] | None] = {
    "expert_saliency": None,
    "saliency_by_domain": None,
    "outputs_by_rank": None,
    "expert_token_affinity": None,
    "expert_top_tokens": None,
    "token_experts": None,
    "vocabulary_specialization": {"specialization", "token_types"},
    "routes": {"token"},
    "expert_contexts": {"before", "token", "after"},
    "changed_tokens": {"token"},
    "expert_token_association": None,
    "choice_information": {"entries", "token_information", "token_chance"},
}
"""The same without vocabulary entries."""
RUN_COLUMNS = {"run_id", "reference_run_id", "previous_run_id", "series"}
IN_ANY_ORDER = {"rank": 0, "choice": 0}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """For each of KINDS, two checkpoints of a series over the same tokens: `<kind>` and `<kind>-1`."""
    layout = empty_warehouse(tmp_path_factory.mktemp("unknown") / "wh")
    last = with_outputs(random_run("known", 4, LAYERS, prompts=32), 6)
    first = with_outputs(with_logits(checkpoint_of(last, "known-1", 1, 5, changed=0.4), 7), 8)
    for kind in KINDS:
        for run, step in ((first, 1), (last, 30)):
            run_id = run.run_id.replace("known", kind)
            fields = {"series": kind, "tokens_key": kind, "train_step": step}
            told = run if kind == "known" else without_ranks(run, run_id, entries=kind == "unranked")
            write_run(layout, replace(told, fields=fields))
            write_random_geometry(layout, told, step)
    return layout


@cache
def rows_of(layout: Layout, name: str, kind: str) -> list[dict[str, Any]]:
    """Return a view's or saved query's rows for the runs of a kind, by column; empty if it has none."""
    if name in canned_names():
        relation = viewed(layout).sql(f"from {name} where run_id in ('{kind}', '{kind}-1')")
        return [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    declared = find_query(name).header.partition("Parameters")[2]
    values: dict[str, Value] = {**SAVED.get(name, VALUES.get(name, {})), "run": f"{kind}-1", "series": kind}
    values |= {"other_run": kind} if "other_run (" in declared else {}
    given = {key: value for key, value in values.items() if f"{key} (" in declared}
    columns, rows = answer_columns(layout, name, given)
    return [dict(zip(columns, row, strict=True)) for row in rows if in_kind(columns, row, kind)]


SAVED: dict[str, dict[str, Value]] = {
    "expert_top_tokens": {"layer": 3, "expert": 4, "min_tokens": 1},
    "layer_pair_jaccard": {"layer": 4, "other_layer": 0},
    "expert_contexts": {"layer": 3, "expert": 4, "width": 3, "strongest": 1_000},
}


def answer_columns(layout: Layout, name: str, values: dict[str, Value]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return a saved query's columns and rows, as in the command."""
    found = engine_of(layout)(find_query(name), values)
    assert found is not None
    done = found.execute()
    return [column[0] for column in done.description or ()], done.fetchall()


def in_kind(columns: list[str], row: tuple[Any, ...], kind: str) -> bool:
    """Return whether a row belongs to a run of this kind; queries without a run column are run on one run."""
    return "run_id" not in columns or row[columns.index("run_id")] in (kind, f"{kind}-1")


def comparable(rows: list[dict[str, Any]], left_out: set[str]) -> list[tuple[Any, ...]]:
    """Return rows without run names and unknowable values, with floats to 12 digits, sorted."""
    kept = [
        tuple(
            float(f"{value:.12g}") if isinstance(value, float) else value
            for name, value in row.items()
            if name not in left_out | RUN_COLUMNS
        )
        for row in rows
    ]
    return sorted(kept, key=repr)


NAMES = [*canned_names(), *saved_names()]


@pytest.mark.parametrize("name", NAMES)
def test_answer_without_ranks_and_weights(name: str, layout: Layout) -> None:
    known, unranked = rows_of(layout, name, "known"), rows_of(layout, name, "unranked")
    assert known, "the case has rows to lose"
    left_out = NOT_WITHOUT_RANKS.get(name, set())
    if left_out is None:
        assert unranked == []
        return
    assert comparable(unranked, left_out) == comparable(known, left_out)
    used = [row for row in unranked if row.get("tokens") != 0]
    assert {(column, row[column]) for row in used for column in left_out} == {(column, None) for column in left_out}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "token_experts"])
def test_answer_without_entries(name: str, layout: Layout) -> None:
    unranked, unnamed = rows_of(layout, name, "unranked"), rows_of(layout, name, "unnamed")
    left_out = NOT_WITHOUT_ENTRIES.get(name, set())
    if left_out is None:
        assert unnamed == []
        return
    assert comparable(unnamed, left_out) == comparable(unranked, left_out)


def test_view_says_what_it_leaves_out() -> None:
    views = describe_views()
    for name in ("first_choice_transitions", "first_choice_paths", "expert_repetition", "expert_load"):
        assert "not known" in views[name].header or "no rank is known" in views[name].header, name


def test_check_and_verify_find_no_fault(layout: Layout) -> None:
    result = CliRunner().invoke(main, ["check", "--warehouse", str(layout.root)])
    assert result.exit_code == 0, result.output
    geometry = [fault for fault in check(plan(layout)) if "geometry" not in str(fault.path)]
    assert geometry == []


@pytest.mark.parametrize("damage", ["part of the ranks", "a weight without a rank", "an expert twice"])
def test_ranks_and_weights_sees_faults_without_ranks(damage: str) -> None:
    import duckdb

    rows: list[list[Any]] = [[None, 1, None], [None, 2, None]]
    if damage == "part of the ranks":
        rows[0][0] = 0
    elif damage == "a weight without a rank":
        rows[1][2] = 0.5
    else:
        rows[1][1] = 1
    with duckdb.connect() as connection:
        connection.execute(
            "create table routing (run_id varchar, segment int, layer int, token_id bigint, "
            "rank int, expert int, weight float)"
        )
        connection.executemany("insert into routing values ('r', 0, 0, 0, ?, ?, ?)", rows)
        found = connection.execute(find_check("ranks_and_weights")).fetchall()
    assert len(found) == 1


def find_check(name: str) -> str:
    from moewh.warehouse.views.base import QUERIES

    return (QUERIES / "checks" / f"{name}.sql").read_text()
