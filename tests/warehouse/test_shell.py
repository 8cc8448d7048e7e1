"""The real DuckDB shell: on the published file in any location, and with the views that `moewh shell` gives it."""

from __future__ import annotations

import csv
import functools
import io
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import duckdb
import pytest

from moewh.warehouse.answer.parameters import kinds_of
from moewh.warehouse.answer.query import find_query
from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.publishing import publish
from moewh.warehouse.views.shipped import QUERIES, canned_names, view_names
from moewh.warehouse.views.sql import sql_string
from tests.support.forked_program import forked_moewh
from tests.support.opened import viewed
from tests.support.restored_warehouse import RestoredWarehouse
from tests.support.saved_queries import values_of
from tests.support.synthetic import (
    Prompt,
    Run,
    Token,
    random_run,
    random_warehouse,
    record_of,
    write_run,
    write_segment,
)

pytestmark = pytest.mark.published_file
MOEWH = [sys.executable, "-c", "from moewh.cli.main import main; main()"]
REPOSITORY = Path(__file__).resolve().parent.parent.parent
AWKWARD = ("plain", "with space", 'it\'s "quoted"', "a[b]c", "st*r", "wh?t", "ünï码", "semi;--colon")


@pytest.fixture(scope="module")
def duckdb_program() -> str:
    return find_duckdb()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A warehouse that no test changes."""
    made, _ = random_warehouse(tmp_path_factory.mktemp("shared") / "wh")
    publish(made)
    return made


@pytest.fixture(scope="module")
def restored(tmp_path_factory: pytest.TempPathFactory) -> RestoredWarehouse:
    return RestoredWarehouse(tmp_path_factory.mktemp("restored"), lambda root: random_warehouse(root)[0])


@pytest.fixture
def layout(restored: RestoredWarehouse) -> Layout:
    return restored.restore()


def shell(program: str, *arguments: str, cwd: Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [program, "-readonly", "-csv", "-noheader", *arguments]
    return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, text=True, timeout=60, check=False)


def read_write_shell(program: str, stdin: str, cwd: Path) -> str:
    """Run SQL in a shell on an empty database in memory; return what it prints, errors included."""
    done = subprocess.run(
        [program, "-csv", "-noheader"],
        cwd=cwd,
        input=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stdout.strip()


def ask(program: str, layout: Layout, sql: str, before: str = "") -> str:
    """Run SQL in a shell started somewhere else; return what it prints."""
    done = shell(program, str(layout.database), cwd=Path("/"), stdin=f"{before}{sql};")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


class Moewh:
    """The command in a process of its own, forked from one that has imported everything."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def __call__(self, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run it to its end."""
        command = [str(self.program), *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, check=False)

    def shell(self, layout: Layout, sql: str, stdin: str = "") -> str:
        """Return what SQL prints in `moewh shell`."""
        options = ("-csv", "-noheader", *(["-c", sql] if sql else []))
        done = self("shell", "--warehouse", str(layout.root), "--", *options, stdin=stdin)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout.strip()


@pytest.fixture(scope="module")
def moewh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Moewh]:
    with forked_moewh(tmp_path_factory.mktemp("forked"), models=False) as program:
        yield Moewh(program)


def test_shell_every_view_answers_as_moewh_does(duckdb_program: str, layout: Layout) -> None:
    names = view_names()
    counts = "union all ".join(f"select '{name}' as view_name, count(*) as n from {name} " for name in names)
    with open_warehouse(layout) as connection:
        expected = [f"{name},{n}" for name, n in connection.execute(counts).fetchall()]
    assert ask(duckdb_program, layout, counts).splitlines() == expected
    assert all(not line.endswith(",0") for line in expected if line.split(",")[0] in canned_names())


def test_shell_tells_every_comment(duckdb_program: str, layout: Layout) -> None:
    without = (
        "select view_name from duckdb_views() where not internal and comment is null union all "
        "select table_name || '.' || column_name from duckdb_columns() where not internal and comment is null"
    )
    assert ask(duckdb_program, layout, without) == ""
    assert "0-based" in ask(
        duckdb_program,
        layout,
        "select comment from duckdb_columns() where table_name = 'routes' and column_name = 'rank'",
    )


def test_shell_attached_beside_another_database(duckdb_program: str, layout: Layout) -> None:
    attach = f"attach '{layout.database}' as wh (read_only);\nselect count(*) > 0 from wh.routes;\n"
    assert read_write_shell(duckdb_program, attach, layout.root) == "true"


