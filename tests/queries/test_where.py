"""Queries over some tokens only: the matrices over a condition equal those of a run with just those tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.answer.query import Query, Value
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from tests.support.brute_force import assert_same_rows, brute_co_routing, brute_layer_transitions
from tests.support.saved_queries import answer
from tests.support.synthetic import Prompt, Run, random_warehouse, word

Rows = list[tuple[Any, ...]]
IDS = [(2 << schema.POSITION_BITS) + 1, (2 << schema.POSITION_BITS) + 2, 5 << schema.POSITION_BITS]


@dataclass(frozen=True)
class Place:
    """The columns that a condition can use."""

    domain: str | None
    prompt_id: int
    token_id: int
    vocab_id: int


CONDITIONS: list[tuple[dict[str, Value], Callable[[Place], bool]]] = [
    ({}, lambda _: True),
    ({"domain": "code"}, lambda place: place.domain == "code"),
    ({"prompt_ids": "0, 3,6"}, lambda place: place.prompt_id in (0, 3, 6)),
    ({"prompt_ids": 2}, lambda place: place.prompt_id == 2),
    ({"token": word(3)}, lambda place: place.vocab_id == 3),
    ({"token_ids": ",".join(map(str, IDS))}, lambda place: place.token_id in IDS),
    ({"token": word(7), "domain": "prose"}, lambda place: place.vocab_id == 7 and place.domain == "prose"),
]


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    return random_warehouse(tmp_path_factory.mktemp("where") / "wh")


def only(run: Run, keep: Callable[[Place], bool]) -> Run:
    """Return the run with every excluded token made special."""
    segments, prompt_id = [], 0
    for segment in run.segments:
        kept = []
        for prompt in segment:
            first = prompt_id << schema.POSITION_BITS
            tokens = [
                token
                if keep(Place(prompt.domain, prompt_id, token_id, token.vocab_id))
                else replace(token, kind="special")
                for token_id, token in enumerate(prompt.tokens, first)
            ]
            kept.append(Prompt(tokens, prompt.domain))
            prompt_id += 1
        segments.append(kept)
    return replace(run, segments=segments)


QUESTIONS = {
    "co_routing_where": ("co_routing", brute_co_routing),
    "transitions_where": ("layer_transitions", brute_layer_transitions),
}


@pytest.mark.parametrize("condition", range(len(CONDITIONS)), ids=[str(values) for values, _ in CONDITIONS])
@pytest.mark.parametrize("name", QUESTIONS)
def test_where_equals_a_run_of_those_tokens(name: str, condition: int, random: tuple[Layout, list[Run]]) -> None:
    layout, runs = random
    values, keep = CONDITIONS[condition]
    view, brute = QUESTIONS[name]
    expected = [row for run in runs for row in brute(only(run, keep))]
    rows = answer(layout, name, values)
    assert_same_rows(view, rows, expected)
    assert rows == sorted(rows, key=lambda row: row[: 5 if name == "transitions_where" else 4])


@pytest.mark.parametrize("name", QUESTIONS)
@pytest.mark.parametrize("values", [{}, {"token": word(5)}], ids=["rollups", "rows"])
def test_where_of_one_run_and_layer(name: str, values: dict[str, Value], random: tuple[Layout, list[Run]]) -> None:
    layout, _ = random
    every = answer(layout, name, values)
    some = answer(layout, name, {**values, "run": "mixed", "layer": 3})
    assert some == [row for row in every if row[:2] == ("mixed", 3)]
    assert some


@pytest.mark.parametrize("parameter", ["prompt_ids", "token_ids"])
@pytest.mark.parametrize("listed", ["3,x17", "3;17", "[3]", ""])
@pytest.mark.parametrize("name", QUESTIONS)
def test_where_refuses_what_is_no_list_of_ids(
    name: str, parameter: str, listed: str, random: tuple[Layout, list[Run]]
) -> None:
    layout, _ = random
    with pytest.raises(UsageError, match=f"{parameter} is a list of whole numbers"):
        answer(layout, name, {parameter: listed})


def test_where_leaves_out_no_rollup_silently(tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    (layout.segment("007", 1) / "pair_counts.parquet").unlink()
    with pytest.raises(Exception, match=r"segment=1 lacks pair_counts\.parquet"):
        answer(layout, "co_routing_where", {"domain": "code"})


def test_own_sql_takes_the_conditions_of_chosen_routing(random: tuple[Layout, list[Run]]) -> None:
    layout, _ = random
    query = Query("mine", "select count(*) from chosen_routing")
    counts = []
    with open_engine("duckdb", None, layout, Limits()) as ask:
        for values in ({"token_ids": ",".join(map(str, IDS))}, {"token": word(3), "run": "mixed"}, {}):
            found = ask(query, values)
            assert found is not None
            counts.append(found.execute().fetchall()[0][0])
        with pytest.raises(UsageError, match="does not use the parameter 'layer'"):
            ask(query, {"layer": 1})
        with pytest.raises(UsageError, match="token_ids is a list of whole numbers"):
            ask(query, {"token_ids": "x"})
    assert counts[0] > 0
    assert counts[1] > 0
    assert counts[2] == 0
