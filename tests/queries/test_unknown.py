"""Runs with unknown values, such as imported ones: ranks, weights, vocabulary entries.

Each view and saved query is asked of a run that is known whole and of the same choices without ranks and weights, and
without entries. The answers are equal except for what cannot be known. The header of the SQL says what that is: a line
with "not known", "unknown" or "no … is known" names the columns, or says that there are no rows. The tables below have
those that say it in other words. So a new view or saved query is tested by existing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
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
from moewh.warehouse.views.shipped import canned_names
from tests.support.opened import engine_of, viewed
from tests.support.saved_queries import values_of
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
    "routes": {"rank", "weight"},
    "expert_contexts": {"choice", "weight"},
    "standing_committee": None,
    "expert_saliency": None,
    "saliency_by_domain": None,
    "outputs_by_rank": None,
}
"""View or saved query whose header says it in other words → its columns that are NULL without ranks and weights.

None: it has no rows then.
"""
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
    values: dict[str, Value] = {**values_of(name), "run": f"{kind}-1", "series": kind}
    values |= {"other_run": kind} if "other_run (" in declared else {}
    given = {key: value for key, value in values.items() if f"{key} (" in declared}
    columns, rows = answer_columns(layout, name, given)
    return [dict(zip(columns, row, strict=True)) for row in rows if in_kind(columns, row, kind)]


def answer_columns(layout: Layout, name: str, values: dict[str, Value]) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return a saved query's columns and rows, as in the command."""
    found = engine_of(layout)(find_query(name), values)
    assert found is not None
    done = found.execute()
    return [column[0] for column in done.description or ()], done.fetchall()


def said_unknown(name: str, columns: Iterable[str], *, of_entries: bool) -> set[str] | None:
    """What a header says of runs without ranks and weights, or without entries: these columns, or None for no rows."""
    header = describe_views()[name].header if name in canned_names() else find_query(name).header
    said = [line for line in header.splitlines() if re.search(r"not known|unknown|no \w+ is known", line)]
    said = [line for line in said if ("entry" in line) is of_entries]
    if any("no rows" in line for line in said):
        return None
    return {column for column in columns if any(re.search(rf"\b{column}\b", line) for line in said)}


def in_kind(columns: list[str], row: tuple[Any, ...], kind: str) -> bool:
    """Return whether a row belongs to a run of this kind; queries without a run column are run on one run."""
    return "run_id" not in columns or row[columns.index("run_id")] in (kind, f"{kind}-1")


def comparable(rows: list[dict[str, Any]], left_out: set[str]) -> list[tuple[Any, ...]]:
    """Return rows without run names and unknowable values, sorted; floats as `Close`, for sums in any order."""
    kept = [
        tuple(Close(value) if isinstance(value, float) else value for value in row)
        for row in ([value for name, value in row.items() if name not in left_out | RUN_COLUMNS] for row in rows)
    ]
    return sorted(kept, key=repr)


class Close(float):
    """A float that equals another within 1e-11 of it, and is written with six digits."""

    def __repr__(self) -> str:
        return f"{self:.6g}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and math.isclose(self, other, rel_tol=1e-11, abs_tol=1e-11)

    __hash__ = float.__hash__


NAMES = [*canned_names(), *saved_names()]


@pytest.mark.parametrize("name", NAMES)
def test_answer_without_ranks_and_weights(name: str, layout: Layout) -> None:
    known, unranked = rows_of(layout, name, "known"), rows_of(layout, name, "unranked")
    assert known, "the case has rows to lose"
    left_out = NOT_WITHOUT_RANKS.get(name, said_unknown(name, known[0], of_entries=False))
    if left_out is None:
        assert unranked == []
        return
    assert comparable(unranked, left_out) == comparable(known, left_out)
    used = [row for row in unranked if row.get("tokens") != 0]
    assert {(column, row[column]) for row in used for column in left_out} == {(column, None) for column in left_out}


@pytest.mark.parametrize("name", [name for name in NAMES if name != "token_experts"])
def test_answer_without_entries(name: str, layout: Layout) -> None:
    known, unranked, unnamed = (rows_of(layout, name, kind) for kind in KINDS)
    left_out = NOT_WITHOUT_ENTRIES.get(name, said_unknown(name, known[0], of_entries=True))
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
    from moewh.warehouse.views.shipped import QUERIES

    return (QUERIES / "checks" / f"{name}.sql").read_text()