def test_shell_after_move_needs_variable_or_refresh(duckdb_program: str, layout: Layout, moewh: Moewh) -> None:
    sql = "select count(*) from co_routing"
    expected = ask(duckdb_program, layout, sql)
    moved = Layout(layout.root.rename(layout.root.parent / "elsewhere"))
    lost = shell(duckdb_program, str(moved.database), cwd=Path("/"), stdin=f"{sql};")
    assert lost.returncode == 1
    assert "No files found" in lost.stderr
    assert ask(duckdb_program, moved, sql, before=f"set variable moewh_root = '{moved.root}';") == expected
    assert moewh.shell(moved, sql) == expected
    refreshed = moewh("refresh", "--warehouse", str(moved.root))
    assert refreshed.returncode == 0, refreshed.stderr
    assert ask(duckdb_program, moved, sql) == expected


def test_shell_saved_file_on_stdin(duckdb_program: str, layout: Layout, tmp_path: Path) -> None:
    good = "set variable run = '007';\nselect count(*) > 0 from routes where run_id = getvariable('run');\n"
    done = shell(duckdb_program, str(layout.database), cwd=tmp_path, stdin=good)
    assert (done.returncode, done.stdout.strip()) == (0, "true")
    bad = shell(duckdb_program, str(layout.database), cwd=tmp_path, stdin="select nothing from routes;\nselect 1;\n")
    assert bad.returncode == 1
    assert "nothing" in bad.stderr


def test_shell_names_a_segment_that_lacks_a_rollup(duckdb_program: str, layout: Layout) -> None:
    (layout.segment("007", 1) / "pair_counts.parquet").unlink()
    done = shell(duckdb_program, str(layout.database), cwd=Path("/"), stdin="select max(lift) from co_routing;")
    assert done.returncode == 1
    assert "segment=1 lacks pair_counts.parquet" in done.stderr


SHIPPED = [path for folder in ("saved", "checks") for path in sorted((QUERIES / folder).glob("*.sql"))]


END = "-- the end of a file --"


def settings_of(path: Path) -> list[str]:
    """Return the statements that set the parameters of a shipped file."""
    values = values_of(path.stem) if path.parent.name == "saved" else {}
    return [f"set variable {name} = {sql_string(v) if isinstance(v, str) else v}" for name, v in values.items()]


@pytest.fixture(scope="module")
def printed(duckdb_program: str, shared: Layout) -> dict[Path, str]:
    """What a shell prints for each shipped file: one shell that runs them all, with their parameters set and unset."""
    lines = []
    for path in SHIPPED:
        set_them = settings_of(path)
        unset = [setting.replace("set", "reset", 1).partition(" = ")[0] for setting in set_them]
        lines += [f"{statement};" for statement in (*set_them, path.read_text(), *unset)] + [f".print {END}"]
    done = shell(duckdb_program, str(shared.database), cwd=Path("/"), stdin="\n".join(lines))
    assert (done.returncode, done.stderr) == (0, "")
    return dict(zip(SHIPPED, done.stdout.split(f"{END}\n"), strict=False))


def test_shell_runs_a_shipped_file_as_ci_does(duckdb_program: str, shared: Layout, printed: dict[Path, str]) -> None:
    """`duckdb -readonly -cmd "set variable layer=7" wh/warehouse.duckdb < file.sql`."""
    path = max(SHIPPED, key=lambda path: len(settings_of(path)))
    commands = [argument for setting in settings_of(path) for argument in ("-cmd", setting)]
    assert commands
    done = shell(duckdb_program, *commands, str(shared.database), cwd=Path("/"), stdin=f"{path.read_text()};")
    assert (done.returncode, done.stdout) == (0, printed[path]), done.stderr


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shell_runs_every_shipped_file(path: Path, printed: dict[Path, str], shared: Layout) -> None:
    with viewed(shared) as connection:
        for setting in settings_of(path):
            connection.execute(setting)
        rows = connection.execute(path.read_text()).fetchall()
    found = list(csv.reader(io.StringIO(printed[path], newline="")))
    assert len(found) == len(rows)
    for shown, row in zip(found, rows, strict=True):
        for text, value in zip(shown, row, strict=True):
            if isinstance(value, float):
                assert math.isclose(float(text), value, rel_tol=1e-6, abs_tol=1e-9)
            else:
                assert text == ("NULL" if value is None else str(value))


