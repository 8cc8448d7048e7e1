"""The `moewh` command as a user meets it: formats, parameters, errors of one line, exit codes."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Set as AbstractSet
from pathlib import Path

import click
import duckdb
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import moewh as moewh_python
from moewh.cli.failures import explain
from moewh.cli.main import COMMANDS, main
from moewh.warehouse import __version__
from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.catalog import describe_views
from moewh.warehouse.answer.export import export_names
from moewh.warehouse.answer.output import FORMATS
from moewh.warehouse.answer.query import Query, find_query, saved_names
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import canned_names, view_names
from tests.support.opened import viewed
from tests.support.synthetic import empty_warehouse, random_warehouse

REPOSITORY = Path(__file__).resolve().parent.parent.parent
ODD = """
select 1 as i, 0.1::double as d, 'a,"b"\n|' as s, null as n, '' as e, true as b, [1.5, null] as l, 'nan'::float as f
"""


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("cli") / "wh")[0]


def moewh(layout: Layout, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, arguments, input=stdin, env={"MOEWH_WAREHOUSE": str(layout.root)})


def answer(layout: Layout, *arguments: str) -> str:
    result = moewh(layout, "query", *arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def subprocess_moewh(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", f"{code}\nfrom moewh.cli.main import main; main()", *arguments]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(program, capture_output=True, text=True, check=False, env=environment, timeout=60)


# ------------------------------------------------------------------------------------------ start-up and help

HEAVY = ("torch", "pyarrow", "numpy", "rich", "transformers")


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["query"],
        ["query", "-c", "select 1"],
        ["query", "co_routing", "--format", "csv"],
        ["query", "routes"],
        ["views", "routes"],
        ["runs"],
        ["ingest", "--help"],
        ["demo", "--help"],
    ],
    ids=" ".join,
)
def test_light_commands_import_nothing_heavy(arguments: list[str], layout: Layout) -> None:
    code = (
        f"import atexit, os, sys\nos.environ['MOEWH_WAREHOUSE'] = {str(layout.root)!r}\n"
        f"atexit.register(lambda: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr))"
    )
    done = subprocess_moewh(*arguments, code=code)
    assert (done.returncode, done.stderr.strip()) == (0, "[]")
    assert done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], []], ids=["--help", "-h", "nothing"])
def test_help_lists_the_commands(arguments: list[str], layout: Layout) -> None:
    result = moewh(layout, *arguments)
    assert result.exit_code == 0
    for name in ("demo", "ingest", "query", "refresh", "runs", "shell", "views"):
        assert f"\n  {name} " in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_help_and_warehouse(name: str, layout: Layout) -> None:
    result = moewh(layout, name, "-h")
    assert result.exit_code == 0
    assert "--warehouse DIR" in result.stdout


def test_version(layout: Layout) -> None:
    assert moewh(layout, "--version").stdout == f"moewh {__version__}\n"


# ------------------------------------------------------------------------------------------ query and its formats


def test_query_csv_has_full_precision_and_tells_null_from_empty(layout: Layout) -> None:
    text = answer(layout, "-c", ODD, "--format", "csv")
    assert text == 'i,d,s,n,e,b,l,f\n1,0.1,"a,""b""\n|",,"",true,"[1.5,null]",nan\n'
    assert next(csv.DictReader(text.splitlines(keepends=True)))["s"] == 'a,"b"\n|'


def test_query_json_is_an_array_of_objects(layout: Layout) -> None:
    rows = json.loads(answer(layout, "-c", ODD, "--format", "json"))
    assert rows == [
        {"i": 1, "d": 0.1, "s": 'a,"b"\n|', "n": None, "e": "", "b": True, "l": [1.5, None], "f": "nan"},
    ]
    assert json.loads(answer(layout, "-c", "select 1 as x where false", "--format", "json")) == []


def test_query_json_of_uncommon_types(layout: Layout) -> None:
    sql = """
    select 2.50 as d, 3.0::decimal(9, 2) as w, 36893488147419103232::hugeint as h,
        timestamp '2026-01-02 03:04:05' as t, {'a': 1.5} as s, 'x'::blob as z
    """
    assert json.loads(answer(layout, "-c", sql, "--format", "json")) == [
        {"d": 2.5, "w": 3, "h": 2**65, "t": "2026-01-02 03:04:05", "s": {"a": 1.5}, "z": "x"}
    ]


def test_query_markdown_escapes(layout: Layout) -> None:
    text = answer(layout, "-c", "select 1 as i, 'a|b' as s, null as n", "--format", "markdown")
    assert text.splitlines()[0] == "| i | s | n |"
    assert text.splitlines()[1].startswith("| ---: | --- |")
    assert text.splitlines()[2] == "| 1 | a\\|b |  |"


def test_query_table_is_duckdbs_box(layout: Layout) -> None:
    text = answer(layout, "-c", "select 1 as first, 'x' as second")
    assert text.splitlines()[0].startswith("┌─")
    assert "│ first │ second  │" in text
    assert "│     1 │ x       │" in text


@pytest.mark.parametrize("name", view_names())
def test_query_every_view_in_csv_equals_duckdb(name: str, layout: Layout) -> None:
    with viewed(layout) as connection:
        expected = connection.execute(f"select count(*) from {name}").fetchall()[0][0]
    rows = list(csv.reader(answer(layout, name, "--format", "csv").splitlines(keepends=True)))
    assert len(rows) - 1 == expected


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A warehouse as `moewh refresh` makes it."""
    made = Layout(tmp_path_factory.mktemp("empty") / "new")
    assert moewh(made, "refresh").exit_code == 0
    return made


