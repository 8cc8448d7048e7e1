"""A schema that grows: older segments answer NULL, newer ones their values, and an older moewh refuses by name.

In these tests' schema, three tables have one more column since version 2: a run's table, a small one of a segment, and
its largest.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import MANIFEST, read_manifest, write_manifest
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.trust import verify
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.publishing import publish
from tests.support.damage import sound_warehouse
from tests.support.restored_warehouse import RestoredWarehouse

pytestmark = pytest.mark.published_file
GROWN = {schema.RUNS: 7, schema.PROMPTS: 8, schema.ROUTING: 9}
"""The tables that get a column, and the column's value in new files."""
ASKED = """
select 'runs' as t, run_id, count(*) as n, count(added) as known, max(added) as added from runs group by run_id
union all select 'prompts', run_id, count(*), count(added), max(added) from prompts group by run_id
union all select 'routing', run_id, count(*), count(added), max(added) from routing group by run_id
order by t, run_id"""
FORMAT = schema.FORMAT_VERSION
NEXT = schema.SCHEMA_VERSION + 1
NEWER = f"was written by a newer moewh (schema {NEXT}; this one reads {NEXT - 1}). Upgrade moewh."


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> RestoredWarehouse:
    return RestoredWarehouse(tmp_path_factory.mktemp("restored"), sound_warehouse)


@pytest.fixture
def layout(restored: RestoredWarehouse) -> Layout:
    return restored.restore()


@pytest.fixture
def grow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Return the patches that turn this moewh into one with the next schema."""

    def grown() -> None:
        for table in GROWN:
            added = schema.Column("added", "INTEGER", "What came later.", since=NEXT)
            derived = [column for column in table.columns if column.derived]
            monkeypatch.setitem(vars(table), "columns", (*table.stored, added, *derived))
        monkeypatch.setattr(schema, "SCHEMA_VERSION", NEXT)

    return grown


def write_newer(layout: Layout, run_id: str) -> None:
    """Give a run's files the added column, as written by moewh with the next schema."""
    for folder in (layout.run(run_id), *layout.segments(run_id).iterdir()):
        for table, value in GROWN.items():
            if (file := folder / table.file).is_file():
                rows = pq.read_table(file, partitioning=None)
                more = rows.append_column("added", pa.array([value] * len(rows), pa.int32()))
                pq.write_table(more, file, write_page_checksum=True)
        manifest = read_manifest(folder)
        write_manifest(folder, manifest.identity, manifest.segment)


def in_process(layout: Layout) -> list[tuple[Any, ...]]:
    with open_warehouse(layout) as connection:
        return connection.execute(ASKED).fetchall()


def in_shell(layout: Layout, sql: str = ASKED) -> subprocess.CompletedProcess[str]:
    command = [find_duckdb(), "-readonly", "-json", str(layout.database)]
    return subprocess.run(command, input=f"{sql};", capture_output=True, text=True, timeout=60, check=False)


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])


def faults(layout: Layout) -> list[verify.Fault]:
    return [*verify.check(verify.plan(layout)), *verify.check_rollups(layout)]


def assert_known(rows: list[tuple[Any, ...]], newer: set[str]) -> None:
    """All rows of the newer runs have their table's value, those of the others NULL."""
    values = {table.name: value for table, value in GROWN.items()}
    assert {(name, run_id) for name, run_id, *_ in rows} == {(name, run) for name in values for run in ("one", "two")}
    for name, run_id, count, known, value in rows:
        assert count > 0
        assert (known, value) == ((count, values[name]) if run_id in newer else (0, None))


def test_an_older_warehouse_answers_null(layout: Layout, grow: Callable[[], None]) -> None:
    grow()
    before = sorted(path for path in layout.root.rglob("*") if path.is_file())
    assert_known(in_process(layout), set())
    assert faults(layout) == []
    assert moewh(layout, "check").exit_code == 0
    assert sorted(path for path in layout.root.rglob("*") if path.is_file()) == before
    publish(layout)
    done = in_shell(layout)
    assert done.returncode == 0, done.stderr
    assert_known([tuple(row.values()) for row in json.loads(done.stdout)], set())


def test_newer_segments_beside_older_ones(layout: Layout, grow: Callable[[], None]) -> None:
    grow()
    layout.create()
    write_newer(layout, "two")
    publish(layout)
    assert_known(in_process(layout), {"two"})
    done = in_shell(layout)
    assert done.returncode == 0, done.stderr
    assert_known([tuple(row.values()) for row in json.loads(done.stdout)], {"two"})
    assert faults(layout) == []
    assert moewh(layout, "check").exit_code == 0
    for folder in (layout.segment(SCHEMA_RUN, 0), Layout(layout.empty).run(SCHEMA_RUN)):
        assert read_manifest(folder).schema == NEXT
    assert read_manifest(layout.segment("one", 0)).schema == NEXT - 1


def test_a_filter_on_run_id_still_leaves_files_out(layout: Layout, grow: Callable[[], None]) -> None:
    grow()
    with open_warehouse(layout) as connection:
        plan = str(connection.execute("explain analyze select max(added) from routing where run_id = 'one'").fetchall())
    assert "Total Files Read: 2" in plan


def test_a_newer_manifest_with_older_columns_is_a_fault(layout: Layout, grow: Callable[[], None]) -> None:
    grow()
    folder = layout.segment("one", 0)
    manifest = read_manifest(folder)
    write_manifest(folder, manifest.identity, manifest.segment)
    assert {fault.file for fault in faults(layout)} == {schema.PROMPTS.file, schema.ROUTING.file}