def source_name(value: str | Path) -> str:
    return value.stem if isinstance(value, Path) else value.rpartition(" ")[2]


@pytest.fixture(scope="module")
def shared_views(shared: Layout) -> duckdb.DuckDBPyConnection:
    """The published file of `shared`, in a database of its own whose settings tests change."""
    return duckdb.connect(str(shared.database), read_only=True)


@pytest.mark.parametrize("sql", [*(f"from {name}" for name in view_names()), *SHIPPED], ids=source_name)
@pytest.mark.parametrize("setting", ["default_order = 'desc'", "default_null_order = 'nulls_first'"])
def test_the_order_that_a_session_sets_changes_no_row(
    setting: str, sql: str | Path, shared_views: duckdb.DuckDBPyConnection, request: pytest.FixtureRequest
) -> None:
    """A `.duckdbrc` may set another order, in which ranks, paths and running sums must not be computed."""
    parameters = settings_of(sql) if isinstance(sql, Path) else []
    for parameter in parameters:
        shared_views.execute(parameter)
        request.addfinalizer(functools.partial(shared_views.execute, f"reset variable {parameter.split()[2]}"))
    asked = sql.read_text() if isinstance(sql, Path) else sql
    expected = sorted(rounded(shared_views.execute(asked).fetchall()))
    shared_views.execute(f"set {setting}")
    request.addfinalizer(functools.partial(shared_views.execute, f"reset {setting.split(maxsplit=1)[0]}"))
    assert sorted(rounded(shared_views.execute(asked).fetchall())) == expected


@pytest.mark.parametrize(
    "path", [path for path in SHIPPED if re.search(r"\((share|ratio)\):", path.read_text())], ids=source_name
)
def test_a_number_given_as_text_is_the_same_number(path: Path, shared_views: duckdb.DuckDBPyConnection) -> None:
    """`set variable min_share = '0.25'`: DuckDB would round the text to the digits of the default, 0.1."""
    query = find_query(path.stem)
    for parameter in settings_of(path):
        shared_views.execute(parameter)
    answers = []
    for value in ("0.2499", "'0.2499'", "0.2501", "'0.2501'"):
        for name in (name for name, kind in kinds_of(query).items() if kind in ("share", "ratio")):
            shared_views.execute(f"set variable {name} = {value}")
        answers.append(sorted(rounded(shared_views.execute(path.read_text()).fetchall())))
    for name in kinds_of(query):
        shared_views.execute(f"reset variable {name}")
    assert answers[0] == answers[1]
    assert answers[2] == answers[3]


def rounded(rows: list[tuple[object, ...]]) -> list[str]:
    """Return rows as texts, without the last digits of sums, which have no fixed order."""
    return [str(tuple(f"{value:.6e}" if isinstance(value, float) else value for value in row)) for row in rows]


def test_shell_view_files_run_by_themselves(duckdb_program: str, layout: Layout, tmp_path: Path) -> None:
    """A view's file is ordinary SQL: it can be read into any session that has the base views."""
    setup = f"attach '{layout.database}' as wh (read_only);\nset search_path = 'memory,wh';\n"
    sources = "".join(f".read {REPOSITORY}/queries/views/{name}.sql\n" for name in canned_names())
    sql = f"{setup}{sources}select count(*) > 0 from memory.co_routing;\n"
    assert read_write_shell(duckdb_program, sql, tmp_path) == "true"


def test_refresh_removes_stale_wal(duckdb_program: str, layout: Layout, tmp_path: Path, moewh: Moewh) -> None:
    """A killed shell leaves a log; DuckDB would replay it over the new file, and bring its table back."""
    left_behind = killed_shell_log(duckdb_program, layout, tmp_path / "other")
    wal = layout.database.with_name("warehouse.duckdb.wal")
    shutil.copy(left_behind, wal)
    assert moewh("refresh", "--warehouse", str(layout.root)).returncode == 0
    assert not wal.exists()
    assert ask(duckdb_program, layout, "select count(*) from duckdb_tables() where not internal") == "0"
    assert ask(duckdb_program, layout, "select count(*) > 0 from routes") == "true"


