"""Symbolic links among a warehouse's folders, to the same disk and to another: all readers follow them alike.

Links to a folder that moewh did not write, or to nothing, are refused by name. Writers fail at once where a rename
cannot reach.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.warehouse.answer import jail
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits
from moewh.warehouse.answer.query import Query
from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.views.shipped import canned_names
from tests.support.damage import faults_of, fresh_copy, sound_warehouse
from tests.support.database_file import publish_for_reading

DISKS = (Path("/dev/shm"), Path("/var/tmp"))
LINKED = ["", "segments", "runs", "geometry", "segments/run_id=one", "runs/run_id=one", "segments/run_id=one/segment=1"]
"""The link: the root, a folder of all runs, one run's, or one segment."""


INGEST = ("ingest", "--model", "demo", "--prompts", "demo", "--limit", "2", "--dtype", "float32", "--run-id", "new")


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return sound_warehouse(tmp_path_factory.mktemp("sound") / "wh")


@pytest.fixture(params=["same disk", "other disk"])
def elsewhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A folder outside the warehouse."""
    if request.param == "same disk":
        (tmp_path / "elsewhere").mkdir()
        yield tmp_path / "elsewhere"
    else:
        with other_disk(tmp_path) as folder:
            yield Path(folder)


def other_disk(tmp_path: Path) -> TemporaryDirectory[str]:
    others = [disk for disk in DISKS if disk.is_dir() and disk.stat().st_dev != tmp_path.stat().st_dev]
    if not others:
        pytest.skip(f"there is no other disk: none of {', '.join(map(str, DISKS))} is beside that of temporary files")
    return TemporaryDirectory(dir=others[0], prefix="moewh-test.")


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, [*arguments, "--warehouse", str(layout.root)])


def move_and_link(layout: Layout, name: str, elsewhere: Path) -> Path:
    """Move a folder of the warehouse elsewhere and leave a link to it; return where it went."""
    target = elsewhere / "moved [x]"
    shutil.move(layout.root / name, target)
    (layout.root / name).symlink_to(target)
    return target


COUNTS = "select count(*), (select count(*) from runs), (select count(*) from layers) from routes"


def views(layout: Layout) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of every view, as `moewh query` reads them: all in one jail."""
    rows = {}
    with open_engine("duckdb", None, layout, Limits()) as ask:
        for view in (*canned_names(), "runs", "expert_geometry"):
            answer = ask(Query("-c", f"from {view} order by all"), {})
            assert answer is not None
            rows[view] = answer.execute().fetchall()
    return rows


def said(layout: Layout) -> list[str]:
    """Return the output of the other reading commands for a warehouse."""
    counts = ("query", "-c", COUNTS, "--format", "csv")
    return [moewh(layout, *command).stdout for command in (("check", "-p", "run=one"), ("runs",), counts)]


@pytest.fixture(scope="module")
def published(sound: Layout) -> bytes:
    """The published file of a copy, which names the path of all of them."""
    layout = fresh_copy(sound)
    publish_for_reading(layout)
    return layout.database.read_bytes()


@pytest.fixture(scope="module")
def expected(sound: Layout) -> tuple[dict[str, list[tuple[Any, ...]]], list[str]]:
    """The results without any link."""
    return views(sound), said(sound)


@pytest.mark.parametrize(
    ("name", "elsewhere"),
    [(name, "other disk" if number % 2 else "same disk") for number, name in enumerate(LINKED)],
    indirect=["elsewhere"],
)
def test_all_that_reads_follows_links(
    name: str,
    sound: Layout,
    published: bytes,
    expected: tuple[dict[str, list[tuple[Any, ...]]], list[str]],
    elsewhere: Path,
) -> None:
    layout = fresh_copy(sound)
    layout.database.write_bytes(published)
    move_and_link(layout, name, elsewhere)
    for view, rows in views(layout).items():
        assert repr(rows) == repr(expected[0][view]), view  # as text, in which NaN equals NaN
        assert rows or view in ("router_saturation", "router_confidence")
    direct = f"select count(*) as n from read_parquet('{layout.root}/segments/run_id=one/segment=*/tokens.parquet')"
    assert moewh(layout, "query", "-c", direct).exit_code == 0
    assert faults_of(layout) == []
    assert said(layout) == expected[1]  # the check compares the rollups
    command = [find_duckdb(), "-readonly", "-csv", "-noheader", str(layout.database), COUNTS]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert shown == expected[1][-1].splitlines()[1]