@pytest.mark.parametrize("name", view_names())
def test_query_every_view_of_an_empty_warehouse(name: str, empty: Layout) -> None:
    assert len(answer(empty, name, "--format", "csv").splitlines()) == 1


@pytest.mark.parametrize("suffix", [".csv", ".json", ".md", ".markdown", ".txt", ".parquet"])
def test_query_output_file_format_by_suffix(suffix: str, layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / f"out{suffix}"
    file.write_text("old")
    assert answer(layout, "expert_load", "-o", str(file)) == ""
    if suffix == ".parquet":
        assert pq.read_table(file).column_names[:4] == ["run_id", "layer", "expert", "tokens"]
    else:
        form = {".md": "markdown", ".markdown": "markdown", ".txt": "table"}.get(suffix, suffix[1:])
        assert file.read_text(encoding="utf-8") == answer(layout, "expert_load", "--format", form)
    assert list(tmp_path.iterdir()) == [file]


def test_query_failing_midway_leaves_the_old_file(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    file.write_text("old")
    sql = "select case when range < 90000 then range else error('late') end as x from range(100000)"
    result = moewh(layout, "query", "-c", sql, "-o", str(file))
    assert result.exit_code == 1
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_query_to_a_device_keeps_the_device(layout: Layout) -> None:
    assert answer(layout, "-c", "select 1", "-o", "/dev/null", "--format", "csv") == ""
    assert not Path("/dev/null").is_file()


def test_unsafe_statement_without_rows_prints_nothing(layout: Layout, tmp_path: Path) -> None:
    assert answer(layout, "--unsafe", "-c", f"copy (select 1 as x) to '{tmp_path / 'x.csv'}'") == ""
    assert (tmp_path / "x.csv").read_text() == "x\n1\n"


def test_a_statement_without_rows_has_nothing_to_write(layout: Layout, tmp_path: Path) -> None:
    sql = f"copy (select 1 as x) to '{tmp_path / 'x.csv'}'"
    result = moewh(layout, "query", "--unsafe", "-c", sql, "-o", str(tmp_path / "out.csv"))
    assert result.exit_code == 0
    assert result.stderr == f"moewh: the statement gives no rows, so {tmp_path / 'out.csv'} was not written.\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]


def test_query_own_file(layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "mine.sql"
    file.write_text("-- mine: a question\nselect count(*) as n from routes where layer = $layer;\n", encoding="utf-8")
    with open_warehouse(layout) as connection:
        expected = connection.execute("select count(*) from routes where layer = 2").fetchall()[0][0]
    assert answer(layout, str(file), "-p", "layer=2", "--format", "csv") == f"n\n{expected}\n"


def test_query_lists_names(layout: Layout) -> None:
    lines = answer(layout).splitlines()
    assert {line.split()[0] for line in lines} == {*canned_names(), *queries.saved_names()}
    assert all(len(line.split()) > 3 for line in lines)


def test_saved_query_is_found_and_parametrised(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "load_of.sql").write_text(
        "-- load_of: how many tokens an expert gets.\n-- expert: which; least: leave out smaller counts, default 0\n"
        "select run_id, tokens from expert_load\n"
        "where expert = getvariable('expert') and tokens >= coalesce(getvariable('least'), 0)\norder by all\n"
    )
    monkeypatch.setattr(queries, "QUERIES", tmp_path)
    assert "load_of how many tokens an expert gets." in [" ".join(line.split()) for line in answer(layout).splitlines()]
    every = answer(layout, "load_of", "-p", "expert=3", "--format", "csv").splitlines()
    some = answer(layout, "load_of", "-p", "expert=3", "-p", "least=25", "--format", "csv").splitlines()
    assert 1 < len(some) < len(every)
    assert one_line(moewh(layout, "query", "load_of"), 2) == (
        "load_of.sql needs the parameter expert. Add -p expert=VALUE."
    )
    assert "Its parameters: expert, least." in one_line(moewh(layout, "query", "load_of", "-p", "exprt=1"), 2)


# ------------------------------------------------------------------------------------------ parameters

REQUIRED: list[tuple[str, AbstractSet[str], AbstractSet[str]]] = [
    ("select getvariable('a')", {"a"}, {"a"}),
    ("select coalesce(getvariable('a'), 1)", {"a"}, set()),
    ("select COALESCE( GetVariable( 'a' ), getvariable('b'))", {"a", "b"}, {"b"}),
    ("select 1 where getvariable('a') is null or x = getvariable('a')", {"a"}, set()),
    ("-- getvariable('z')\nselect 1", set(), set()),
]


@pytest.mark.parametrize(("sql", "variables", "required"), REQUIRED)
def test_parameters_of_sql(sql: str, variables: AbstractSet[str], required: AbstractSet[str]) -> None:
    query = Query("test", sql)
    assert (query.variables, query.required) == (variables, required)


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("form", FORMATS)
def test_a_shipped_query_without_rows_says_so(form: str, tmp_path: Path) -> None:
    """On stderr; a user's own SQL does not, nor does an answer with rows."""
    layout = empty_warehouse(tmp_path / "wh")
    for words in (["domain_experts"], ["expert_load"], ["-c", "from expert_load"]):
        for written in (["-o", str(tmp_path / "x")], *([[]] if form != "parquet" else [])):
            result = moewh(layout, "query", *words, "--format", form, *written)
            assert (result.exit_code, result.stderr.count("\n")) == (0, 0 if "-c" in words else 1)
            assert result.stderr.startswith("" if "-c" in words else f"moewh: {words[0]} has no rows")
    assert moewh(random_warehouse(tmp_path / "full")[0], "query", "expert_load", "--format", "csv").stderr == ""


def one_line(result: Result, code: int) -> str:
    """Check the exit code and that stderr is one `moewh:` line; return it without the prefix."""
    assert result.exit_code == code, result.stderr
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("moewh: ")
    return result.stderr.removeprefix("moewh: ").strip()


WRONG_USE: list[tuple[list[str], str]] = [
    (["query", "co_routng"], "Did you mean co_routing? Known: co_routing, domain_specialization"),
    (["query", "nothing_like_it"], "there is no query 'nothing_like_it'. Known: co_routing"),
    (["query", "missing.sql"], "there is no SQL file missing.sql"),
    (["query", "routes", "-c", "select 1"], "not both"),
    (["query", "routes", "-p", "run=x"], 'A view takes none: select its rows in SQL, "from routes where …".'),
    (["query", "-c", "select 1", "-p", "run=x"], "-c does not use the parameter 'run'. It takes no parameters."),
    (["query", "-c", "select $a", "-p", "b=1", "-p", "a=1"], "does not use the parameter 'b'. Its parameters: a."),
    (["query", "-c", "select $a + $b", "-p", "a=1"], "needs the parameter b. Add -p b=VALUE."),
    (["query", "-c", "select getvariable('a')"], "needs the parameter a. Add -p a=VALUE."),
    (["query", "-c", "select ?"], "Give it a name"),
    (["query", "-c", "select 1", "-p", "a"], "write -p name=value"),
    (["query", "-c", "select 1", "-p", "a b=1"], "write -p name=value"),
    (["query", "-c", "select $a", "-p", "a=1", "-p", "a=2"], "-p a is given twice"),
    (["query", "-c", "select 1; select 2"], "holds 2 SQL statements. Give exactly one."),
    (["query", "-c", "-- nothing"], "holds 0 SQL statements"),
    (["query", "-c", "select 1", "--format", "xml"], "'xml' is not one of 'table', 'csv'"),
    (["query", "-c", "select 1", "--format", "parquet"], "Name a file with -o"),
    (["query", "-c", "select 1", "-o", "x.what"], "Add --format table|csv|json|jsonl|parquet|markdown"),
    (["query", "-c", "select 1", "-o", "/no/such/place/x.csv"], "there is no directory /no/such/place"),
    (["query", "-c", "select 1", "-o", "/", "--format", "csv"], "is a directory"),
    (["query", "-c", "select 1", "-o", "/"], "/ is a directory. Name a file with -o."),
    (["query", "-c", "select 1", "-o", ""], "is a directory. Name a file with -o."),
    (["query", "-c", "select '\udcff'"], "-c is not UTF-8 text. Write it in UTF-8, and use a UTF-8 locale"),
    (["query", "-c", "select 1", "--memory-limit", "-1GB"], "--memory-limit -1GB is not a size"),
    (["runs", "--warehouse", ""], "the warehouse is ''. Give a path or a URL"),
    (["query", "expert_load", "--run", "x"], "No such option '--run'. A query's parameter is given as -p run=VALUE."),
    (["query", "expert_load", "--formt", "csv"], "No such option '--formt'. Did you mean --format?"),
    (["ingest", "-model", "demo"], "No such option '-model'. Did you mean --model?"),
    (["ingest", "--prompts", "demo", "-model=demo"], "No such option '-model'. Did you mean --model?"),
    (["query", "-x", "expert_load"], "No such option '-x'. A query's parameter is given as -p x=VALUE."),
    (["import", "--format", "vllm"], "Give FORMAT by itself: `moewh import [OPTIONS] FORMAT FILE…`."),
    (["query", "--name", "expert_load"], "Give [NAME] by itself: `moewh query [OPTIONS] [NAME]`."),
    (["ingest", "--model", "demo", "--prompts"], "Option '--prompts' requires an argument. Try `moewh ingest --help`."),
    (["runs", "--yes"], "--yes is for --delete RUN"),
    (["runs", "--run", "x"], "No such option '--run'. Try `moewh runs --help`."),
    (["query", "EXPERT_LOAD"], "there is no query 'EXPERT_LOAD'. Did you mean expert_load?"),
    (["query", "-c", "select 1", "-c", "select 2"], "-c is given twice. Give it once."),
    (["report", "--domain", "code", "--domain", "prose"], "--domain is given twice. Give it once."),
    (["export", "eplb", "--run", "a", "-o", "x.npy", "--run", "b"], "--run is given twice. Give it once."),
    (["show", "--prompt", "1", "--prompt=2"], "--prompt is given twice. Give it once."),
    (["ingest", "--model", "demo", "--prompts", "demo", "--domain", "a", "--domain", "b"], "--domain is given twice."),
    (["query", "--nope"], "No such option '--nope'. A query's parameter is given as -p nope=VALUE."),
    (["views", "route"], "there is no view 'route'. Did you mean routes?"),
    (["nope"], "No such command 'nope'. Try `moewh --help`."),
    (["list"], "No such command 'list'. Try `moewh --help`."),
    (["query", "routes", "limit", "3"], "Got unexpected extra arguments (limit 3). Try `moewh query --help`."),
    (["qeury"], "No such command 'qeury'. Did you mean query? Try `moewh --help`."),
    (["query", "expert_top_tokens"], "needs the parameters expert, layer. Add -p expert=VALUE -p layer=VALUE."),
    (["refresh", "--warehouse", str(REPOSITORY / "queries")], "is not a warehouse"),
    (["report", "-o", "-"], "- is not a file. Name one with -o."),
    (["query", "routes", "-o", "-"], "- is not a file. Name one with -o; rows are printed without -o."),
]


@pytest.mark.parametrize(("arguments", "says"), WRONG_USE, ids=[" ".join(arguments) for arguments, _ in WRONG_USE])
def test_wrong_use_is_one_line_and_2(arguments: list[str], says: str, layout: Layout) -> None:
    assert says in one_line(moewh(layout, *arguments), 2)


def test_a_file_named_without_its_ending_is_suggested(
    layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.sql").write_text("select 1")
    assert (
        one_line(moewh(layout, "query", "mine"), 2) == "there is no query 'mine', but there is a file. Write mine.sql."
    )


FAILURES: list[tuple[list[str], str]] = [
    (["query", "-c", "selec 1"], 'Parser Error: syntax error at or near "selec" (line 1)'),
    (["query", "-c", "select nothing\nfrom routes"], 'Referenced column "nothing" not found'),
    (["query", "-c", "from routed"], "Table with name routed does not exist! Did you mean"),
    (["query", "-c", "select error('late') from range(3)"], "late"),
    *(
        ([*command, "--warehouse", "/no/such/warehouse"], "or name another with --warehouse.")
        for command in (
            *(["query", "routes"], ["check"], ["verify"], ["runs"], ["report"], ["show", "--prompt", "0"]),
            ["export", "eplb", "-o", "load.npy"],
        )
    ),
    (["runs", "--warehouse", "/no/such/warehouse"], "there is no warehouse"),
    (["shell", "--warehouse", "/no/such/warehouse"], "there is no warehouse"),
    (["runs", "--delete", "unknown"], "there is no run 'unknown'"),
    (["runs", "--delete", "../007"], "there is no run '../007'"),
    (["runs", "--delete", "~schema"], "Runs: 007, mixed, step-1, step-20, step-30, wide.v-1."),
]


@pytest.mark.parametrize(("arguments", "says"), FAILURES, ids=[" ".join(arguments) for arguments, _ in FAILURES])
def test_failed_work_is_one_line_and_1(arguments: list[str], says: str, layout: Layout) -> None:
    assert says in one_line(moewh(layout, *arguments), 1)


def test_unreadable_sql_file(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "latin.sql").write_bytes(b"select 'caf\xe9'")
    assert "UTF-8" in one_line(moewh(layout, "query", str(tmp_path / "latin.sql")), 2)
    for encoding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32-le"):  # some without a byte order mark
        (tmp_path / "wide.sql").write_bytes("select 1".encode(encoding))
        assert "UTF-8" in one_line(moewh(layout, "query", str(tmp_path / "wide.sql")), 2)
    assert "`moewh check` runs those of a folder" in one_line(moewh(layout, "query", f"{tmp_path}/"), 2)


def test_missing_file_in_the_warehouse(tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    (layout.segment("007", 0) / "routing.parquet").write_bytes(b"not Parquet")
    assert "routing.parquet" in one_line(moewh(layout, "query", "routes", "--format", "csv"), 1)


def test_refresh_adds_missing_schema_files(tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    (layout.segment("~schema", 0) / "hidden_states.parquet").unlink()
    assert "Run `moewh refresh`" in one_line(moewh(layout, "query", "hidden_states"), 1)
    assert moewh(layout, "refresh").stdout == f"Wrote {layout.database}.\n"
    assert answer(layout, "hidden_states", "--format", "csv") == "run_id,segment,token_id,layer,vector\n"


def test_an_answer_not_given_is_one_line_and_1() -> None:
    assert explain(click.Abort()) == ("stopped before it was done.", 1)


@pytest.mark.skipif(duckdb.__version__ < "2", reason="DuckDB 1.5 may not end as it closes after an interrupt")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize(
    "arguments",
    [
        ["query", "-c", "select count(*) from range(10000000000000)", "--format", "csv"],
        ["query", "-c", "from range(10000000000000)", "--format", "csv"],
        ["check", "{tmp}/long.sql"],
    ],
    ids=" ".join,
)
def test_a_stopped_query_is_one_line(
    number: signal.Signals, code: int, arguments: list[str], layout: Layout, tmp_path: Path
) -> None:
    (tmp_path / "long.sql").write_text("select count(*) as n from range(10000000000000) having n = 0")
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    ignored = signal.signal(number, signal.default_int_handler)  # a background shell ignores SIGINT, nohup SIGHUP
    timer = threading.Timer(0.5, os.kill, (os.getpid(), number))
    timer.start()
    try:
        result = moewh(layout, *arguments, "-o", os.devnull, "--timeout", "90")
    finally:
        timer.join()
        signal.signal(number, ignored)
    assert (result.exit_code, result.stderr.strip()) == (code, "moewh: stopped before it was done.")
    assert [path.name for path in layout.staging.iterdir()] == ["empty"]


def test_bug_of_ours_is_not_explained_away() -> None:
    assert explain(RuntimeError("something else")) is None
    assert explain(KeyError("x")) is None


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    damaged = random_warehouse(tmp_path / "wh")[0]
    for path in damaged.root.glob("segments/run_id=mixed/segment=*/routing.parquet"):
        path.write_bytes(path.read_bytes()[:-9])
    for words in (
        ["query", "routes"],
        ["show", "--prompt", "0", "--run", "mixed"],
        ["report", "-o", str(tmp_path / "r")],
    ):
        said = one_line(moewh(damaged, *words), 1)
        assert "run_id=mixed" in said and said.endswith("`moewh verify` says which files are damaged.")
    assert not (tmp_path / "r").exists()


def test_full_disk_is_one_line(layout: Layout) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-c", "from moewh.cli.main import main; main()", "query", "-c", "select 1"],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "MOEWH_WAREHOUSE": str(layout.root)},
        )
    assert (done.returncode, done.stderr) == (1, "moewh: No space left on device.\n")


@pytest.mark.parametrize("form", FORMATS)
def test_a_full_disk_is_reported_with_the_file(form: str, layout: Layout, tmp_path: Path) -> None:
    """A device is written in place; a file beside its place, under another name."""
    sql = "select range, md5(range::varchar) as x from range(20000)"
    said = one_line(moewh(layout, "query", "-c", sql, "-o", "/dev/full", "--format", form), 1)
    assert said == "/dev/full: No space left on device."
    file = tmp_path / f"x.{form}"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))"
    code = f"import resource; {limit}; import moewh.cli.main as m; m.main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "query", "-c", sql, "-o", str(file), "--format", form],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "MOEWH_WAREHOUSE": str(layout.root)},
    )
    assert (done.returncode, done.stderr) == (1, f"moewh: {file}: File too large.\n")
    assert not list(tmp_path.iterdir())


WRITING = [
    ["query", "-c", "select 1", "--format", "csv"],
    ["runs", "--format", "csv"],
    ["check"],
    ["report"],
    *(["export", name, "--run", "007"] for name in export_names()),
]
"""Every command that takes -o."""


def test_every_command_that_writes_a_file_is_tested() -> None:
    context = click.Context(main)
    commands = {name: main.get_command(context, name) for name in COMMANDS}
    taken = {
        name for name, one in commands.items() if one and any("-o" in given.opts for given in one.get_params(context))
    }
    assert {words[0] for words in WRITING} == taken


@pytest.mark.parametrize("words", WRITING, ids=lambda words: " ".join(words[:2]))
def test_what_is_no_file_is_not_written_to(words: list[str], layout: Layout, tmp_path: Path) -> None:
    """A pipe or device is written to and never replaced; a folder and `-` are refused."""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.DEVNULL) as reader:
        moewh(layout, *words, "-o", str(tmp_path / "pipe"))  # not every format can be written to a pipe
        assert (tmp_path / "pipe").is_fifo()
        reader.kill()
    for path in (tmp_path, tmp_path / "none" / "file", Path("-")):
        assert one_line(moewh(layout, *words, "-o", str(path)), 2)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


@pytest.mark.parametrize("words", WRITING, ids=lambda words: " ".join(words[:2]))
def test_a_file_is_not_written_under_the_suffix_of_another_format(
    words: list[str], layout: Layout, tmp_path: Path
) -> None:
    """A folder may have any name, and so may the file of a format that --format names."""
    plain = [word for word in words if word not in ("--format", "csv")]
    for name in ("x.pdf", "x.png", "x.pt", "x.html.gz", "x.xlsx"):
        if "tensorrt-llm" in words:
            assert moewh(layout, *plain, "-o", str(tmp_path / name)).exit_code == 0
        else:
            said = one_line(moewh(layout, *plain, "-o", str(tmp_path / name)), 2)
            assert re.search(r"ends in \.\w+ with -o|Add --format", said)
            assert not (tmp_path / name).exists()


INSIDE = ("warehouse.duckdb", "segments", "runs/run_id=007", "quarantine/x")


@pytest.mark.parametrize("inside", INSIDE)
def test_a_path_among_the_files_of_a_warehouse_is_no_warehouse(inside: str, layout: Layout) -> None:
    """Nothing is begun there, and readers learn which folder to name."""
    path = str(layout.root / inside)
    model = ["--model", "demo", "--run-id", "x"]
    for words in (["runs"], ["query", "expert_load"], ["ingest", *model, "--prompts", "demo"], ["seal"], ["refresh"]):
        said = one_line(
            CliRunner().invoke(main, [*words, "--warehouse", path]), 1 if words[0] in ("runs", "query") else 2
        )
        assert f"{path} is among the files of the warehouse {layout.root}. Name " in said
    with pytest.raises(UsageError, match="is among the files of"):
        moewh_python.Writer(path, "x", layers=[0], num_experts=2, top_k=1)
    assert not (layout.root / "quarantine").exists()


def test_an_answer_never_replaces_a_file_of_the_warehouse(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(layout.root)
    before = {path: path.stat().st_mtime_ns for path in layout.root.rglob("*") if path.is_file()}
    routing = next(iter(layout.root.glob("segments/run_id=[!~]*/segment=0/routing.parquet")))
    for path in (routing, layout.root / "runs" / "x.csv", layout.database, tmp_path / "link" / "sealed" / "x.csv"):
        for command in WRITING:
            said = one_line(moewh(layout, *command, "-o", str(path)), 2)
            assert "is among the files of the warehouse" in said
    assert {path: path.stat().st_mtime_ns for path in layout.root.rglob("*") if path.is_file()} == before
    assert moewh(layout, "runs", "-o", str(layout.root / "mine.csv")).exit_code == 0
    (layout.root / "mine.csv").unlink()
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    assert "link" in one_line(moewh(layout, "runs", "-o", str(tmp_path / "loop.csv")), 2)


@pytest.mark.parametrize(
    ("redirected", "code", "said"),
    [
        ("query -c 'select 1' >&-", 1, "moewh: Bad file descriptor.\n"),
        ("query -c 'select 1' -o OUT >&- <&-", 0, ""),
        ("query nosuch 2>&-", 2, ""),
        ("runs --delete RUN <&-", 1, "stopped before it was done.\n"),
    ],
)
def test_closed_streams(redirected: str, code: int, said: str, layout: Layout, tmp_path: Path) -> None:
    run_id = moewh(layout, "query", "-c", "select run_id from runs limit 1", "--format", "csv").stdout.split()[1]
    words = redirected.replace("OUT", str(tmp_path / "x.csv")).replace("RUN", run_id)
    program = f'{sys.executable} -c "from moewh.cli.main import main; main()" {words}'
    environment = {**os.environ, "MOEWH_WAREHOUSE": str(layout.root)}
    done = subprocess.run(program, shell=True, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.endswith(said) and "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_a_deleted_current_directory(layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "no longer exists" in one_line(moewh(layout, "runs", "--warehouse", "wh"), 1)
    assert "no longer exists" in one_line(moewh(layout, "runs", "-o", "x.csv"), 1)
    assert moewh(layout, "runs").exit_code == 0


@pytest.mark.parametrize("form", ["csv", "json", "markdown"])
def test_closed_pipe_is_quiet(form: str, layout: Layout) -> None:
    query = [
        sys.executable,
        "-c",
        "from moewh.cli.main import main; main()",
        "query",
        "-c",
        "from range(300000)",
    ]
    with subprocess.Popen(
        [*query, "--format", form],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "MOEWH_WAREHOUSE": str(layout.root)},
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(timeout=60)) == (b"", 0)


# ------------------------------------------------------------------------------------------ views and runs


def test_views_lists_every_view_with_one_line(layout: Layout) -> None:
    lines = moewh(layout, "views").stdout.splitlines()
    assert tuple(line.split()[0] for line in lines) == view_names()


def test_views_describes_columns_without_a_warehouse(tmp_path: Path) -> None:
    text = moewh(Layout(tmp_path / "none"), "views", "co_routing").stdout
    assert "conditional = N_ab / N_a" in text
    assert "\nconditional  DOUBLE     N_ab / N_a: share of" in text


@pytest.mark.parametrize("name", [*canned_names(), *saved_names()])
def test_query_describes_itself_without_a_warehouse(name: str, tmp_path: Path) -> None:
    text = moewh(Layout(tmp_path / "none"), "query", name, "--describe").stdout
    header, _, columns = text.partition("\n\n")
    assert header == (find_query(name).header if name in saved_names() else describe_views()[name].header)
    assert columns.strip()
    assert all(len(line.split()) >= 2 for line in columns.strip().splitlines())


def test_query_describes_a_users_own(tmp_path: Path) -> None:
    layout = Layout(tmp_path / "none")
    (tmp_path / "mine.sql").write_text("-- mine: what I ask\nselect layer, count(*) as n from routing group by layer\n")
    assert moewh(layout, "query", str(tmp_path / "mine.sql"), "--describe").stdout == (
        "mine: what I ask\n\nlayer  INTEGER\nn      BIGINT\n"
    )
    wrong = moewh(layout, "query", "-c", "select nothing from routing", "--describe")
    assert wrong.exit_code == 1
    assert "nothing" in wrong.stderr


def test_a_file_of_windows_and_comments_anywhere(layout: Layout, tmp_path: Path) -> None:
    """A byte order mark and CRLF hide no header; a comment names no parameter, and a text is no comment."""
    file = tmp_path / "MINE.SQL"
    sql = (
        "-- mine: a question.\r\n-- Parameters:\r\n--   at (layer): where.\r\n"
        "select $at as asked, '-- ' || getvariable('word') as \"/*\", $$--$$ as dash -- not getvariable('a') or $b\r\n"
        "/* not getvariable('c')\r\n   or $d */ where E'\\'--' <> '' -- nor ' $e"
    )
    file.write_bytes(b"\xef\xbb\xbf" + sql.encode())
    assert moewh(layout, "query", str(file), "--describe").stdout.startswith("mine: a question.\nParameters:")
    given = ("-p", "at=3", "-p", "word=w", "--format", "csv")
    assert answer(layout, str(file), *given) == "asked,/*,dash\n3,-- w,--\n"
    assert "at is a whole number" in one_line(moewh(layout, "query", str(file), "-p", "at=x", "-p", "word=w"), 2)
    for name in "abcde":
        assert "Its parameters: at, word." in one_line(moewh(layout, "query", str(file), "-p", f"{name}=1"), 2)


def test_options_of_no_query_are_refused(layout: Layout) -> None:
    for words in (["-p", "run=x"], ["-o", "x.csv"], ["--format", "csv"], ["--describe"], ["--verify"]):
        assert "give the NAME of a query" in one_line(moewh(layout, "query", *words), 2)
    assert "Give it with -c" in one_line(moewh(layout, "query", "select 1"), 2)


@pytest.mark.parametrize(
    "sql",
    [
        "select 1; copy (select 1) to '{target}'",
        "with a as (copy (select 1) to '{target}') select 1",
        "select * from read_csv('{secret}')",
        "select * from '{secret}'",
    ],
)
def test_query_describe_stays_in_the_jail(sql: str, tmp_path: Path) -> None:
    (tmp_path / "secret.csv").write_text("secret\n1\n")
    filled = sql.format(target=tmp_path / "written", secret=tmp_path / "secret.csv")
    done = moewh(Layout(tmp_path / "none"), "query", "-c", filled, "--describe")
    assert done.exit_code != 0
    assert done.stdout == ""
    assert not (tmp_path / "written").exists()


def test_several_runs_are_deleted_or_none(tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    before = moewh(layout, "runs").stdout
    result = moewh(layout, "runs", "--delete", "007", "--delete", "unknown", "--yes")
    assert "there is no run 'unknown'" in one_line(result, 1)
    assert moewh(layout, "runs").stdout == before
    done = moewh(layout, "runs", "--delete", "007", "--delete", "mixed", "--delete", "007", "--yes")
    assert done.stdout == "Deleted run 007.\nDeleted run mixed.\n"
    left = moewh(layout, "runs", "--format", "csv").stdout
    assert not {"007", "mixed"} & {line.partition(",")[0] for line in left.splitlines()}


def test_runs_lists_and_deletes(tmp_path: Path) -> None:
    layout, _ = random_warehouse(tmp_path / "wh")
    listed = moewh(layout, "runs").stdout
    assert all(name in listed for name in ("007", "mixed", "wide.v-1", "complete", "2/2"))

    refused = moewh(layout, "runs", "--delete", "007", stdin="n\n")
    assert (refused.exit_code, refused.stderr.splitlines()[-1]) == (1, "moewh: run 007 was not deleted.")
    assert "[y/N]" in refused.output
    assert "007" in moewh(layout, "runs").stdout

    assert moewh(layout, "runs", "--delete", "007", stdin="y\n").exit_code == 0
    assert moewh(layout, "runs", "--delete", "mixed", "--yes").stdout == "Deleted run mixed.\n"
    assert answer(
        layout,
        "-c",
        "select min(run_id), count(distinct run_id) as n from routes where run_id not like 'step%'",
        "--format",
        "csv",
    ) == ("min(run_id),n\nwide.v-1,1\n")
    assert not [path for path in layout.root.rglob("*") if path.name in ("run_id=007", "run_id=mixed")]
    assert [path.name for path in layout.staging.iterdir()] == ["empty"]


def test_runs_delete_killed_between_its_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever step fails, the run is whole or has no segments at all, and a second delete finishes."""
    layout, _ = random_warehouse(tmp_path / "wh")
    real_rename = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if path == layout.run("007"):
            raise OSError(5, "Input/output error", str(path))
        return real_rename(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    assert "Input/output error" in one_line(moewh(layout, "runs", "--delete", "007", "--yes"), 1)
    assert answer(layout, "-c", "select status, segments from runs where run_id = '007'", "--format", "csv") == (
        "status,segments\nrunning,0\n"
    )
    assert "007" not in answer(layout, "-c", "select distinct run_id from tokens", "--format", "csv")
    monkeypatch.undo()
    assert moewh(layout, "runs", "--delete", "007", "--yes").exit_code == 0
    assert not layout.run("007").exists()


def test_prepare_refuses_positional_parameters(layout: Layout) -> None:
    with open_warehouse(layout) as connection, pytest.raises(UsageError, match="Give it a name"):
        queries.prepare(connection, Query("test", "select $1"), {})
