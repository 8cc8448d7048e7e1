"""The totals that a sealed run stores: the rows of their staging views, found wrong if they are, and not required."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.sealing import totals
from moewh.warehouse.sealing.seal import seal, unseal
from moewh.warehouse.trust.rollups import compare
from moewh.warehouse.trust.verify import check_rollups
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import staging_query
from tests.support.brute_force import BRUTE_FORCE, assert_same_rows
from tests.support.opened import viewed
from tests.support.synthetic import Run, empty_warehouse, random_run, random_warehouse, without_ranks, write_run

VIEWS = ("co_routing", "layer_transitions", "first_choice_transitions")
TOTALS = pytest.mark.parametrize("table", schema.TOTALS, ids=lambda table: table.name)


@pytest.fixture(scope="module")
def random(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, list[Run]]:
    """Random runs; the last has neither ranks nor entries."""
    layout, runs = random_warehouse(tmp_path_factory.mktemp("random") / "wh")
    runs = [*runs, without_ranks(random_run("ids", 6, {0: (6, 2), 3: (5, 3)}), "ids", entries=False)]
    write_run(layout, runs[-1])
    return layout, runs


@TOTALS
@pytest.mark.parametrize("many_experts", [False, True])
def test_sealed_totals_are_the_rows_of_the_staging_view(
    many_experts: bool, table: schema.Table, random: tuple[Layout, list[Run]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a matrix of the experts, which is too large where they are tens of thousands."""
    if many_experts:
        monkeypatch.setattr(totals, "_CELLS", 0)
    layout, runs = random
    names = ", ".join(column.name for column in table.columns)
    for run in runs:
        unseal(layout, run.run_id)
        where = f"where run_id = '{run.run_id}' order by all"
        counted = viewed(layout).execute(f"select {names} from {table.name} {where}").fetchall()
        assert (
            viewed(layout).execute(f"select {names} from ({staging_query(table.name)}) {where}").fetchall() == counted
        )
        assert seal(layout, run.run_id)
        stored = pq.read_table(layout.sealed(run.run_id) / table.file, partitioning=None)
        assert [tuple(row.values()) for row in stored.to_pylist()] == counted
        assert bool(counted) == (table is not schema.FIRST_CHOICE_TOTALS or run.run_id != "ids")


@pytest.mark.parametrize("view", VIEWS)
def test_matrices_of_sealed_runs_equal_plain_counting(view: str, random: tuple[Layout, list[Run]]) -> None:
    layout, runs = random
    for run in runs:
        assert seal(layout, run.run_id)
    ranked = [run for run in runs if run.run_id != "ids"]
    rows = viewed(layout).execute(f"from {view} where run_id <> 'ids'").fetchall()
    assert_same_rows(view, rows, [row for run in ranked for row in BRUTE_FORCE[view](run)])


def test_wrong_totals_are_found(tmp_path: Path) -> None:
    """In every table and column: a row more for each."""
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, random_run("007", 1, {0: (6, 2), 2: (5, 3)}))
    assert seal(layout, "007")
    files = {table: layout.sealed("007") / table.file for table in schema.TOTALS}
    damaged = []
    for table, file in files.items():
        rows = pq.read_table(file, partitioning=None).to_pylist()
        keys, counted = schema.split_columns(table)
        for number, column in enumerate(counted):
            rows[number][column] += 1
            damaged.append((table.name, ", ".join(f"{key} = {rows[number][key]}" for key in keys)))
        pq.write_table(pa.Table.from_pylist(rows, table.arrow()), file)
    with open_engine("duckdb", None, layout, Limits()) as ask:
        faults = list(compare(ask))
    assert {(fault.run_id, fault.segment) for fault in faults} == {("007", None)}
    assert [(fault.table, fault.key) for fault in faults] == damaged
    assert [fault.path for fault in check_rollups(layout)] == list(files.values())


def test_a_warehouse_older_than_the_totals_answers_from_counts(
    random: tuple[Layout, list[Run]], tmp_path: Path
) -> None:
    layout = Layout(tmp_path / "wh")
    shutil.copytree(random[0].root, layout.root, symlinks=True)
    for table in schema.TOTALS:
        for folder in layout.sealed("x").parent.iterdir():
            (folder / table.file).unlink()
    assert not layout.has_table(schema.PAIR_TOTALS)
    for view in VIEWS:
        with open_warehouse(layout) as connection:
            rows = connection.execute(f"from {view}").fetchall()
        assert_same_rows(view, rows, viewed(random[0]).execute(f"from {view}").fetchall())
    assert layout.sealed(SCHEMA_RUN).is_dir()
