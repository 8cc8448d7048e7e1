"""A warehouse gives the same numbers in any location: only the path below its root determines run and segment.

Folders above the root have the name of every column of every table and view, in several letter cases; DuckDB takes such
a folder for a partition. Other folders have names that are hard to write in SQL, in patterns and in URLs.
"""

from __future__ import annotations

import csv
import io
import re
import shutil
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

import duckdb
import pytest
from click.testing import CliRunner

from moewh.cli.main import main
from moewh.warehouse.answer import output
from moewh.warehouse.answer.catalog import describe_views
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.answer.query import Query
from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import ANY_RUN, ANY_SEGMENT, PATH_VALUES, STRAYS, UNSEALED, UNSEALED_LINK, glob_literal
from moewh.warehouse.files.names import FOLDERS as LEVELS
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.publishing import publish
from moewh.warehouse.views.shipped import canned_names
from moewh.warehouse.views.sql import no_stray, sql_string
from tests.support.damage import sound_warehouse
from tests.support.synthetic import random_run, write_run

pytestmark = pytest.mark.published_file
COLUMNS = sorted({column.name for view in describe_views().values() for column in view.columns})
CASES: dict[str, Callable[[str], str]] = {"lower": str.lower, "upper": str.upper, "mixed": str.title}
FOLDERS = ["/".join(f"{case(name)}={number}" for case in CASES.values()) for number, name in enumerate(COLUMNS)]
"""For each column: a folder with its name in each case, one within the other."""
AWKWARD = [
    "run_id=x/segment=3",
    "segments/run_id=007/segment=0",
    "run_id=~schema/segment=0",
    "segment.parquet",
    "expert_counts.parquet",
    "runs",
    "run_id=",
    "=",
    "layer%3D7",
    'a b\'s "c"',
    "[x]{y}*?",
    "ünï=日本",
    "token=\n",
    "run_id=x;--",
    "$layer=1",
]
"""Folders above the root whose names are not just a column's name."""


def rows_of(tables: Iterable[schema.Table]) -> str:
    return " union all ".join(
        f"select '{table.name}' as name, count(*) as n, bit_xor(hash(t)) as digest from {table.name} as t"
        for table in tables
    )


ONE_OF_EACH_LEVEL = (schema.LAYERS, schema.TOKENS, schema.EXPERT_GEOMETRY, schema.EXPERT_COUNTS)
STORED = rows_of(schema.TABLES)
"""The content of every stored table, including its path's columns, in three numbers each."""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    layout = sound_warehouse(tmp_path_factory.mktemp("plain") / "wh")
    publish(layout)
    return layout


@pytest.fixture(scope="module")
def answers(sound: Layout) -> dict[str, str]:
    """The results where nothing above the warehouse looks like a partition."""
    assert "=" not in str(sound.root)
    return all_answers(sound)


def moewh(layout: Layout, *arguments: str, faults: int = 0) -> str:
    result = CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])
    assert result.exit_code in (0, faults), (arguments, result.output, result.exception)
    return result.stdout


def all_answers(layout: Layout) -> dict[str, str]:
    """Return the results of `moewh query` for every canned view and stored table, and of `verify` and `check`."""
    said = {}
    with open_engine("duckdb", None, layout, Limits()) as ask:  # one jail for all
        for name in canned_names():
            answer = ask(Query("-c", f"from {name} order by all"), {})
            assert answer is not None
            output.write(answer, "csv", None, text := io.StringIO())
            said[name] = text.getvalue()
    said["stored"] = moewh(layout, "query", "-c", STORED, "--format", "csv")
    said["levels"] = moewh(layout, "query", "-c", rows_of(ONE_OF_EACH_LEVEL), "--format", "csv")
    said["verify"] = moewh(layout, "verify").rpartition(": ")[2]
    said["check"] = moewh(layout, "check", "-p", "run=one", faults=1)  # which compares the rollups too
    return said