def test_a_link_within_a_segment_stays_out(sound: Layout, tmp_path: Path) -> None:
    """Links are followed where moewh has folders, not for single files of a segment."""
    layout = fresh_copy(sound)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    file = layout.segment("one", 0) / "tokens.parquet"
    shutil.move(file, elsewhere / "tokens.parquet")
    file.symlink_to(elsewhere / "tokens.parquet")
    assert moewh(layout, "query", "-c", "from tokens").exit_code == 1
    move_and_link(layout, "segments/run_id=one/segment=0", elsewhere)
    (elsewhere / "secret.txt").write_text("the secret outside")
    link = layout.segment("one", 0)
    for name in (
        f"'{elsewhere}/secret.txt'",
        f"'{link}/../secret.txt'",
        f"['{link}/manifest.json', '{link}/../secret.txt']",
        f"'{link}/./..//secret.txt'",
        f"'file:{link}/../secret.txt'",
        f"'{link}/[.][.]/secret.txt'",
        f"'{link.parent}/segment=?/../secret.txt'",
        f"'{link}/' || '.' || './secret.txt'",
        f"concat('{link}/.', './secret.txt')",
        f"'{link}/\\x2E\\x2E/secret.txt'::blob::varchar",
        f"'[{link}/../secret.txt]'::varchar[]",
        f"list_value(replace('{link}/--/secret.txt', '-', '.'))",
        "getvariable('name')",
        "$name",
    ):
        given = ["-p", f"name={link}/../secret.txt"] if "name" in name else []
        for sql in (f"from read_text({name})", f"pivot (from read_text({name})) on content using count(*)"):
            result = moewh(layout, "query", "-c", sql, "--format", "csv", *given)
            assert "the secret outside" not in result.output, sql
            assert result.exit_code in (0, 1, 2)
            assert result.exit_code or "secret.txt" not in result.stdout, "a pattern that matches nothing"


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_file_named_as_a_table_stays_out(parts: int, sound: Layout, tmp_path: Path) -> None:
    """DuckDB takes a dotted table name as a file's name."""
    layout = fresh_copy(sound)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    move_and_link(layout, "segments/run_id=one", elsewhere)
    (elsewhere / "secret.csv").write_text("the secret outside\n1\n")
    path = f"{layout.segments('one')}/../secret.csv"
    dots = [place for place, letter in enumerate(path) if letter == "."][-3:][: parts - 1]
    pieces = [path[start + 1 : stop] for start, stop in pairwise([-1, *dots, len(path)])]
    assert len(pieces) == parts
    name = ".".join(f'"{piece}"' for piece in pieces)
    for sql in (f"from {name}", f"summarize {name}", f"pivot {name} on 1", f"describe {name}"):
        result = moewh(layout, "query", "-c", sql, "--format", "csv")
        assert (result.exit_code in (1, 2), "the secret" in result.output) == (True, False), sql