def killed_shell_log(program: str, layout: Layout, folder: Path) -> Path:
    """Kill a shell that has written to a copy of the published file; return the log it leaves."""
    folder.mkdir()
    shutil.copy(layout.database, folder)
    log = folder / "warehouse.duckdb.wal"
    # In its own session: the program on the PATH may start the real one, which must be killed with it.
    command = [program, str(folder / "warehouse.duckdb")]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, start_new_session=True)
    assert writer.stdin is not None
    writer.stdin.write("create table stale (i int);\n")
    writer.stdin.flush()
    deadline = time.monotonic() + 30
    while not (log.is_file() and log.stat().st_size > 0) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(writer.pid, signal.SIGKILL)
    writer.wait()
    assert log.stat().st_size > 0
    return log


def test_two_shells_stay_open_while_segments_arrive(duckdb_program: str, layout: Layout) -> None:
    command = [duckdb_program, "-readonly", "-csv", "-noheader", str(layout.database)]
    shells = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) for _ in range(2)
    ]
    count = "select count(*) from tokens where run_id = 'growing';\n"
    prompts = [Prompt([Token(1, {0: [(1, 1.0)]})])]
    try:
        assert [converse(one, count) for one in shells] == ["0", "0"]
        run = Run("growing", {0: (2, 1)}, [prompts], {"segments_planned": 3})
        write_run(layout, run)
        publish(layout)
        assert [converse(one, count) for one in shells] == ["1", "1"]
        for number in (1, 2):
            identity = record_of(run).identity
            write_segment(layout, identity, number, prompts, number, layers=run.layers, last=number == 2)
            publish(layout)
            assert [converse(one, count) for one in shells] == [str(number + 1)] * 2
    finally:
        for one in shells:
            one.communicate(timeout=30)
    assert ask(duckdb_program, layout, "select status from runs where run_id = 'growing'") == "complete"


def converse(process: subprocess.Popen[str], sql: str) -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(sql)
    process.stdin.flush()
    return process.stdout.readline().strip()


@pytest.mark.parametrize("name", AWKWARD)
def test_paths_with_special_characters(name: str, duckdb_program: str, tmp_path: Path, moewh: Moewh) -> None:
    """Beside each warehouse is one that its path would match as a pattern."""
    for decoy in ("abc", "star", "what"):
        write_run(Layout(tmp_path / decoy), random_run("decoy", 1, {0: (2, 1)}, prompts=1))
    layout = Layout(tmp_path / name)
    layout.create()
    write_run(layout, random_run("mine", 2, {0: (4, 2), 1: (4, 2)}))
    publish(layout)
    sql = "select distinct run_id from layer_transitions"
    assert ask(duckdb_program, layout, sql) == "mine"
    with open_warehouse(layout) as connection:
        assert connection.execute(sql).fetchall() == [("mine",)]
    assert moewh.shell(layout, sql) == "mine"