@pytest.mark.parametrize(
    "arguments",
    [("query", "expert_load"), ("runs",), ("check",), ("verify",), ("refresh",), ("shell",)],
    ids=lambda arguments: arguments[0],
)
def test_an_older_moewh_refuses(arguments: tuple[str, ...], layout: Layout) -> None:
    in_version(layout, {"schema": NEXT})
    result = moewh(layout, *arguments)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [f"moewh: the warehouse at {layout.root} {NEWER}"]


def test_an_older_moewh_writes_nothing(layout: Layout) -> None:
    in_version(layout, {"schema": NEXT})
    with pytest.raises(MoewhError, match="newer moewh"):
        layout.create()


@pytest.mark.parametrize("sql", ["from routes limit 1", "select token from routes where run_id = 'one' and layer = 1"])
@pytest.mark.parametrize("changed", [{"schema": NEXT}, {"format": FORMAT + 1}, {"format": FORMAT - 1}])
def test_rows_with_text_are_refused_too(changed: dict[str, Any], sql: str, layout: Layout) -> None:
    """What people type first reads no table of runs but for the text."""
    assert in_shell(layout, sql).returncode == 0
    in_version(layout, changed)
    done = in_shell(layout, sql)
    assert done.returncode == 1
    version = changed.get("format", FORMAT)
    assert f"{'older' if version < FORMAT else 'newer'} moewh (format {version}" in done.stderr


def test_the_published_file_refuses_what_became_newer(layout: Layout) -> None:
    assert in_shell(layout, "select count(*) from runs").returncode == 0
    in_version(layout, {"schema": NEXT})
    for view in ("runs", "layers", "experts", "expert_load", "layer_transitions where run_id = 'one'"):
        done = in_shell(layout, f"select count(*) from {view}")
        assert done.returncode == 1, view
        assert f"newer moewh (format {FORMAT}, schema {NEXT}; this file reads {FORMAT} and {NEXT - 1})" in done.stderr
        assert "Upgrade moewh and run `moewh refresh`." in done.stderr


OTHER_FORMATS = {
    FORMAT + 1: (f"newer moewh (format {FORMAT + 1}; this one reads {FORMAT})", "Upgrade moewh."),
    FORMAT - 1: (f"older moewh (format {FORMAT - 1}; this one reads {FORMAT})", "Ingest its prompts again, into"),
}


@pytest.mark.parametrize("version", OTHER_FORMATS)
@pytest.mark.parametrize(
    "arguments",
    [("query", "expert_load"), ("runs",), ("check",), ("verify",), ("refresh",), ("shell",)],
    ids=lambda arguments: arguments[0],
)
def test_another_format_is_refused(arguments: tuple[str, ...], version: int, layout: Layout) -> None:
    in_version(layout, {"format": version})
    result = moewh(layout, *arguments)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert all(part in result.stderr for part in OTHER_FORMATS[version])


@pytest.mark.parametrize("version", OTHER_FORMATS)
def test_another_format_is_not_written_to(version: int, layout: Layout) -> None:
    in_version(layout, {"format": version})
    with pytest.raises(MoewhError, match=f"format {version}"):
        layout.create()


@pytest.mark.parametrize("version", OTHER_FORMATS)
def test_the_published_file_refuses_another_format(version: int, layout: Layout) -> None:
    in_version(layout, {"format": version})
    for view in ("runs", "vocabulary", "expert_load"):
        done = in_shell(layout, f"select count(*) from {view}")
        assert done.returncode == 1, view
        assert f"format {version}" in done.stderr
        assert OTHER_FORMATS[version][1].partition(".")[0] in done.stderr


@pytest.mark.parametrize(("run_id", "number"), [("one", 0), ("one", 1), ("two", 1)])
def test_a_segment_of_the_first_format_is_named(run_id: str, number: int, layout: Layout) -> None:
    """A copied segment: no query that reads its missing column answers NULL, and verify moves it out."""
    folder = layout.segment(run_id, number)
    rows = pq.read_table(folder / schema.ROUTING.file, partitioning=None)
    pq.write_table(rows.select(["token_id", "layer", "rank", "expert", "weight"]), folder / schema.ROUTING.file)
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 1}, indent=1) + "\n")
    for asked in ("select count(vocab_id) from routing", "from routes", "select min(kind) from routes"):
        result = moewh(layout, "query", "-c", asked)
        assert result.exit_code == 1, asked
        assert len(result.stderr.splitlines()) == 1
        named = "a segment" if (run_id, number) == ("one", 0) else str(folder)  # DuckDB names no first file
        assert f"{named} was written by another version of moewh" in result.stderr
    assert [fault.path for fault in verify.check(verify.plan(layout))] == [folder / MANIFEST]
    assert moewh(layout, "verify", "--repair").exit_code == 1
    assert moewh(layout, "query", "-c", "select count(vocab_id) from routing").exit_code == 0


def in_version(layout: Layout, version: dict[str, int]) -> None:
    """Make the zero-row files claim another version of the warehouse."""
    file = layout.segment(SCHEMA_RUN, 0) / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | version, indent=1) + "\n")


def test_the_version_is_the_newest_column() -> None:
    newest = max(since for t in schema.TABLES for since in (t.since, *(column.since for column in t.columns)))
    assert newest == schema.SCHEMA_VERSION
    column = replace(schema.ROUTING.columns[0], since=NEXT)
    assert replace(schema.ROUTING, columns=(column,)).newer == (column,)
    assert all(not table.newer for table in schema.TABLES) or newest > 1
