"""The jail: foreign SQL reads only the warehouse and changes nothing; everything shipped still runs."""

from __future__ import annotations

import io
import os
from pathlib import Path
from stat import S_ISDIR

import duckdb
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.answer import jail, output, query
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits, open_jailed
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.shipped import view_names
from tests.support.damage import sound_warehouse
from tests.support.escapes import ESCAPES, SECRET
from tests.support.saved_queries import values_of
from tests.support.synthetic import random_warehouse

pytestmark = pytest.mark.published_file
ODD_NAMES = ["plain", "a b", "a'b", 'a"b', "[ab]", "a*", "a?b", "ünï日本", "-rf", "$HOME", "%41", "a;b", "a\nb"]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """One warehouse for the tests that only read it."""
    return random_warehouse(tmp_path_factory.mktemp("jail") / "wh")[0]


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """A warehouse with a secret beside it."""
    layout = random_warehouse(tmp_path / "wh")[0]
    for folder in (tmp_path / "outside", tmp_path / "wh-copy"):
        folder.mkdir()
        (folder / "secret.txt").write_text(SECRET)
        duckdb.execute(f"copy (select '{SECRET}' as x) to '{folder / 'secret.parquet'}'")
    (layout.root / "inside.txt").write_text("what may be read")
    with duckdb.connect(str(tmp_path / "outside" / "other.duckdb")) as connection:
        connection.execute(f"create table t as select '{SECRET}' as x")
    return layout


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"MOEWH_WAREHOUSE": str(layout.root)})


def everything(folder: Path) -> dict[Path, tuple[int, ...]]:
    """Return every path below a folder, and for files the kernel's time of their last change."""
    states = ((path, path.lstat()) for path in folder.rglob("*"))
    return {
        path: () if S_ISDIR(state.st_mode) else (state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)
        for path, state in states
    }


def fill(sql: str, layout: Layout) -> str:
    outside = layout.root.parent / "outside"
    return sql.format(
        root=layout.root, pattern=layout.root, outside=outside, secret=outside / "secret.txt", out=outside / "out"
    )


