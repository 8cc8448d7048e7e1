"""`moewh check`: faults are printed and make it fail; what the writer wrote has none."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from tests.synthetic import random_warehouse
from warehouse import schema
from warehouse.check import shipped_checks
from warehouse.cli import main
from warehouse.layout import Layout
from warehouse.views import QUERIES


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    return random_warehouse(tmp_path / "wh")[0]


def check(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments], env={"MOEWH_WAREHOUSE": str(layout.root)})


def test_check_sound_warehouse(layout: Layout) -> None:
    result = check(layout)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [*(f"{path.stem}: ok" for path in _files()), "rollups: ok"]


def test_check_empty_warehouse(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "wh")
    layout.create()
    assert check(layout).exit_code == 0


def test_check_names_the_wrong_count(layout: Layout) -> None:
    file = layout.segment("007", 1) / "pair_counts.parquet"
    rows = pq.read_table(file, partitioning=None).to_pylist()
    rows[0]["tokens"] += 5
    pq.write_table(pa.Table.from_pylist(rows, schema.PAIR_COUNTS.arrow()), file)
    result = check(layout)
    assert result.exit_code == 1
    assert "rollups: run 007, segment 1, pair_counts: kind = " in result.stdout
    assert f"stored tokens = {rows[0]['tokens']}, the rows give tokens = {rows[0]['tokens'] - 5}" in result.stdout
    assert result.stdout.endswith("rollups: 1 fault\n")


def test_check_names_a_token_with_a_row_missing(layout: Layout) -> None:
    file = layout.segment("mixed", 0) / "routing.parquet"
    rows = pq.read_table(file, partitioning=None).to_pylist()
    lost = next(row for row in rows if row["layer"] == 3 and row["rank"] == 2)
    rows.remove(lost)
    pq.write_table(pa.Table.from_pylist(rows, schema.ROUTING.arrow()), file)
    result = check(layout)
    assert result.exit_code == 1
    assert (
        f"choices_per_token: run_id = mixed, segment = 0, layer = 3, token_id = {lost['token_id']}, "
        "choices = 2, top_k = 3" in result.stdout
    )


def test_check_runs_the_users_own(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "good.sql").write_text("select 1 as x where false")
    (tmp_path / "mine" / "bad.sql").write_text("select range as n from range(25)")
    result = check(layout, str(tmp_path / "mine"))
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert lines[0] == "bad: n = 0"
    assert lines[20:] == ["bad: and 5 more", "bad: 25 faults", "good: ok"]
    assert check(layout, str(tmp_path / "mine" / "good.sql")).exit_code == 0


@pytest.mark.parametrize("path", ["nothing.sql", "."])
def test_check_without_a_file_is_wrong_use(
    path: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert check(layout, path).exit_code == 2


def test_shipped_checks_are_the_files() -> None:
    assert [query.source for query in shipped_checks()] == [path.name for path in _files()]
    assert all(query.header.startswith(query.source.removesuffix(".sql") + ": ") for query in shipped_checks())


def _files() -> list[Path]:
    return sorted((QUERIES / "checks").glob("*.sql"))
