"""`moewh check`: faults are printed and make it fail; the writer's own output has none."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.answer.parameters import kinds_of
from moewh.warehouse.answer.query import Query
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.check import shipped_checks
from moewh.warehouse.views.shipped import QUERIES
from tests.support.damage import fresh_copy
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, random_warehouse, write_run


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("sound") / "wh")[0]


@pytest.fixture
def layout(sound: Layout) -> Layout:
    """A copy to damage."""
    return fresh_copy(sound)


@pytest.fixture
def few(layout: Layout) -> Layout:
    """A copy to damage that holds two runs, 007 and the sealed one called mixed: rollups are compared run by run."""
    for run in layout.root.glob("*/run_id=[!~]*"):
        if run.name not in ("run_id=007", "run_id=mixed"):
            shutil.rmtree(run)
    return layout


WITHOUT_ROWS = Run("none", {0: (2, 1)}, [[Prompt([Token(1, {})])]])


def check(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["check", *arguments], env={"MOEWH_WAREHOUSE": str(layout.root)})


@pytest.fixture(scope="module")
def checked(sound: Layout) -> Result:
    """The output for the sound warehouse."""
    return check(sound)


def test_check_sound_warehouse(checked: Result) -> None:
    assert checked.exit_code == 0, checked.output
    assert checked.stdout.splitlines() == [*(f"{path.stem}: ok" for path in _files()), "rollups: ok"]


def test_check_empty_warehouse(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    for arguments in ([], ["--format", "json"]):
        result = check(layout, *arguments)
        assert (result.exit_code, result.stdout) == (1, "")
        assert "has no runs with rows: nothing was checked" in result.stderr


def test_check_of_a_run_without_rows_is_not_passed(tmp_path: Path) -> None:
    layout = empty_warehouse(tmp_path / "wh")
    write_run(layout, WITHOUT_ROWS)
    (tmp_path / "mine.sql").write_text("select layer from expert_load where share > 0.9")
    result = check(layout, str(tmp_path / "mine.sql"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert "has no routing rows: nothing was checked" in result.stderr


@pytest.mark.parametrize("named", ["run_id = getvariable('run')", "run_id = $run", "getvariable('run') = run_id"])
@pytest.mark.parametrize("run", ["none", "begun"])
def test_check_of_one_run_without_rows_among_others_is_not_passed(
    run: str, named: str, layout: Layout, tmp_path: Path
) -> None:
    begun = Run("begun", {0: (2, 1)}, [])
    write_run(layout, replace(begun, fields={"segments_planned": 2}) if run == "begun" else WITHOUT_ROWS)
    (tmp_path / "mine.sql").write_text(f"select layer from expert_load where {named} and share > 0.9")
    for arguments in ([str(tmp_path / "mine.sql")], []):
        result = check(layout, *arguments, "-p", f"run={run}")
        assert (result.exit_code, result.stdout) == (1, "")
        assert f"run {run} has no routing rows: nothing was checked" in result.stderr
    assert check(layout, str(tmp_path / "mine.sql"), "-p", "run=007").stdout == "mine: ok\n"


def test_check_of_a_run_that_was_imported_as_counts_only(layout: Layout, tmp_path: Path) -> None:
    """It has a load to check, and no rows."""
    recorded = layout.segment("007", 0)
    rewrite(recorded, schema.SEGMENTS, lambda rows: rows[0].update(routing_rows=0))
    rewrite(layout.segment("007", 1), schema.SEGMENTS, lambda rows: rows[0].update(routing_rows=0))
    (tmp_path / "mine.sql").write_text("select layer from expert_load where run_id = $run and share > 0.1")
    assert "mine: layer = " in check(layout, str(tmp_path / "mine.sql"), "-p", "run=007").stdout


def test_check_names_the_wrong_count(few: Layout) -> None:
    file = few.segment("007", 1) / "pair_counts.parquet"
    rows = pq.read_table(file, partitioning=None).to_pylist()
    rows[0]["tokens"] += 5
    pq.write_table(pa.Table.from_pylist(rows, schema.PAIR_COUNTS.arrow()), file)
    result = check(few)
    assert result.exit_code == 1
    assert "rollups: run 007, segment 1, pair_counts: kind = " in result.stdout
    assert f"stored tokens = {rows[0]['tokens']}, the rows give tokens = {rows[0]['tokens'] - 5}" in result.stdout
    assert result.stdout.endswith("rollups: 1 fault\n")


def test_check_names_a_token_with_a_row_missing(few: Layout) -> None:
    file = few.segment("mixed", 0) / "routing.parquet"
    rows = pq.read_table(file, partitioning=None).to_pylist()
    lost = next(row for row in rows if row["layer"] == 3 and row["rank"] == 2)
    rows.remove(lost)
    pq.write_table(pa.Table.from_pylist(rows, schema.ROUTING.arrow()), file)
    result = check(few)
    assert result.exit_code == 1
    assert (
        f"choices_per_token: run_id = mixed, segment = 0, layer = 3, token_id = {lost['token_id']}, "
        "choices = 2, top_k = 3" in result.stdout
    )


def rewrite(folder: Path, table: schema.Table, change: Callable[[list[dict[str, Any]]], object]) -> None:
    """Change a table's rows in place."""
    rows = pq.read_table(folder / table.file, partitioning=None).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, table.arrow()), folder / table.file)