@pytest.mark.skipif(duckdb.__version__ < "2", reason="DuckDB 1.5 follows the link before it takes `..`")
def test_without_the_look_at_names_dots_lead_out(
    sound: Layout, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = fresh_copy(sound)
    move_and_link(layout, "segments/run_id=one", elsewhere)
    (elsewhere / "secret.txt").write_text("the secret outside")
    sql = f"select content from read_text('{layout.segments('one')}/../secret.txt')"
    assert moewh(layout, "query", "-c", sql).exit_code == 2
    monkeypatch.setattr(jail, "_unclear_files", lambda _tree: iter(()))
    assert "the secret outside" in moewh(layout, "query", "-c", sql, "--format", "csv").stdout


@pytest.mark.parametrize(
    "command",
    [
        *("runs", "check", "verify", "refresh", "seal", "runs --delete one --yes", "query runs", "publish new"),
        *(
            "ingest --model demo --prompts demo",
            "ingest --model demo --prompts CIRCLE",
            "import plain CIRCLE --model x",
        ),
        *("ingest --model CIRCLE --prompts demo", "publish CIRCLE", "publish CIRCLE/x", "report -o CIRCLE.html"),
        *(
            "runs -o CIRCLE",
            "runs -o CIRCLE/x.csv",
            "export eplb --run one -o CIRCLE",
            "check CIRCLE",
            "query CIRCLE.sql",
        ),
    ],
)
def test_a_path_that_is_a_circle_of_links_is_one_line(command: str, sound: Layout, tmp_path: Path) -> None:
    """Python 3.12 and 3.13 differ in what they make of one. Where no argument is the circle, the warehouse is."""
    circle = tmp_path / "circle"
    for suffix in ("", ".html", ".sql"):
        circle.with_suffix(suffix).symlink_to(circle.with_suffix(suffix))
    root = fresh_copy(sound).root if "CIRCLE" in command else circle
    words = command.replace("CIRCLE", str(circle)).replace("new", str(tmp_path / "new")).split()
    result = CliRunner().invoke(main, [*words, "--warehouse", str(root)])
    assert result.exit_code in (1, 2), result.output
    assert len(result.stderr.splitlines()) == 1
    assert str(circle) in result.stderr
    assert circle.is_symlink()


@pytest.mark.parametrize(
    "name", ["segments", "runs", "geometry", "segments/run_id=x", "runs/run_id=x", "segments/run_id=one/segment=7"]
)
@pytest.mark.parametrize("kind", ["gone", "foreign", "file", "circle"])
def test_links_that_lead_to_no_folder_of_moewh(
    name: str, kind: str, sound: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows would be missing from every result, or foreign files let in; instead there is an error."""
    layout = fresh_copy(sound)
    target = layout.root / name if kind == "circle" else tmp_path / "elsewhere"
    if kind == "file":
        target.write_text("secret")
    elif kind == "foreign":
        target.mkdir()
        (target / "secret.txt").write_text("secret")
    if (layout.root / name).exists():
        shutil.rmtree(layout.root / name)
    (layout.root / name).symlink_to(target)
    for arguments in (
        ["query", "routes"],
        ["query", "-c", f"from read_text('{target}/secret.txt')"],
        ["runs"],
        ["check"],
    ):
        result = moewh(layout, *arguments)
        assert (result.exit_code, str(target) in result.stderr) == (1, True), result.output
        assert len(result.stderr.splitlines()) == 1
    monkeypatch.setattr("moewh.ingest.run.load_model", lambda *_: pytest.fail("a model was loaded"))
    for writing in (INGEST, ("runs", "--delete", "one", "--yes")):
        result = moewh(layout, *writing)
        assert (result.exit_code, str(target) in result.stderr) == (1, True), result.output
    verified = moewh(layout, "verify")
    assert verified.exit_code == 1
    assert name.partition("/")[0] in verified.output


def test_an_empty_folder_may_be_linked(sound: Layout, elsewhere: Path) -> None:
    """As before the start of the run that it is meant for."""
    layout = fresh_copy(sound)
    (elsewhere / "empty").mkdir()
    layout.segments("later").symlink_to(elsewhere / "empty")
    assert moewh(layout, "query", "routes").exit_code == 0


# ------------------------------------------------------------------------------------------ what writes


@pytest.mark.parametrize("name", ["segments", "runs", "geometry", ".staging", "segments/run_id=new"])
def test_ingest_refuses_at_the_start_what_a_rename_cannot_reach(
    name: str, sound: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, before any model is loaded, with nothing changed."""
    with other_disk(tmp_path) as folder:
        layout = fresh_copy(sound)
        layout.segments("new").mkdir()
        move_and_link(layout, name, Path(folder))
        before = sorted(layout.root.rglob("*"))
        monkeypatch.setattr("moewh.ingest.run.load_model", lambda *_: pytest.fail("a model was loaded"))
        result = moewh(layout, *INGEST)
        assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
        assert "is on a different disk from" in result.stderr
        assert str(layout.root / name) in result.stderr or name == ".staging"
        assert sorted(layout.root.rglob("*")) == before


@pytest.mark.parametrize("name", ["", "segments", "runs", "segments/run_id=new"])
def test_ingest_through_links_on_one_disk(name: str, sound: Layout, tmp_path: Path) -> None:
    layout = fresh_copy(sound)
    layout.segments("new").mkdir()
    (tmp_path / "elsewhere").mkdir()
    target = move_and_link(layout, name, tmp_path / "elsewhere")
    assert (result := moewh(layout, *INGEST)).exit_code == 0, result.output
    assert (layout.root / name).is_symlink()
    assert any(target.rglob("run_id=new/*.parquet" if name == "runs" else "tokens.parquet"))
    assert "new" in moewh(layout, "query", "runs", "--format", "csv").stdout
    assert moewh(layout, "verify").exit_code == 0


def test_a_whole_warehouse_on_another_disk_is_written(sound: Layout, tmp_path: Path) -> None:
    with other_disk(tmp_path) as folder:
        layout = fresh_copy(sound)
        move_and_link(layout, "", Path(folder))
        assert (result := moewh(layout, *INGEST)).exit_code == 0, result.output
        assert moewh(layout, "verify").exit_code == 0


def test_a_complete_run_may_be_on_another_disk(sound: Layout, tmp_path: Path) -> None:
    """It is left alone, and runs beside it are written."""
    with other_disk(tmp_path) as folder:
        layout = fresh_copy(sound)
        assert moewh(layout, *INGEST).exit_code == 0
        move_and_link(layout, "segments/run_id=new", Path(folder))
        again = moewh(layout, *INGEST)
        assert (again.exit_code, "complete already" in again.stderr) == (0, True), again.output
        assert moewh(layout, *INGEST[:-1], "another").exit_code == 0
        assert moewh(layout, "verify").exit_code == 0


def test_a_new_warehouse_with_a_link_to_another_disk(tmp_path: Path) -> None:
    with other_disk(tmp_path) as folder:
        (tmp_path / "wh").mkdir()
        (tmp_path / "wh" / "segments").symlink_to(folder)
        for command in (INGEST, ("refresh",)):
            result = moewh(Layout(tmp_path / "wh"), *command)
            assert (result.exit_code, "is on a different disk from" in result.stderr) == (1, True), result.output
        assert list(Path(folder).iterdir()) == []


def test_a_bind_mount_is_found(sound: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the same device number as the disk that it shows, but a rename into it fails."""
    layout = fresh_copy(sound)
    rename = Path.rename

    def as_across(self: Path, target: Path) -> Path:
        if "segments" in Path(target).parts and "segments" not in self.parts:
            raise OSError(18, os.strerror(18))
        return rename(self, target)

    layout.require_one_disk()
    monkeypatch.setattr(Path, "rename", as_across)
    with pytest.raises(MoewhError, match="is on a different disk from"):
        layout.require_one_disk()


@pytest.mark.parametrize("name", ["segments", "runs", "segments/run_id=one", "segments/run_id=one/segment=1"])
def test_deleting_a_linked_run(name: str, sound: Layout, elsewhere: Path) -> None:
    """A run's own link is removed and its files stay, as reported; nothing is deleted in a folder on another disk."""
    layout = fresh_copy(sound)
    target = move_and_link(layout, name, elsewhere)
    files = sorted(target.rglob("*"))
    result = moewh(layout, "runs", "--delete", "one", "--yes")
    if "/" not in name and target.stat().st_dev != layout.root.stat().st_dev:
        assert (result.exit_code, "a different disk" in result.stderr) == (1, True)
        assert sorted(target.rglob("*")) == files
        return
    assert result.exit_code == 0, result.output
    assert moewh(layout, "query", "-c", "select run_id from runs", "--format", "csv").stdout.split() == [
        "run_id",
        "two",
    ]
    if "/" in name:
        assert str(target) in result.stdout
        assert sorted(target.rglob("*")) == files


def test_repair_across_disks_moves_nothing(sound: Layout, tmp_path: Path) -> None:
    with other_disk(tmp_path) as folder:
        layout = fresh_copy(sound)
        move_and_link(layout, "segments/run_id=one", Path(folder))
        for segment in (layout.segment("one", 1), layout.segment("two", 0)):
            (segment / "tokens.parquet").write_bytes(b"damaged")
        result = moewh(layout, "verify", "--repair")
        assert (result.exit_code, "is on a different disk from" in result.stderr) == (1, True), result.output
        assert layout.segment("two", 0).is_dir()
        assert not (layout.root / "quarantine").exists()


@pytest.mark.parametrize("code", ["EPERM", "ENOTSUP"])
@pytest.mark.parametrize("command", ["ingest", "refresh"])
def test_a_disk_without_symbolic_links(
    command: str, code: str, sound: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be written there is refused, and what was copied there, without its links, stays."""
    layout = Layout(tmp_path / "wh")
    if command == "refresh":
        shutil.copytree(sound.root, layout.root, symlinks=True)
        for run in ("one", "two"):
            (layout.unsealed(run) / "segments").unlink()
    before = set(layout.root.rglob("*"))

    def refuse(*_: Any) -> None:
        raise OSError(getattr(errno, code), "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    result = moewh(layout, *(INGEST if command == "ingest" else [command]))
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (
        1,
        f"moewh: the disk of {layout.root} has no symbolic links, which a warehouse needs. Choose a directory on "
        "another disk with --warehouse.",
    )
    assert before <= set(layout.root.rglob("*"))


def test_refresh_leaves_the_zero_row_files(sound: Layout, tmp_path: Path) -> None:
    """They are files and not links, so that a copy without links answers for its sealed runs."""
    layout = Layout(tmp_path / "wh")
    shutil.copytree(sound.root, layout.root, symlinks=True)
    assert moewh(layout, "refresh").exit_code == 0
    assert not (layout.unsealed(SCHEMA_RUN) / "segments").is_symlink()
    assert (layout.unsealed("one") / "segments").is_symlink()