def test_moewh_shell_has_every_view_with_its_comments(shared: Layout, moewh: Moewh) -> None:
    counts = "union all ".join(f"select '{name}' as view_name, count(*) as n from {name} " for name in view_names())
    with open_warehouse(shared) as connection:
        expected = [f"{name},{n}" for name, n in connection.execute(counts).fetchall()]
    assert moewh.shell(shared, counts).splitlines() == expected
    without = (
        "select view_name from duckdb_views() where not internal and comment is null union all "
        "select table_name || '.' || column_name from duckdb_columns() where not internal and comment is null"
    )
    assert moewh.shell(shared, without) == ""
    started = [*MOEWH, "shell", "--warehouse", str(shared.root), "--", "-csv", "-noheader"]
    done = subprocess.run(
        started, input="select count(*) > 0\nfrom routes;\n", capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("true\n", "")


def test_moewh_shell_writes_nothing_and_passes_exit_code(layout: Layout, moewh: Moewh) -> None:
    """Its tables and views are in memory: they disappear with it, and do not affect the published file."""
    before = layout.database.read_bytes()
    done = moewh("shell", "--warehouse", str(layout.root), stdin="create table t (i int);\ndrop view routes;\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert layout.database.read_bytes() == before
    assert moewh("shell", "--warehouse", str(layout.root), stdin="delete from runs;\n").returncode == 1
    assert moewh.shell(layout, "select count(*) > 0 from routes") == "true"


def test_moewh_shell_needs_no_file_and_no_lock(duckdb_program: str, layout: Layout, moewh: Moewh) -> None:
    """A notebook that holds the published file read-write locks nobody out; nor does a damaged or missing file."""
    command = [duckdb_program, "-csv", "-noheader", str(layout.database)]
    notebook = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    try:
        assert converse(notebook, "create table mine as select 1 as x; select count(*) from mine;\n") == "1"
        assert moewh.shell(layout, "select count(*) > 0 from routes") == "true"
    finally:
        notebook.communicate(timeout=30)
    layout.database.write_text("no database")
    assert moewh.shell(layout, "select count(*) > 0 from routes") == "true"
    layout.database.unlink()
    assert moewh.shell(layout, "select count(*) > 0 from routes") == "true"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A second warehouse, in a folder whose name is a column's."""
    made = Layout(tmp_path_factory.mktemp("run_id=007") / "other")
    made.create()
    write_run(made, random_run("other", 9, {0: (4, 2)}))
    publish(made)
    return made


def test_two_warehouses_in_one_shell(duckdb_program: str, shared: Layout, other: Layout, moewh: Moewh) -> None:
    """Each view reads its own warehouse's files, whichever is attached to which; every view is compared.

    By a statement of its own: DuckDB takes four times as long to plan one for all.
    """
    views = "\n".join(
        f"select '{name}', (select count(*) from {{0}}{name}), (select count(*) from {{1}}{name});"
        for name in view_names()
    )
    counts = {}
    for layout in (shared, other):
        with open_warehouse(layout) as connection:
            counts[layout.root] = [connection.table(name).count("*").fetchall()[0][0] for name in view_names()]
    expected = [
        f"{name},{a},{b}" for name, a, b in zip(view_names(), counts[shared.root], counts[other.root], strict=True)
    ]
    assert counts[shared.root] != counts[other.root]
    attach = f"attach {sql_string(str(other.database))} as other (read_only);\n"
    in_one = f"{attach}{views.format('', 'other.')}\n"
    assert moewh.shell(shared, "", stdin=in_one).splitlines() == expected
    assert shell(duckdb_program, str(shared.database), cwd=Path("/"), stdin=in_one).stdout.splitlines() == expected
    both = f"attach '{shared.database}' as one (read_only);\n{attach}{views.format('one.', 'other.')}\n"
    assert read_write_shell(duckdb_program, both, other.root).splitlines() == expected
    with duckdb.connect() as connection:
        connection.execute(both.splitlines()[0])
        connection.execute(attach)
        asked = views.format("one.", "other.").splitlines()
        rows = [row for sql in asked for row in connection.execute(sql).fetchall()]
    assert [",".join(map(str, row)) for row in rows] == expected


@pytest.mark.parametrize("command", ["delete", "refresh", "repair"])
def test_what_writes_a_copy_publishes_its_own_file(
    command: str, duckdb_program: str, layout: Layout, moewh: Moewh
) -> None:
    """A copied warehouse's file still reads the original; any change to the copy rewrites it."""
    copy = Layout(layout.root.parent / "copy")
    shutil.copytree(layout.root, copy.root, symlinks=True)
    count = "select count(*) from runs"
    before = ask(duckdb_program, layout, count)
    if command == "delete":
        assert moewh("runs", "--delete", "007", "--yes", "--warehouse", str(copy.root)).returncode == 0
    elif command == "refresh":
        for folder in copy.root.glob("*/run_id=007"):
            folder.unlink() if folder.is_symlink() else shutil.rmtree(folder)
        assert moewh("refresh", "--warehouse", str(copy.root)).returncode == 0
    else:  # a run without its manifest goes to quarantine
        (copy.run("007") / "manifest.json").unlink()
        moewh("verify", "--repair", "--warehouse", str(copy.root))
    with open_warehouse(copy) as connection:
        ((left,),) = connection.execute(count).fetchall()
    assert str(left) != before
    assert ask(duckdb_program, copy, count) == str(left)
    assert ask(duckdb_program, layout, count) == before


def test_shell_without_program_says_how_to_get_it(layout: Layout, tmp_path: Path) -> None:
    code = f"import sys; sys.executable = {str(tmp_path / 'python')!r}; from moewh.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "shell", "--warehouse", str(layout.root)],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": str(tmp_path), "PYTHONPATH": str(REPOSITORY)},
    )
    assert done.returncode == 1
    assert done.stderr.startswith("moewh: there is no duckdb program")
    assert "duckdb-cli" in done.stderr