def of(layer: int, rank: int, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return next(row for row in rows if row["layer"] == layer and row["rank"] == rank)


def in_place(table: schema.Table, change: Callable[[list[dict[str, Any]]], object]) -> Callable[[Layout], None]:
    """Damage the first segment of the checkpoint with logits: layers 0 (6 experts, top-2), 3 (5, 3), 4 (4, 2)."""
    return lambda layout: rewrite(layout.segment("step-20", 0), table, change)


DAMAGE: dict[str, list[tuple[Callable[[Layout], None], str]]] = {
    "choices_per_token": [
        (in_place(schema.ROUTING, lambda rows: rows.remove(of(3, 2, rows))), "choices = 2, top_k = 3")
    ],
    "ranks_and_weights": [
        (in_place(schema.ROUTING, lambda rows: of(3, 2, rows).update(weight=9.0)), "weight = 9.0"),
        (in_place(schema.ROUTING, lambda rows: of(3, 1, rows).update(rank=3)), "choice = 3, place = 2"),
        (
            in_place(schema.ROUTING, lambda rows: of(3, 1, rows).update(expert=of(3, 0, rows)["expert"])),
            "choice = 1, place = 1",
        ),
        (
            in_place(
                schema.ROUTING,
                lambda rows: (of(0, 0, rows).update(expert=5, weight=0.5), of(0, 1, rows).update(expert=1, weight=0.5)),
            ),
            "expert = 1, previous_expert = 5, weight = 0.5, previous_weight = 0.5",
        ),
    ],
    "experts_in_range": [
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(expert=5)), "layer = 3, expert = 5"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(expert=-1)), "layer = 3, expert = -1"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(layer=1)), "layer = 1"),
    ],
    "finite_weights": [
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(weight=math.nan)), "routing_rows = 1"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(weight=-math.inf)), "routing_rows = 1"),
    ],
    "finite_logits": [
        (in_place(schema.ROUTER_LOGITS, lambda rows: rows[0].update(logits=[math.nan, math.inf])), "logits = 2"),
        (in_place(schema.ROUTER_LOGITS, lambda rows: rows[0].update(logits=[None, 1.0])), "logits = 1"),
    ],
    "known_tokens": [
        (in_place(schema.TOKENS, lambda rows: rows.pop(1)), "token_id = 1, lacks = tokens"),
        (in_place(schema.PROMPTS, lambda rows: rows.pop(0)), "token_id = 0, lacks = prompts"),
    ],
    "positions": [
        (in_place(schema.TOKENS, lambda rows: rows.pop(0)), "prompt_id = 0, "),
        (in_place(schema.TOKENS, lambda rows: rows[1].update(position=0)), "prompt_id = 0, "),
        (in_place(schema.TOKENS, lambda rows: rows[1].update(token_id=5)), "wrong_ids = 1"),
    ],
    "prompt_tokens": [(in_place(schema.PROMPTS, lambda rows: rows[2].update(num_tokens=1)), "num_tokens = 1, ")],
    "segment_totals": [
        (in_place(schema.SEGMENTS, lambda rows: rows[0].update(tokens=7)), "tokens = 7, "),
        (in_place(schema.SEGMENTS, lambda rows: rows[0].update(prompts=7)), "prompts = 7, "),
        (in_place(schema.ROUTING, lambda rows: rows.pop()), "routing_rows_found"),
    ],
    "complete_runs": [
        (lambda layout: shutil.rmtree(layout.segment("step-20", 1)), "run_id = step-20, status = running, segments = 1")
    ],
    "co_routing_sums": [
        (in_place(schema.PAIR_COUNTS, lambda rows: rows[0].update(tokens=99)), "run_id = step-20"),
        (in_place(schema.PAIR_COUNTS, lambda rows: rows.clear()), "run_id = step-20"),
    ],
    "transition_sums": [
        (in_place(schema.TRANSITION_COUNTS, lambda rows: rows[0].update(tokens=999)), "experts_over = 1"),
        (in_place(schema.TRANSITION_COUNTS, lambda rows: rows[0].update(first_choice_tokens=99)), "run_id = step-20"),
    ],
    "domain_sums": [(in_place(schema.EXPERT_COUNTS, lambda rows: rows[0].update(tokens=99)), "run_id = step-20")],
    "routing_copies": [
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(vocab_id=99)), "layer = 3"),
        (in_place(schema.ROUTING, lambda rows: of(3, 1, rows).update(vocab_id=None)), "layer = 3"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(kind="generated")), "layer = 3"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(prompt_id=99)), "layer = 3"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(domain="other")), "layer = 3"),
        (in_place(schema.ROUTING, lambda rows: of(3, 0, rows).update(domain=None)), "layer = 3"),
    ],
    "known_texts": [
        (
            lambda layout: rewrite(
                layout.run("step-20"), schema.VOCABULARY, lambda rows: rows[3].update(token="another")
            ),
            "vocabulary_token = another",
        ),
        (lambda layout: rewrite(layout.run("step-20"), schema.VOCABULARY, lambda rows: rows.clear()), "token = "),
    ],
    "load_sums": [(in_place(schema.EXPERT_COUNTS, lambda rows: rows[0].update(tokens=99)), "run_id = step-20")],
}
"""Check → the damage that makes it fail, and its output."""


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [(name, damage, said) for name, cases in DAMAGE.items() for damage, said in cases],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_sees_its_fault(name: str, damage: Callable[[Layout], None], said: str, layout: Layout) -> None:
    damage(layout)
    result = check(layout, str(QUERIES / "checks" / f"{name}.sql"))
    assert result.exit_code == 1, result.output
    assert f"{name}: run_id = step-20" in result.stdout
    assert said in result.stdout