def shell_answer(database: Path, sql: str) -> str:
    command = [find_duckdb(), "-readonly", "-csv", "-noheader", str(database), sql]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def stored_in_shell(sound: Layout) -> str:
    return shell_answer(sound.database, STORED)


def linked(layout: Layout, folder: Path) -> Layout:
    """The same warehouse, reached through a link in another folder."""
    folder.mkdir(parents=True)
    (folder / "wh").symlink_to(layout.root)
    return Layout(folder / "wh")


def test_every_column_alone_above_the_root(sound: Layout, tmp_path: Path) -> None:
    """In the tables that have the column, which the folder would hide; a table without it never refers to it.

    The next test, with all columns above every table, shows that the other tables work too. One connection's views are
    pointed to each folder in turn.
    """
    with open_warehouse(sound) as connection:
        expected = dict(zip(schema.TABLES, connection.execute(STORED).fetchall(), strict=True))
        for folder in FOLDERS:
            moved = linked(sound, tmp_path / folder)
            connection.execute("set variable moewh_root = $root", {"root": str(moved.root)})
            name = folder.partition("=")[0].lower()
            having = [table for table in schema.TABLES if name in {c.name for c in table.viewed}]
            asked = having or ONE_OF_EACH_LEVEL  # for a column of canned views alone
            assert connection.execute(rows_of(asked)).fetchall() == [expected[table] for table in asked], folder
    assert len(FOLDERS) > 100


def test_all_columns_together_above_the_root(
    sound: Layout, answers: dict[str, str], stored_in_shell: str, tmp_path: Path
) -> None:
    """In `moewh query`, `verify` and `check`, and in the plain shell; each above some others and below the rest.

    In lower, upper and mixed case by turns: the test above has each column in every case.
    """
    cases = list(CASES.values())
    folders = [f"{cases[number % 3](name)}={number}" for number, name in enumerate(COLUMNS)]
    moved = Layout(tmp_path.joinpath(*folders, "wh"))
    shutil.copytree(sound.root, moved.root, symlinks=True)
    assert all_answers(moved) == answers
    publish(moved)
    assert shell_answer(moved.database, STORED) == stored_in_shell
    counts = "; ".join(f"select '{view}', count(*), count(distinct v) from {view} as v" for view in canned_names())
    rows = {view: list(csv.reader(io.StringIO(answers[view])))[1:] for view in canned_names()}
    expected = [f"{view},{len(found)},{len(set(map(tuple, found)))}" for view, found in rows.items()]
    assert shell_answer(moved.database, counts).split() == expected


@pytest.mark.parametrize("folder", AWKWARD)
def test_awkward_folders_above_the_root(
    folder: str, sound: Layout, answers: dict[str, str], stored_in_shell: str, tmp_path: Path
) -> None:
    """The jail has the folder's name for all tables; the views of every table are read in the plain shell."""
    moved = Layout(tmp_path / folder / "wh")
    shutil.copytree(sound.root, moved.root, symlinks=True)
    assert moewh(moved, "query", "-c", rows_of(ONE_OF_EACH_LEVEL), "--format", "csv") == answers["levels"]
    moewh(moved, "refresh")
    assert shell_answer(moved.database, STORED) == stored_in_shell


def test_all_awkward_folders_above_the_root(sound: Layout, answers: dict[str, str], tmp_path: Path) -> None:
    moved = Layout(tmp_path.joinpath(*AWKWARD, "wh"))
    shutil.copytree(sound.root, moved.root, symlinks=True)
    assert all_answers(moved) == answers


