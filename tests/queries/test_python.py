"""`moewh.open` in Python: relations that are read later, and arguments of every type."""

from __future__ import annotations

import multiprocessing
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import moewh
from moewh.api import Warehouse
from moewh.warehouse.errors import MoewhError, UsageError
from tests.support.saved_queries import values_of
from tests.support.synthetic import random_warehouse

RUNS = ("step-1", "step-30")
ASKED = ("domain_experts", "co_routing_where", "expert_top_tokens", "load_matrix", "expert_contexts")


@pytest.fixture(scope="module")
def warehouse(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warehouse]:
    with moewh.open(random_warehouse(tmp_path_factory.mktemp("python") / "wh")[0].root) as opened:
        yield opened


def rounded(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Rows without the last bits of their numbers, which depend on the order of addition."""
    return [tuple(round(cell, 9) if isinstance(cell, float) else cell for cell in row) for row in rows]


def test_a_relation_keeps_the_parameters_of_its_query(warehouse: Warehouse) -> None:
    """Relations are computed when they are read: queries of two runs, all asked before the first is read."""
    at_once: dict[tuple[str, str], list[Any]] = {}
    later = {}
    for run in RUNS:
        for name in ASKED:
            given = values_of(name) | {"run": run}
            at_once[name, run] = rounded(warehouse.query(name, **given).fetchall())
            later[name, run] = warehouse.query(name, **given)
        sql = "select getvariable('text'), $text, count(*) from chosen_routing"
        at_once["sql", run] = warehouse.sql(sql, text=run, run=run).fetchall()
        later["sql", run] = warehouse.sql(sql, text=run, run=run)
    assert [name for name in (*ASKED, "sql") if at_once[name, RUNS[0]] == at_once[name, RUNS[1]]] == []
    assert {asked: rounded(relation.fetchall()) for asked, relation in later.items()} == at_once


def test_closing_closes_every_relation(tmp_path: Path) -> None:
    with moewh.open(random_warehouse(tmp_path / "wh")[0].root) as opened:
        relations = [opened.query("expert_load"), opened.query("domain_experts", run="007")]
    for relation in relations:
        with pytest.raises(Exception, match="closed"):
            relation.fetchall()


def test_a_warehouse_that_was_deleted_is_named_and_may_come_back(tmp_path: Path) -> None:
    """As in a notebook that stays open: no error of DuckDB's about files that are not there."""
    root = random_warehouse(tmp_path / "wh")[0].root
    asked: list[Callable[[Warehouse], Any]] = [
        lambda wh: wh.query("load_balance").fetchall(),
        lambda wh: wh.query("domain_experts", run="007").fetchall(),
        lambda wh: wh.sql("from routes").fetchall(),
        lambda wh: wh.runs().fetchall(),
        lambda wh: wh.verify(),
        moewh.plots.load,
        lambda wh: moewh.plots.tokens(wh, prompt_id=0),
    ]
    with moewh.open(root) as opened:
        before = opened.runs().fetchall()
        root.rename(tmp_path / "away")
        for ask in asked:
            with pytest.raises(MoewhError, match=r"there is no warehouse at .* or name another with path"):
                ask(opened)
        (tmp_path / "away").rename(root)
        assert opened.runs().fetchall() == before


QUESTIONS: list[Callable[[Warehouse], list[Any]]] = [
    lambda wh: wh.query("co_routing").fetchall(),
    lambda wh: wh.runs().fetchall(),
    lambda wh: wh.query("expert_top_tokens", layer=3, expert=4, min_tokens=1).fetchall(),
    lambda wh: wh.sql("select count(*) from routes where layer = $layer", layer="3").fetchall(),
    lambda wh: wh.sql("select $text, getvariable('n') + 1", text="12", n="1").fetchall(),
]
"""What takes each way to an answer: views, look-ups, variables, and types that are inferred."""


def test_a_relation_is_read_in_batches_while_others_are_asked(warehouse: Warehouse) -> None:
    """DuckDB ends or refuses a result that is read while its connection runs another query."""
    wanted = len(warehouse.query("routes").fetchall())
    read = 0
    for number, batch in enumerate(warehouse.query("routes").to_arrow_reader(wanted // 11)):
        read += batch.num_rows
        assert QUESTIONS[number % len(QUESTIONS)](warehouse)
        assert moewh.plots.load(warehouse, run="mixed")
    assert read == wanted > 1_000
    assert number > 2 * len(QUESTIONS)


def test_threads_may_share_a_warehouse(warehouse: Warehouse) -> None:
    """Also while no thread has asked anything yet."""
    wanted = [rounded(ask(warehouse)) for ask in QUESTIONS]
    with moewh.open(warehouse.path) as shared, ThreadPoolExecutor(8) as pool:
        for _ in range(2):
            answers = pool.map(lambda ask: rounded(ask(shared)), QUESTIONS * 4)
            assert list(answers) == wanted * 4


def test_a_forked_process_may_go_on_with_a_warehouse(warehouse: Warehouse) -> None:
    """DuckDB's threads do not survive a fork; a query that needs them would wait forever."""
    wanted = [rounded(ask(warehouse)) for ask in QUESTIONS]
    fork = multiprocessing.get_context("fork")
    answered = fork.Queue()
    child = fork.Process(target=lambda: answered.put([rounded(ask(warehouse)) for ask in QUESTIONS]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 on, of a fork while there are threads
        child.start()
    try:
        assert answered.get(timeout=60) == wanted
    finally:
        child.kill()
        child.join()
    assert [rounded(ask(warehouse)) for ask in QUESTIONS] == wanted


def test_a_used_warehouse_can_be_pickled(warehouse: Warehouse) -> None:
    """As `multiprocessing` and `datasets` do."""
    assert warehouse.connection
    with pickle.loads(pickle.dumps(warehouse)) as again:
        assert again.path == warehouse.path
        assert rounded(QUESTIONS[0](again)) == rounded(QUESTIONS[0](warehouse))


class Name(str, Enum):  # noqa: UP042 - as users write it
    """A text that Python prints as `Name.RUN`."""

    RUN = "mixed"


class Series:
    """A series as polars has it."""

    def to_list(self) -> list[int]:
        """Return its values."""
        return [1, 2, 3]


def test_numbers_of_numpy_and_paths_are_taken(warehouse: Warehouse, tmp_path: Path) -> None:
    """Also within lists, as indexing an array gives them."""
    plain = warehouse.query("co_routing_where", run="mixed", layer=3, prompt_ids=[0, 2]).fetchall()
    ids = list(np.array([0, 2]))
    assert warehouse.query("co_routing_where", run="mixed", layer=np.int16(3), prompt_ids=ids).fetchall() == plain
    counted = "select count(*) from routes where list_contains($layers, layer)"
    assert warehouse.sql(counted, layers=tuple(np.array([0, 3]))).fetchall() == (
        warehouse.sql(counted, layers=[0, 3]).fetchall()
    )
    assert warehouse.query("coverage_curve", run=Name.RUN).fetchall() == (
        warehouse.query("coverage_curve", run="mixed").fetchall()
    )
    for layers in (range(1, 4), pd.Series([1, 2, 3]), Series(), [np.int8(1), 2, 3]):
        assert warehouse.sql("select $layers", layers=layers).fetchall() == [([1, 2, 3],)]
    assert warehouse.sql("select $at.layer, $file", at={"layer": np.int64(3)}, file=Path("a")).fetchall() == [(3, "a")]
    (tmp_path / "mine.sql").write_text("select $layer as asked")
    assert warehouse.query(tmp_path / "mine.sql", layer=3).fetchall() == [(3,)]


@pytest.mark.parametrize(
    ("method", "given", "parameters", "said"),
    [
        ("sql", None, {}, "sql is None, which is not text"),
        ("sql", b"select 1", {}, "sql is b'select 1'"),
        ("sql", Path("mine.sql"), {}, "`query` reads a .sql file"),
        ("query", None, {}, "the query is None"),
        ("query", 3, {}, "the query is 3"),
        ("query", "select 1", {}, "is SQL, not a query's name"),
        ("query", "domain_experts", {"run": None}, "run is None. Give a value, or leave it out."),
        ("query", "domain_experts", {"run": ["007"]}, "run is ['007']. Give a text."),
        ("query", "domain_experts", {"run": b"007"}, "run is b'007'. Give a text."),
        ("query", "domain_experts", {"run": pd.DataFrame({"run_id": ["007"]})}, "run is run_id 0 007. Give a text."),
        ("query", "co_routing_where", {"prompt_ids": ["0", "1"]}, "['0', '1']. Give a list of whole numbers"),
        ("query", "co_routing_where", {"prompt_ids": []}, "prompt_ids is []. Give a list of whole numbers"),
        ("sql", "select $x", {"x": {1, 2}}, "x is {1, 2}, which SQL has no type for. Give a number"),
        ("sql", "select $y, $x", {"x": [1, 1j], "y": 1}, "x is 1j, which SQL has no type for"),
        ("sql", "select $x", {"x": len}, "x is <built-in function len>, which SQL has no type for"),
        ("sql", "select getvariable('x')", {"x": {"a": object}}, "x is <class 'object'>, which SQL has no type for"),
        ("sql", "select $x", {"x": 2**200}, "which SQL has no type for"),
        ("sql", "select $x", {"x": "\ud800"}, "which SQL has no type for"),
        ("query", "placement_quality", {"placement": {"a": 1}}, "Give the name of a Parquet or JSON file"),
    ],
)
def test_arguments_of_other_types_are_refused(
    method: str, given: Any, parameters: dict[str, Any], said: str, warehouse: Warehouse
) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        getattr(warehouse, method)(given, **parameters)


@pytest.mark.parametrize("place", [None, 3, b"wh", "", "a\0b", ["wh"]])
def test_what_names_no_warehouse_is_refused(place: Any) -> None:
    for take in (moewh.open, lambda place: moewh.Writer(place, "r", "toy", layers=[0], num_experts=2, top_k=1)):
        with pytest.raises(UsageError, match="Give a path or a URL"):
            take(place)


@pytest.mark.parametrize("name", ["back\\slash", "a\udcff"])
def test_a_folder_in_which_duckdb_finds_no_files_is_refused(name: str, tmp_path: Path) -> None:
    for take in (moewh.open, lambda place: moewh.Writer(place, "r", "toy", layers=[0], num_experts=2, top_k=1)):
        with pytest.raises(UsageError, match="DuckDB cannot find files there"):
            take(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_a_tilde_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--warehouse=~/wh` reaches the command as it is, and would make a folder of that name."""
    monkeypatch.chdir(tmp_path)
    for place in ("~", "~/wh"):
        with pytest.raises(UsageError, match="the shell did not replace the ~"):
            moewh.Writer(place, "r", "toy", layers=[0], num_experts=2, top_k=1)
    assert list(tmp_path.iterdir()) == []


WHOLE = [None, "1", 1.0, 1.5, True, -1, [0], float("nan")]
"""What is no layer, expert or prompt_id, although Python could turn most of it into one."""


@pytest.mark.parametrize("number", WHOLE, ids=repr)
def test_a_layer_expert_or_prompt_is_a_whole_number(number: Any, warehouse: Warehouse) -> None:
    calls: dict[str, list[Callable[[], object]]] = {
        "layer": [
            lambda: moewh.plots.co_routing(warehouse, number),
            lambda: moewh.plots.top_tokens(warehouse, number, 2),
        ],
        "expert": [lambda: moewh.plots.top_tokens(warehouse, 3, number)],
        "prompt_id": [] if isinstance(number, list) else [lambda: moewh.plots.tokens(warehouse, number)],
    }
    if number is not None:
        calls["layer"].append(lambda: moewh.plots.tokens(warehouse, 0, number))
    for name, several in calls.items():
        for refused in several:
            with pytest.raises(UsageError, match=f"{name} is {re.escape(repr(number))}. Give a whole number"):
                refused()


def test_figures_take_numpys_numbers_and_refuse_what_is_no_warehouse(warehouse: Warehouse) -> None:
    assert moewh.plots.co_routing(warehouse, np.int64(3), run="mixed").data
    assert moewh.plots.tokens(warehouse, np.array([0, 1]), 3, run="mixed").layer == 3
    for draw in (moewh.plots.load, lambda wh: moewh.plots.tokens(wh, 0)):
        with pytest.raises(UsageError, match=re.escape("moewh.open(PATH)")):
            draw(warehouse.path)
    for run in ("", "none"):
        with pytest.raises(MoewhError, match=f"there is no run '{run}'"):
            moewh.plots.load(warehouse, run=run)