def test_every_check_is_seen_to_fail() -> None:
    assert sorted(DAMAGE) == [path.stem for path in _files()]


def test_check_runs_the_users_own(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "good.sql").write_text("select 1 as x where false")
    (tmp_path / "mine" / "bad.SQL").write_text("select range as n from range(25)")
    result = check(layout, str(tmp_path / "mine"))
    assert result.exit_code == 1
    lines = result.stdout.replace("bad.SQL", "bad").splitlines()
    assert lines[0] == "bad: n = 0"
    assert lines[20:] == ["bad: and 5 more", "bad: 25 faults", "good: ok"]
    assert check(layout, str(tmp_path / "mine" / "good.sql")).exit_code == 0


def test_checks_in_subfolders_run_too(layout: Layout, tmp_path: Path) -> None:
    """A check is named by its path below the folder, and by its whole path where another has the same name."""
    mine, yours = tmp_path / "mine", tmp_path / "yours"
    for folder in (mine / "deep" / "er", mine / ".git", yours):
        folder.mkdir(parents=True)
    (mine / "good.sql").write_text("select 1 as x where false")
    (mine / "deep" / "er" / "bad.sql").write_text("select 1 as x")
    (mine / ".git" / "hidden.sql").write_text("not SQL")
    (mine / "deep" / "notes.txt").write_text("not SQL")
    result = check(layout, str(mine))
    assert (result.exit_code, result.stdout) == (1, "deep/er/bad: x = 1\ndeep/er/bad: 1 fault\ngood: ok\n")
    (mine / "good.sql").unlink()
    assert check(layout, str(mine)).exit_code == 1
    (yours / "bad.sql").write_text("select 1 as x where false")
    lines = check(layout, str(mine / "deep" / "er"), str(yours)).stdout.splitlines()
    assert lines == [f"{mine}/deep/er/bad: x = 1", f"{mine}/deep/er/bad: 1 fault", f"{yours}/bad: ok"]
    (mine / "deep" / "up").symlink_to(mine)
    result = check(layout, str(mine))
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is a link to" in result.stderr