def test_the_root_itself_is_a_column(
    sound: Layout, answers: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named by its whole path, and by a relative one."""
    folder = tmp_path / "layer=7"
    shutil.copytree(sound.root, folder / "run_id=9", symlinks=True)
    monkeypatch.chdir(folder)
    for root in (str(folder / "run_id=9"), "run_id=9"):
        result = CliRunner().invoke(main, ["query", "-c", STORED, "--format", "csv", "--warehouse", root])
        assert result.stdout == answers["stored"]


@pytest.mark.parametrize("run_id", ["NULL", "null", "007", "2.10", "1e5", "True", "a.b-c_d"])
def test_run_ids_are_text(run_id: str, tmp_path: Path) -> None:
    """DuckDB reads a folder `run_id=NULL` as a NULL value."""
    layout = Layout(tmp_path / "wh")
    layout.create()
    write_run(layout, random_run(run_id, 1, {0: (4, 2)}))
    with open_warehouse(layout) as connection:
        for table in ("runs", "layers", "routing", "expert_counts", "expert_load"):
            found = connection.execute(f"select distinct run_id, typeof(run_id) from {table}").fetchall()
            assert found == [(run_id, "VARCHAR")], table


NEEDS_DUCKDB_2 = pytest.mark.skipif(
    duckdb.__version__ < "2", reason="DuckDB 1.5 estimates more rows here, and joins so"
)


@pytest.mark.parametrize(
    "where",
    [
        *("true", "segment = 1", "run_id = 'two'", "layer = 1"),
        pytest.param("run_id = 'one' and segment = 1", marks=NEEDS_DUCKDB_2),
    ],
)
def test_the_text_of_routes_is_looked_up_in_the_smaller_table(where: str, sound: Layout) -> None:
    """Once a filter leaves out the first file, DuckDB estimates one row, and would hash every routing row for five."""
    with open_warehouse(sound) as connection:
        ((_, plan),) = connection.execute(f"explain from routes where {where} limit 5").fetchall()
    assert re.findall(r"Join Type: (\w+)", plan)[0] == "LEFT", plan  # that of routing; RIGHT would hash its rows


@pytest.mark.parametrize(
    ("where", "files"),
    [
        ("true", 5),
        ("run_id = 'one'", 2),
        ("segment = 1", 2),
        ("run_id = 'two' and segment = 0", 1),
        ("run_id = getvariable('run')", 2),
        ("getvariable('run') is null or run_id = getvariable('run')", 2),
        ("run_id in ('one', 'none')", 2),
        ("run_id like 't%' and segment > 0", 1),
    ],
)
def test_filters_leave_out_files(where: str, files: int, sound: Layout) -> None:
    """DuckDB reads only the files of the requested run and segment."""
    with open_warehouse(sound) as connection:
        connection.execute("set variable run = 'one'")
        ((_, plan),) = connection.execute(f"explain analyze select sum(token_id) from routing where {where}").fetchall()
    assert f"Total Files Read: {files}" in " ".join(plan.split()), plan


def test_a_folder_that_is_no_segment_counts_nowhere(sound: Layout, answers: dict[str, str], tmp_path: Path) -> None:
    """A leftover copy doubles no row, and `verify` reports it."""
    strays = ("segment=old", "segment=0.old", "segment=0 (1)", "segment=00", "segment=", "segment=-1")
    copy = Layout(tmp_path / "wh")
    shutil.copytree(sound.root, copy.root, symlinks=True)
    for stray in strays:
        shutil.copytree(copy.segment("one", 0), copy.segments("one") / stray)
    shutil.copytree(copy.run("one"), copy.root / "runs" / "run_id=one (copy)")
    assert moewh(copy, "query", "-c", STORED, "--format", "csv") == answers["stored"]
    assert moewh(copy, "query", "expert_load", "--format", "csv") == answers["expert_load"]
    said = moewh(copy, "verify", faults=1)
    for stray in strays:
        assert f"segments/run_id=one/{stray}: is not the folder of a segment" in said
    assert "runs/run_id=one (copy): is not the folder of a run" in said


RUN_NAMES = [
    "a",
    "A.b-c_d",
    "007",
    "run_id",
    "x..",
    "~schema",
    "~schem",
    "~schema2",
    "~schema.old",
    "~",
    "~x",
    ".hidden",
]
RUN_NAMES += ["-x", "_x", "one (copy)", "é", "aé", "a~", "", "a=b", "a*", "a[b]", "a ", " a", "a\n", "a%20b", "日本"]
SEGMENT_NAMES = ["0", "7", "10", "999999999", "1000000000", "00", "07", "0.old", "1.old", "", "-1", "+1", " 1", "1 "]
SEGMENT_NAMES += ["1e3", "0x1", "1_000", "٣", "3é", "3\n", "old", "12345678901234567890"]


@pytest.mark.parametrize("root", ["/wh", "/run_id=a b/segment=00/wh", "/[x]{y}*?/wh"])
@pytest.mark.parametrize("folders", [*LEVELS.values(), f"{UNSEALED}/{UNSEALED_LINK}/{ANY_SEGMENT}"])
def test_patterns_leave_out_what_the_expressions_do(root: str, folders: str) -> None:
    """A pattern and its strays match exactly the folders whose names are legal values."""
    segments = SEGMENT_NAMES if ANY_SEGMENT in folders else ["0"]
    files = {
        f"{root}/{folders.replace(ANY_RUN, f'run_id={run}').replace(ANY_SEGMENT, f'segment={segment}')}/x.parquet": all(
            re.fullmatch(PATH_VALUES[column], value) for column, value in (("run_id", run), ("segment", segment))
        )
        for run in RUN_NAMES
        for segment in segments
    }
    inside = f"{glob_literal(root)}/{folders}/*"
    legal = no_stray(sql_string(root), f"{folders}/x.parquet")
    sql = f"select filename from (select unnest(?) as filename) where filename glob ? and {legal}"
    kept = {name for (name,) in duckdb.execute(sql, [list(files), inside]).fetchall()}
    assert kept == {name for name, legal in files.items() if legal}


def test_a_copy_counts_nowhere_however_the_root_is_spelled(
    sound: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`moewh_root` is a user's text, which DuckDB may return differently in the names of files."""
    copy = Layout(tmp_path / "wh")
    shutil.copytree(sound.root, copy.root, symlinks=True)
    shutil.copytree(copy.segment("one", 0), copy.segments("one") / "segment=0.old")
    shutil.copytree(copy.run("one"), copy.root / "runs" / "run_id=one (copy)")
    monkeypatch.setenv("HOME", str(tmp_path))
    sql = "select (select count(*) from routing), (select count(*) from layers)"
    with open_warehouse(sound) as connection:
        expected = connection.execute(sql).fetchall()
        connection.execute(f"set home_directory = '{tmp_path}'")
        for spelling in ("{0}/", "{0}//", "{1}/./{2}", "{1}//{2}", "~/{2}"):
            connection.execute("set variable moewh_root = $root", {"root": spelling.format(copy.root, tmp_path, "wh")})
            assert connection.execute(sql).fetchall() == expected, spelling
    assert expected[0][0] > 0


def test_the_shell_takes_the_same_characters_for_legal() -> None:
    """Its DuckDB may be of another version, with another way to read a class of characters."""
    stray = f"'run_id=a' || chr(n::integer) || 'b' glob '{STRAYS[ANY_RUN][0]}'"
    sql = f"select n from range(32, 1000) as t(n) where not {stray}"
    done = subprocess.run([find_duckdb(), "-csv", "-noheader", "-c", sql], capture_output=True, text=True, check=True)
    legal = {number for number in range(32, 1000) if re.fullmatch(PATH_VALUES["run_id"], f"a{chr(number)}b")}
    assert set(map(int, done.stdout.split())) == legal


def test_a_fault_is_reported_for_the_right_run(sound: Layout, tmp_path: Path) -> None:
    """A folder above the root is not a run that could be restored."""
    copy = Layout(tmp_path / "run_id=above" / "wh")
    shutil.copytree(sound.root, copy.root, symlinks=True)
    (copy.root / "segments" / "stray").mkdir()
    result = CliRunner().invoke(main, ["verify", "--warehouse", str(copy.root)])
    assert "segments/stray: is not the folder of a run" in result.stdout
    assert "above" not in result.stdout.replace(str(copy.root), "")