# One warehouse for all of them: each also shows that nothing changed.
def test_no_escape_succeeds(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(layout.root.parent / "outside")
    before = everything(layout.root.parent)
    for name, sql in ESCAPES.items():
        parameters = ["-p", f"moewh_root={layout.root.parent}/outside"] if name == "moewh_root" else []
        result = moewh(layout, "query", "-c", fill(sql, layout), "--format", "csv", *parameters)
        assert (name, result.exit_code) in ((name, 1), (name, 2)), result.output
        assert SECRET not in result.output, name
        assert len(result.stderr.splitlines()) == 1, result.stderr
        assert everything(layout.root.parent) == before, name
    assert len(ESCAPES) >= 30


@pytest.mark.parametrize("name", ["read_text", "copy into the warehouse", "logging to a file", "two statements"])
def test_checks_run_in_it_too(name: str, layout: Layout) -> None:
    file = layout.root.parent / "mine.sql"
    file.write_text(fill(ESCAPES[name], layout))
    before = everything(layout.root.parent)
    result = moewh(layout, "check", str(file))
    assert result.exit_code in (1, 2)
    assert SECRET not in result.output
    assert everything(layout.root.parent) == before


def gets_out(name: str, layout: Layout) -> bool:
    """Return whether an escape shows the secret or changes a file."""
    before = everything(layout.root.parent)
    result = moewh(layout, "query", "-c", fill(ESCAPES[name], layout), "--format", "csv")
    return SECRET in result.output or everything(layout.root.parent) != before


@pytest.mark.parametrize("name", ["read_text", "read_parquet", "from file name", "list of files"])
def test_without_the_closed_directories_files_are_read(
    name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not gets_out(name, layout)
    monkeypatch.setattr(jail, "_lock", lambda *_: None)
    assert gets_out(name, layout)


@pytest.mark.parametrize("name", ["copy into the warehouse", "copy over a segment", "copy, explained"])
def test_without_the_subquery_files_are_written(name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writers cast a result's columns in a query around it, which is a second layer; it is removed too."""
    assert not gets_out(name, layout)
    monkeypatch.setattr(output, "write", lambda answer, *_: answer.execute())
    assert not gets_out(name, layout)
    monkeypatch.setattr(jail, "jailed_statement", lambda _connection, _source, sql: sql)
    assert gets_out(name, layout)


@pytest.mark.skipif(duckdb.__version__ >= "2", reason="since 2.0 the lock stops it")
@pytest.mark.parametrize("name", ["logging to a file", "logging in a string", "logging, serialised"])
def test_without_the_list_of_readers_logging_passes_the_lock(
    name: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["query", "-c", fill(ESCAPES[name], layout)]
    assert moewh(layout, *arguments).exit_code == 2
    monkeypatch.setattr(jail, "_table_functions", lambda _tree: set())
    assert moewh(layout, *arguments).exit_code == 0


def test_unsafe_lifts_it_by_name(layout: Layout) -> None:
    secret = layout.root.parent / "outside" / "secret.txt"
    sql = f"select content from read_text('{secret}')"
    refused = moewh(layout, "query", "-c", sql)
    assert "--unsafe" in refused.stderr
    assert SECRET in moewh(layout, "query", "--unsafe", "-c", sql).output


@pytest.mark.parametrize(
    "sql",
    [
        "select 1 as x;",
        "select 1 as x -- said;\n;",
        "-- a; header\nselect 1 as x /* ; */ ; -- the end;",
        "from (select 1 as x)",
        "with a as (select 1 as x) from a",
        "values (1)",
        "(select 1 as x) order by 1",
        "select ';' as s, $$a;b$$ as t, 1 as \"x;\"",
        "describe routes",
        "show tables",
        "summarize runs",
        "pivot (select 1 as a, 2 as b) on a in (1) using sum(b)",
        "from range(3)",
        "from duckdb_columns()",
        "from read_parquet('{root}/segments/run_id=007/segment=*/tokens.parquet')",
        "from parquet_metadata('{root}/segments/run_id=007/segment=0/tokens.parquet')",
        "from glob('{root}/segments/*')",
        "select count(*) over () from routes limit 3",
    ],
)
def test_what_reads_the_warehouse_is_allowed(sql: str, shared: Layout) -> None:
    result = moewh(shared, "query", "-c", sql.format(root=shared.root), "--format", "csv")
    assert (result.exit_code, result.stderr) == (0, "")


def test_everything_shipped_runs(shared: Layout) -> None:
    """All in one jail, as CSV and as a table by turns; `test_roots_of_any_name` opens one for each.

    `test_check_sound_warehouse` shows that the checks run.
    """
    with open_engine("duckdb", None, shared, Limits()) as ask:
        for number, name in enumerate((*view_names(), *query.saved_names())):
            found = query.find_query(name)
            values = values_of(name) if found.required else {}
            answer = ask(found, {key: str(values[key]) for key in found.required})
            assert answer is not None
            output.write(answer, ("csv", "table")[number % 2], None, text := io.StringIO())
            assert text.getvalue(), name


def test_the_published_file_is_not_opened(layout: Layout) -> None:
    """Whoever passes on a warehouse may have put any view into it, so moewh makes its own."""
    with duckdb.connect(str(layout.database)) as connection:
        connection.execute("create view expert_load as select 'hostile' as x")
    assert "hostile" not in moewh(layout, "query", "expert_load").output
    layout.database.write_text("no database")
    assert moewh(layout, "query", "expert_load").exit_code == 0


def test_answers_keep_their_order_inside(shared: Layout) -> None:
    rows = moewh(shared, "query", "-c", "select range as x from range(5000) order by hash(range)", "--format", "csv")
    expected = duckdb.execute("select range from range(5000) order by hash(range)").fetchall()
    assert rows.stdout.split()[1:] == [str(row[0]) for row in expected]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_roots_of_any_name(name: str, tmp_path: Path) -> None:
    layout = sound_warehouse(tmp_path / name)
    (tmp_path / name / "a.txt").write_text("inside")
    (tmp_path / "b.txt").write_text("outside")
    output = tmp_path / f"{name}.parquet"
    assert moewh(layout, "query", "expert_load", "-o", str(output)).exit_code == 0
    assert output.is_file()
    outside = str(tmp_path / "b.txt").replace("'", "''")
    assert moewh(layout, "query", "-c", f"select content from read_text('{outside}')").exit_code == 1


@pytest.mark.parametrize("name", ["a\\b", "a\udcffb"])
def test_roots_that_duckdb_cannot_name_are_refused(name: str, tmp_path: Path) -> None:
    result = moewh(Layout(tmp_path / name), "refresh")
    assert (result.exit_code, "DuckDB cannot" in result.stderr) == (2, True), result.output
    assert list(tmp_path.iterdir()) == []


def test_root_through_a_link_or_dots(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(layout.root)
    for root in (tmp_path / "link", tmp_path / "outside" / ".." / "wh"):
        result = moewh(layout, "query", "expert_load", "--format", "csv", "--warehouse", str(root))
        assert (result.exit_code, result.stderr) == (0, "")


# ------------------------------------------------------------------------------------------ limits


@pytest.mark.parametrize(
    "sql",
    ["select count(*) from range(1000000000000)", "select sleep_ms(60000)", "from range(1000000000000)"],
)
def test_timeout_stops_a_query(sql: str, shared: Layout) -> None:
    result = moewh(shared, "query", "-c", sql, "--timeout", "0.3", "-o", os.devnull, "--format", "csv")
    assert (result.exit_code, result.stderr) == (1, "moewh: the query took longer than --timeout 0.3 seconds.\n")


def test_timeout_lets_a_quick_query_be(shared: Layout) -> None:
    assert moewh(shared, "query", "-c", "select 1", "--timeout", "60").exit_code == 0
    assert moewh(shared, "query", "-c", "select 1", "--timeout", "0").exit_code == 2


def test_memory_limit(shared: Layout) -> None:
    heavy = "select count(distinct hash(range)), max(md5(range::varchar)) from range(30000000)"
    result = moewh(shared, "query", "-c", heavy, "--memory-limit", "1MB", "--timeout", "60")
    assert (result.exit_code, "Out of Memory" in result.stderr) == (1, True), result.output
    assert "is not a size" in moewh(shared, "query", "-c", "select 1", "--memory-limit", "much").stderr


def test_spill_is_private_and_removed(shared: Layout) -> None:
    with open_jailed(shared, Limits(memory="50MB")) as connection:
        (scratch,) = shared.staging.glob("query.*")
        assert scratch.stat().st_mode & 0o077 == 0
        rows = connection.execute(
            "select count(*) from (select range, md5(range::varchar) as m from range(2000000) order by m)"
        ).fetchall()
        assert rows == [(2_000_000,)]
    assert list(shared.staging.glob("query.*")) == []


@pytest.mark.parametrize("sql", ["begin", "checkpoint", "use memory", "load httpfs", "vacuum", "explain select 1"])
def test_a_statement_that_is_no_query_is_named_as_such(sql: str, layout: Layout) -> None:
    """In parentheses, some read like the name of a table."""
    result = moewh(layout, "query", "-c", sql, "--format", "csv")
    assert (result.exit_code, "-c is not a query that moewh can check" in result.output) == (2, True)