@pytest.mark.parametrize("mark", ["\x1b[2J", "\n", "\r", "\u2028", "\u202e", "\x9b"])
def test_no_value_of_a_fault_reaches_the_terminal_as_it_is(mark: str, layout: Layout, tmp_path: Path) -> None:
    """It could clear the screen, or pass for the line of another check."""
    (tmp_path / "odd.sql").write_text(f"select 'a{mark}other: ok' as value")
    (tmp_path / "wrong.sql").write_text(f"select error('a{mark}b')")
    result = check(layout, str(tmp_path))
    assert result.exit_code == 2
    assert mark not in result.stdout.replace("\n", "", 2) and mark not in result.stderr.removesuffix("\n")
    assert [line.partition(": ")[0] for line in result.stdout.split("\n")] == ["odd", "odd", ""]


def test_a_check_that_cannot_run_is_named_and_the_others_run(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "broken.sql").write_text("select * from nope")
    (tmp_path / "mine" / "faulty.sql").write_text("select 1 as n")
    result = check(layout, str(tmp_path / "mine"))
    assert result.exit_code == 2
    assert result.stderr.startswith("moewh: broken: ")
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout.splitlines() == ["faulty: n = 1", "faulty: 1 fault"]


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


@pytest.mark.parametrize("query", shipped_checks(), ids=lambda query: query.source)
def test_shipped_check_takes_a_run(query: Query) -> None:
    assert (query.variables, kinds_of(query)) == ({"run"}, {"run": "run"})


WITHOUT_PLACES = {"known_tokens", "positions"}
"""Their damage hides that of the checks that look up a row's token."""


@pytest.mark.parametrize("names", [WITHOUT_PLACES, DAMAGE.keys() - WITHOUT_PLACES], ids=["tokens", "others"])
def test_check_of_one_run_looks_at_that_run_alone(names: set[str], layout: Layout) -> None:
    """One run has the damage that each check sees, the other none."""
    for name in sorted(names):
        damage, _ = DAMAGE[name][0]
        damage(layout)
    files = [str(path) for path in _files()]
    assert check(layout, *files, "-p", "run=step-30").stdout == "".join(f"{name}: ok\n" for name in sorted(DAMAGE))
    found = check(layout, *files, "-p", "run=step-20").stdout
    assert [name for name in names if f"{name}: run_id = step-20" not in found] == []


def test_rollups_of_one_run(layout: Layout) -> None:
    rewrite(layout.segment("007", 1), schema.PAIR_COUNTS, lambda rows: rows[0].update(tokens=99))
    assert "rollups: ok" in check(layout, "-p", "run=mixed").stdout
    assert "rollups: 1 fault" in check(layout, "-p", "run=007").stdout


WRONG_PARAMETERS = {
    "a run that is not there": (["-p", "run=step-2"], 1, "there is no run 'step-2'. Did you mean 'step-20'"),
    "a number like a run": (["-p", "run=7"], 1, "there is no run '7'. Runs: 007, mixed, step-1"),
    "a name that no check uses": (["-p", "rnu=007"], 2, "no check uses the parameter 'rnu'. Their parameters: run."),
    "no value": (["-p", "run"], 2, "write -p name=value"),
}


@pytest.mark.parametrize("case", WRONG_PARAMETERS)
@pytest.mark.parametrize("form", ["text", "json", "junit"])
def test_wrong_parameters_of_a_check(case: str, form: str, layout: Layout, tmp_path: Path) -> None:
    arguments, code, says = WRONG_PARAMETERS[case]
    (tmp_path / "report").write_text("old")
    result = check(layout, *arguments, "--format", form, "-o", str(tmp_path / "report"))
    assert (result.exit_code, result.stdout) == (code, "")
    assert says in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert (tmp_path / "report").read_text() == "old"


@pytest.mark.parametrize(
    "compared", ["run_id = getvariable('run')", "getvariable('run')::varchar = run_id", "run_id = $run"]
)
def test_the_users_check_of_a_run_that_is_not_there(compared: str, layout: Layout, tmp_path: Path) -> None:
    file = tmp_path / "mine.sql"
    file.write_text(f"select layer from load_balance where {compared} and max_over_mean > 1000")
    assert check(layout, str(file), "-p", "run=007").stdout == "mine: ok\n"
    result = check(layout, str(file), "-p", "run=nope")
    assert (result.exit_code, result.stdout) == (1, "")
    assert check(layout, str(file)).exit_code == 2


HOSTILE = """
select chr(0) || chr(27) || chr(13) || '<a b="c">&]]>\t' || chr(10) || 'é日' || chr(65535) as s, range as n
from range(25)
"""


def test_check_reports_in_junit(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    for name, sql in (("a<&", HOSTILE), ("broken", "select * from nope"), ("good", "select 1 as x where false")):
        (tmp_path / "mine" / f"{name}.sql").write_text(sql)
    result = check(layout, str(tmp_path / "mine"), "--format", "junit", "-o", str(tmp_path / "r.xml"))
    assert (result.exit_code, result.stdout) == (2, "")
    suite = ElementTree.parse(tmp_path / "r.xml").getroot().find("testsuite")
    assert suite is not None
    assert [suite.get(name) for name in ("tests", "failures", "errors")] == ["3", "1", "1"]
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert list(cases) == ["a<&", "broken", "good"]
    assert [[child.tag for child in case] for case in cases.values()] == [["failure"], ["error"], []]
    failure, error = cases["a<&"][0], cases["broken"][0]
    assert failure.get("message") == "25 faults"
    assert (failure.text or "").startswith('s = \\x00\\x1b\\r<a b="c">&]]>\t\né日\\uffff, n = 0\n')
    assert (failure.text or "").endswith("n = 19\nand 5 more")
    assert "nope" in (error.get("message") or "")
    assert all(float(case.get("time", "")) >= 0 for case in cases.values())


def test_check_reports_in_json(layout: Layout, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    hostile = "select range as n, 'nan'::float as f, [1, null] as l, null as e, chr(0) || '\"' as s from range(1200)"
    for name, sql in (("a", hostile), ("broken", "select * from nope"), ("good", "select 1 as x where false")):
        (tmp_path / "mine" / f"{name}.sql").write_text(sql)
    result = check(layout, str(tmp_path / "mine"), "--format", "json")
    assert result.exit_code == 2
    bad, broken, good = json.loads(result.stdout)
    assert [report["check"] for report in (bad, broken, good)] == ["a", "broken", "good"]
    assert [report["status"] for report in (bad, broken, good)] == ["faults", "error", "ok"]
    assert [report["faults"] for report in (bad, broken, good)] == [1200, 0, 0]
    assert bad["rows"][3] == {"n": 3, "f": "nan", "l": [1, None], "e": None, "s": '\0"'}
    assert len(bad["rows"]) == 1000
    assert "nope" in broken["message"]


def test_check_report_of_the_shipped_ones(few: Layout) -> None:
    reports = json.loads(check(few, "--format", "json").stdout)
    assert [report["check"] for report in reports] == [*(path.stem for path in _files()), "rollups"]
    assert {report["status"] for report in reports} == {"ok"}
    rewrite(few.segment("007", 1), schema.PAIR_COUNTS, lambda rows: rows[0].update(tokens=99))
    result = check(few, "--format", "json")
    assert result.exit_code == 1
    (row,) = json.loads(result.stdout)[-1]["rows"]
    assert (row["table"], row["run_id"], row["segment"], row["stored"]) == ("pair_counts", "007", 1, "tokens = 99")


def test_the_check_that_takes_too_long_is_named(layout: Layout, tmp_path: Path) -> None:
    """Those before it count, and the report is written."""
    (tmp_path / "a.sql").write_text("select 1 as n where false")
    (tmp_path / "b.sql").write_text("select count(*) as n from range(1000000) a, range(1000000) b having n < 0")
    result = check(layout, str(tmp_path), "--timeout", "2", "-o", str(tmp_path / "out.json"))
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("moewh: b: did not finish within the --timeout")
    assert result.stderr.count("\n") == 1
    written = json.loads((tmp_path / "out.json").read_text())
    assert [(one["check"], one["status"]) for one in written] == [("a", "ok"), ("b", "error")]


CODES = {"select 1 as n": 1, "not SQL": 2, "select 1 as n where false": 0}
"""The last check → the exit code."""


@pytest.mark.parametrize(
    ("form", "last", "code"),
    [
        *(("text", last, code) for last, code in CODES.items()),
        ("json", "select 1 as n", 1),
        ("junit", "select 1 as n where false", 0),
    ],
)
def test_a_reader_that_stops_early_does_not_change_the_exit_code(
    form: str, last: str, code: int, layout: Layout, tmp_path: Path
) -> None:
    """In `set -o pipefail; moewh check | head -1`, a fault must fail the job."""
    (tmp_path / "first.sql").write_text("select 1 as n where false")
    (tmp_path / "last.sql").write_text(last)
    reader, writer = os.pipe()
    os.close(reader)
    command = ["check", str(tmp_path), "--format", form, "--warehouse", str(layout.root)]
    done = subprocess.run([sys.executable, "-m", "moewh", *command], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert done.returncode == code
    assert done.stderr.count(b"\n") == (code == 2)


def test_check_writes_text_to_a_file(layout: Layout, tmp_path: Path) -> None:
    one = str(_files()[0])
    result = check(layout, one, "-o", str(tmp_path / "report.txt"))
    assert (result.exit_code, result.stdout) == (0, "")
    assert (tmp_path / "report.txt").read_text() == check(layout, one).stdout != ""
    assert check(layout, "-o", str(tmp_path)).exit_code == 2
    for name, begins in {"r.json": "[", "r.XML": "<?xml", "r.log": "choices", "r": "choices"}.items():
        check(layout, one, "-o", str(tmp_path / name))
        assert (tmp_path / name).read_text().startswith(begins)


def _files() -> list[Path]:
    return sorted((QUERIES / "checks").glob("*.sql"))
