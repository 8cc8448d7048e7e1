"""Publishing: what is sent, when readers see it, the state after a kill, and what is left out without text."""

from __future__ import annotations

import itertools
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import duckdb
import fsspec
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from moewh.cli.main import main
from moewh.publish import find
from moewh.publish import target as targets
from moewh.publish.card import _cell, is_card, license_of, split_names
from moewh.publish.hub import HubTarget
from moewh.publish.pieces import Piece
from moewh.publish.publish import PublishOptions, publish
from moewh.publish.target import FolderTarget, StoreTarget, Target
from moewh.publish.withhold import ABSENT, EMPTY, WITHHELD
from moewh.warehouse.answer import retry
from moewh.warehouse.answer.retry import until_settled
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.listing import parse_listing
from moewh.warehouse.files.names import LISTING
from moewh.warehouse.remote.place import Remote
from moewh.warehouse.remote.published import Published, readable
from moewh.warehouse.runs import delete_run
from moewh.warehouse.trust.published import check_any, plan_any
from moewh.warehouse.views.opening import open_warehouse
from tests.support.database_file import made
from tests.support.hub import Store
from tests.support.published import RUNS, on_the_hub, publishable, shell_rows

pytestmark = pytest.mark.published_file
WHOLE = "select run_id, count(*) from {}routing group by all order by all"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture
def no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that read through the listing alone: building views takes most of publishing. Nobody can read these."""
    monkeypatch.setattr("moewh.publish.publish.build", lambda _, file: shutil.copyfile(made(), file))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return publishable(tmp_path_factory.mktemp("source") / "wh")


@pytest.fixture(scope="module")
def rows(source: Layout) -> dict[str, int]:
    """The routing rows of each run."""
    with open_warehouse(source) as connection:
        return dict(connection.execute(WHOLE.format("")).fetchall())


@pytest.fixture(scope="module")
def published(source: Layout, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "wh"
    assert run("publish", str(folder), "--license", "MIT", "--warehouse", str(source.root)).exit_code == 0
    return folder


@pytest.fixture(scope="module")
def anywhere(source: Layout, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A folder, and after it each place in it that one published folder has had; it was moved from one to the next."""
    folder = tmp_path_factory.mktemp("anywhere")
    publish(source, FolderTarget(folder / "first"), PublishOptions())
    return [folder, folder / "first"]


def seen(place: str | Published) -> dict[str, int]:
    """The runs that a reader sees, each with its rows; every file of them is as published."""
    warehouse = readable(place) if isinstance(place, str) else place
    assert isinstance(warehouse, Published)
    assert check_any(plan_any(warehouse)) == []
    with open_warehouse(warehouse) as connection:
        found: dict[str, int] = dict(connection.execute(WHOLE.format("")).fetchall())
        assert connection.execute("select run_id from runs where status = 'complete' order by all").fetchall() == (
            [(run_id,) for run_id in found]
        )
    return found


# ------------------------------------------------------------------------------------------ kinds of targets


class InMemory(StoreTarget):
    """An object store in this process, which gets the same requests as S3."""

    def __init__(self) -> None:
        super().__init__(Remote("memory://published/wh", fsspec.filesystem("memory")))
        self.place.fs.store.clear()


@pytest.fixture(params=["folder", "store", "hub"])
def target(request: pytest.FixtureRequest, tmp_path: Path, no_views: None) -> Iterator[Target]:  # noqa: ARG001
    if request.param == "folder":
        yield FolderTarget(tmp_path / "published")
    elif request.param == "store":
        yield InMemory()
    else:
        with on_the_hub(Store({})) as url:
            found = find.target_at(url)
            assert isinstance(found, HubTarget)
            yield found


def reader(target: Target) -> Published:
    return Published(target.place)


class Stopped(BaseException):
    """The process is gone."""


def test_stopped_anywhere_it_goes_on(
    target: Target, source: Layout, rows: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before, within and after each run's files; a reader sees whole runs, never fewer than before."""
    publish(source, target, PublishOptions(("007",), license="mit"))
    before = seen(reader(target))
    assert before == {"007": rows["007"]}
    primitive = {FolderTarget: "_copy", InMemory: "_put", HubTarget: "_commit"}[type(target)]
    owner: Any = targets if primitive == "_copy" else type(target)
    real, calls, budget = getattr(owner, primitive), 0, 0

    def counted(*given: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > budget:
            raise Stopped
        real(*given)

    monkeypatch.setattr(owner, primitive, counted)
    step = 1 if primitive == "_commit" else 5
    for attempt in range(100):
        calls, budget = 0, step * attempt
        try:
            publish(source, target, PublishOptions(license="mit"))
        except Stopped:
            now = seen(reader(target))
            assert now.items() >= before.items()
            assert now.items() <= rows.items()
            before = now
            continue
        break
    assert attempt >= 2
    assert seen(reader(target)) == rows


def test_only_what_is_missing_is_sent(target: Target, source: Layout, rows: dict[str, int]) -> None:
    first = publish(source, target, PublishOptions(("007", "step-30"), license="mit"))
    assert first.sent_files > 60
    assert first.changed
    again = publish(source, target, PublishOptions(("007",), license="mit"))
    assert (again.sent_files, again.changed) == (0, False)
    more = publish(source, target, PublishOptions(license="mit"))
    listing = Published(target.place).listing
    assert more.sent_files == sum("/run_id=step-20/" in path for path in listing.files)
    assert seen(reader(target)) == rows


def test_another_run_of_that_name_replaces_it(target: Target, source: Layout, tmp_path: Path) -> None:
    """It is withdrawn first, so nobody reads half of each; extra files of the old one are removed."""
    publish(source, target, PublishOptions(license="mit"))
    shutil.copytree(source.root, tmp_path / "other", symlinks=True)
    other = Layout(tmp_path / "other")
    delete_run(other, "007")
    for level in ("runs", "segments", "sealed"):
        (other.root / level / "run_id=step-30").rename(other.root / level / "run_id=007")
    states: list[dict[str, int]] = []
    assert any("geometry/run_id=007" in path for path in Published(target.place).listing.files)
    publish(other, target, PublishOptions(("007",), license="mit"), lambda _: states.append(seen(reader(target))))
    assert [list(state) for state in states] == [["step-20", "step-30"]]
    now = seen(reader(target))
    assert now["007"] == now["step-30"]
    assert not any("geometry/run_id=007" in path for path in Published(target.place).listing.files)


def test_a_replacement_that_was_killed_leaves_no_file_of_the_old_run(
    target: Target, source: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old run has a geometry, which the new one lacks, and its text is taken back; killed at each step in turn."""
    shutil.copytree(source.root, tmp_path / "other", symlinks=True)
    other = Layout(tmp_path / "other")
    shutil.rmtree(other.root / "geometry" / "run_id=007")
    publish(source, target, PublishOptions(("007",), license="mit"))
    replacement = PublishOptions(("007",), without_text=True, license="mit")

    def stopped(*_: Any) -> None:
        raise Stopped

    listed = []
    for step in ("finish", "send", "finish", "remove"):  # to withdraw the run, and to list it again
        with monkeypatch.context() as patch:
            patch.setattr(type(target), step, stopped)
            with pytest.raises(Stopped):
                publish(other, target, replacement)
        listed.append("007" in Published(target.place).listing.run_ids)
    assert listed == [True, False, False, True]
    publish(other, target, replacement)
    held = {path for path in target.paths() if "/run_id=007/" in path}
    assert held == {path for path in Published(target.place).listing.files if "/run_id=007/" in path}


def test_views_that_a_killed_process_left_are_made_again(
    source: Layout, rows: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the views, which already lack the run to replace, and the listing, which still has it."""
    shutil.copytree(source.root, tmp_path / "other", symlinks=True)
    other = Layout(tmp_path / "other")
    shutil.rmtree(other.root / "geometry" / "run_id=007")
    target = FolderTarget(tmp_path / "published")
    publish(source, target, PublishOptions())
    copy = targets._copy

    def stopped(data: Path | bytes, path: Path) -> None:
        if path.name == LISTING:
            raise Stopped
        copy(data, path)

    with monkeypatch.context() as patch:
        patch.setattr(targets, "_copy", stopped)
        with pytest.raises(Stopped):
            publish(other, target, PublishOptions(("007",)))
    assert publish(source, target, PublishOptions(("007",))).changed
    with duckdb.connect(str(target.root / "warehouse.duckdb"), read_only=True) as connection:
        assert dict(connection.execute(WHOLE.format("")).fetchall()) == rows
    assert seen(reader(target)) == rows
    assert not publish(source, target, PublishOptions()).changed


@pytest.mark.usefixtures("no_views")
def test_a_file_that_was_lost_there_is_sent_again(source: Layout) -> None:
    store = InMemory()
    publish(source, store, PublishOptions(("007",)))
    for path in ("segments/run_id=007/segment=1/tokens.parquet", "sealed/run_id=007/manifest.json"):
        store.place.fs.rm_file(f"{store.place.root}/{path}")
    assert len(check_any(plan_any(reader(store)))) == 2
    assert publish(source, store, PublishOptions(("007",))).sent_files > 0
    assert check_any(plan_any(reader(store))) == []


@pytest.mark.usefixtures("no_views")
def test_a_query_that_met_a_replaced_run_is_asked_again(source: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if it uses a run that was replaced meanwhile; with views made earlier, as in a check, not endlessly."""
    monkeypatch.setattr(retry, "_PAUSE", 0)
    store = InMemory()
    publish(source, store, PublishOptions(("007",)))
    met = reader(store)
    asked: list[tuple[str, ...]] = []

    def work(runs: tuple[str, ...], without_text: bool, opened: bool = True) -> int:
        if opened:
            open_warehouse(met).close()
        if len(asked) == 0:
            publish(source, store, PublishOptions(runs, without_text))
        asked.append(runs)
        return len(asked)

    assert until_settled(met, lambda: work(("step-30",), False)) == 1
    asked.clear()
    assert until_settled(met, lambda: work(("007",), True)) == 2
    asked.clear()
    with pytest.raises(MoewhError, match="Ask again"):
        until_settled(met, lambda: work(("007",), False, opened=False))


# ------------------------------------------------------------------------------------------ what is published


@pytest.mark.usefixtures("no_views")
def test_runs_that_are_not_complete_or_not_sound_are_named(source: Layout, tmp_path: Path) -> None:
    shutil.copytree(source.root, tmp_path / "wh", symlinks=True)
    layout = Layout(tmp_path / "wh")
    delete_run(layout, "step-20")
    shutil.rmtree(layout.sealed("step-30"), ignore_errors=True)
    layout.link_unsealed("step-30")
    shutil.rmtree(layout.segment("step-30", 1))
    done = run("publish", str(tmp_path / "out"), "--warehouse", str(layout.root))
    assert (done.exit_code, "left out because not complete: step-30" in done.stderr) == (0, True), done.output
    assert list(seen(str(tmp_path / "out"))) == ["007"]
    refused = run("publish", str(tmp_path / "out"), "--run", "step-30", "--warehouse", str(layout.root))
    assert (refused.exit_code, "run step-30 is not complete" in refused.stderr) == (1, True)
    unknown = run("publish", str(tmp_path / "out"), "--run", "nobody", "--warehouse", str(layout.root))
    assert (unknown.exit_code, "007" in unknown.stderr) == (1, True)
    file = layout.segment("007", 0) / "routing.parquet"
    file.write_bytes(file.read_bytes()[:-1])
    damaged = run("publish", str(tmp_path / "more"), "--warehouse", str(layout.root))
    assert (damaged.exit_code, str(file) in damaged.stderr, len(damaged.stderr.splitlines())) == (1, True, 1)
    assert not any(path.name == "run_id=007" for path in (tmp_path / "more").rglob("run_id=007"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["hf://datasets/org/name"], "--license"),
        (["hf://datasets/org/name@v1", "--license", "mit"], "more than a data set"),
        (["hf://datasets/org/name/sub", "--license", "mit"], "more than a data set"),
        (["https://host/wh"], "publishes to a folder"),
        (["gs://bucket/wh"], "publishes to a folder"),
        (["s3://"], "not a plain URL"),
        (["s3://bucket/wh", "--url", "https://host/wh"], "--url is for a folder"),
        (["{tmp}/out", "--url", "nonsense"], "cannot read nonsense"),
        (["{tmp}/out", "--license", "a b"], "not a licence's id"),
        (["{tmp}/out", "--url", "https://user:secret@host/wh"], "which the published files would show"),
        (["{wh}"], "holds"),
        (["{wh}/segments/out"], "among the files of the warehouse"),
        (["{wh}/.staging/out"], "among the files of the warehouse"),
        ([""], "the target is ''"),
        (["{tmp}/back\\slash"], "has a backslash or is not UTF-8: DuckDB cannot find files there"),
        (["~/out"], "the shell did not replace the ~"),
        (["-"], "the target is -"),
        (["{other}"], "holds notes.txt"),
        (["{other}/notes.txt"], "notes.txt is not a folder"),
        (["{other}/notes.txt/wh"], "notes.txt is not a folder"),
        (["{tmp}/broken"], "broken is not a folder"),
        (["{tmp}/broken/wh"], "broken is not a folder"),
    ],
)
def test_wrong_targets_are_one_line(arguments: list[str], says: str, source: Layout, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    (tmp_path / "broken").symlink_to("nothing")
    filled = [text.format(tmp=tmp_path, wh=source.root, other=tmp_path / "other") for text in arguments]
    result = run("publish", *filled, "--warehouse", str(source.root))
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1), result.output
    assert says in result.stderr


def test_a_published_folder_with_other_files_stays_as_it_is(target: Target, source: Layout) -> None:
    """A command that would withdraw a run, or rewrite the card, is refused before it does either."""
    publish(source, target, PublishOptions(("007",), license="mit"))
    target.finish({"notes.txt": b"mine"})
    paths, root_files = target.paths(), ("README.md", "warehouse.duckdb", LISTING)
    before = [target.place.read(name) for name in root_files]
    for options in (PublishOptions(("007",), without_text=True), PublishOptions(("007",), license="apache-2.0")):
        with pytest.raises(UsageError, match=r"holds notes\.txt"):
            publish(source, target, options)
        assert (target.paths(), [target.place.read(name) for name in root_files]) == (paths, before)


@pytest.mark.parametrize(
    "name", ["sp ace", "quo'te", 'dou"ble', "$HOME", "glob*[a]", "run_id=7", "é;#%20", "<b>*x*", "two\nlines"]
)
def test_what_it_prints_and_its_card_read_a_folder_of_any_name(name: str, source: Layout, anywhere: list[Path]) -> None:
    """Their SQL and their commands run as they stand; the card's title is one line of text."""
    place = anywhere[-1].rename(anywhere[0] / name)
    anywhere.append(place)
    result = run("publish", str(place), "--warehouse", str(source.root))
    _, read, attach = re.split(r"\n(?=Read: |      ATTACH )", result.stdout.rstrip("\n"))
    moewh, *arguments = shlex.split(read.removeprefix("Read: "))
    assert (moewh, arguments[-1]) == ("moewh", str(place))
    answer = run(*arguments, "--format", "jsonl")
    assert answer.exit_code == 0, answer.stderr
    text = (place / "README.md").read_text()
    (attach_in_card,) = re.findall(r"(ATTACH .*? AS wh \(READ_ONLY\);)", text, re.DOTALL)
    with duckdb.connect() as connection:
        connection.execute(attach.replace("(READ_ONLY)", "as published (READ_ONLY)"))
        ((rows,),) = connection.execute("select count(*) from published.expert_load").fetchall()
        connection.execute("detach published")
        connection.execute(attach_in_card)
        assert connection.execute("select path from duckdb_databases() where database_name = 'wh'").fetchall() == (
            [(str(place / "warehouse.duckdb"),)]
        )
    assert rows == len(answer.stdout.splitlines()) > 0
    (command,) = re.findall(r"```sh\n(moewh query .*?)\n```", text, re.DOTALL)
    assert shlex.split(command)[-1] == str(place)
    (title,) = re.findall("^# (.*)\n\n", text, re.MULTILINE)
    assert re.sub(r"\\(.)", r"\1", title) == " ".join(name.split())
    assert "<" not in title.replace("\\<", "")


@pytest.mark.usefixtures("no_views")
def test_a_target_that_refuses_is_one_line(source: Layout) -> None:
    store = Store({}, refuse_after=3)
    with on_the_hub(store) as url:
        result = run("publish", url, "--license", "mit", "--warehouse", str(source.root))
        assert (result.exit_code, "cannot publish to" in result.stderr.splitlines()[-1]) == (1, True), result.stderr
        store.refuse_after = None
        sent = len(store.blobs)
        assert run("publish", url, "--license", "mit", "--warehouse", str(source.root)).exit_code == 0
        assert sent > 0


@pytest.mark.parametrize("status", [401, 403])
def test_a_token_that_is_refused_is_one_line(status: int, source: Layout) -> None:
    with on_the_hub(Store({}, refusal=status)) as url:
        for command in (
            ["publish", url, "--license", "mit", "--warehouse", str(source.root)],
            ["runs", "--warehouse", url],
        ):
            result = run(*command)
            assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
            assert "Check your token: `hf auth login`." in result.stderr


def test_a_file_in_place_of_a_folder_is_one_line(source: Layout) -> None:
    store = StoreTarget(Remote("memory://files/file", fsspec.filesystem("memory")))
    store.place.fs.pipe_file(store.place.root, b"text")
    with pytest.raises(UsageError, match="files/file is a file, not a folder"):
        publish(source, store, PublishOptions(("007",)))


def test_a_full_disk_names_the_target(source: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "_copy", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    result = run("publish", str(tmp_path / "out"), "--warehouse", str(source.root))
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert f"cannot publish to {tmp_path / 'out'}: No space left on device" in result.stderr
    assert "--warehouse" not in result.stderr


@pytest.mark.parametrize("text", ['{"format": 1, "schema": 1}', '{"format": 99, "schema": 1}', "[]", "", "{}"])
def test_another_listing_is_refused_in_one_line(text: str, source: Layout, tmp_path: Path) -> None:
    (tmp_path / LISTING).write_text(text)
    result = run("publish", str(tmp_path), "--warehouse", str(source.root))
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1), result.output
    assert result.stderr.endswith(". Publish to another place.\n")
    assert ".." not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [LISTING]


# ------------------------------------------------------------------------------------------ readers


def test_a_plain_shell_sees_whole_runs_meanwhile(source: Layout, rows: dict[str, int], tmp_path: Path) -> None:
    """Each time a file is put at the root, and before each run: the attached file answers for whole runs."""
    place, states = tmp_path / "out", []
    publish(source, FolderTarget(place), PublishOptions(("007",)))

    def look(_: str) -> None:
        states.append(dict(shell_rows(place / "warehouse.duckdb", WHOLE.format("wh."))))

    publish(source, FolderTarget(place), PublishOptions(), look)
    look("")
    assert states == [{"007": rows["007"]}] * 3 + [rows]


def test_load_dataset_reads_each_table(published: Path, source: Layout, tmp_path: Path) -> None:
    with open_warehouse(source) as connection:
        counts = {
            table.name: dict(connection.execute(f"select run_id, count(*) from {table.name} group by all").fetchall())
            for table in (*schema.TABLES, *schema.TOTALS)
            if table not in schema.MERGED
        }
        counts["segments"] = dict.fromkeys(RUNS, 2)
    names = split_names(list(RUNS))
    configs = datasets.get_dataset_config_names(str(published))
    assert set(configs) >= {name for name, runs in counts.items() if runs}
    for name in configs:
        loaded = datasets.load_dataset(str(published), name, cache_dir=str(tmp_path))
        table = next(table for table in (*schema.TABLES, *schema.TOTALS) if table.name == name)
        for split in loaded.values():
            assert split.column_names == [
                c.name for c in (schema.sealed(table) if name == "segments" else table).stored
            ]
        if name in counts:
            assert {split: data.num_rows for split, data in loaded.items()} == (
                {names[run_id]: count for run_id, count in counts[name].items()}
            )


def test_the_card_says_what_was_run(published: Path) -> None:
    text = (published / "README.md").read_text()
    assert 'license: "mit"' in text
    for run_id in RUNS:
        assert f"| {run_id} | synthetic |" in text
    for table in (*schema.TABLES, *schema.TOTALS):
        assert f"### {table.name}" in text
        assert all(f"| {column.name} | " in text for column in table.columns)


def test_the_card_keeps_its_licence_until_another_is_given(target: Target, source: Layout) -> None:
    def published(license: str | None, *runs: str, without_text: bool = False) -> tuple[bool, str | None]:
        done = publish(source, target, PublishOptions(runs, without_text, license))
        return done.changed, license_of(target.place.read("README.md").decode())

    assert published(None, "007") == (True, None)
    assert published("mit", "007") == (True, "mit")
    assert published("mit", "007") == (False, "mit")
    assert published(None, "007", "step-20") == (True, "mit")
    assert published(None, "007", without_text=True) == (True, "mit")
    assert published("cc-by-4.0", "007", without_text=True) == (True, "cc-by-4.0")


@pytest.mark.parametrize(
    ("text", "license"),
    [
        ("---\nlicense: mit\ntags: []\n---\n# x\nlicense: no", "mit"),
        ("---\r\nlicense: 'mit'\n---\n", None),
        ("---\nlicense: 'mit'\n---\n", "mit"),
        ("---\nconfigs: []\n---\nlicense: mit\n", None),
        ("license: mit\n", None),
        ("", None),
    ],
)
def test_the_licence_is_read_from_the_front_of_a_card(text: str, license: str | None) -> None:
    assert license_of(text) == license
    assert not is_card(text)


@pytest.mark.parametrize("name", ["README.md", "warehouse.duckdb"])
def test_a_card_and_database_of_others_are_not_replaced(name: str, target: Target, source: Layout) -> None:
    """On the Hub, the history keeps them."""
    if isinstance(target, HubTarget):
        target.finish({name: b"mine"})
        assert publish(source, target, PublishOptions(("007",), license="mit")).changed
        return
    if isinstance(target, FolderTarget):
        target.root.mkdir()
    target.finish({name: b"mine"})
    with pytest.raises(UsageError, match=f"holds {name}, which moewh did not write and would replace"):
        publish(source, target, PublishOptions(("007",)))
    assert target.paths() == {name}
    assert target.place.read(name) == b"mine"


def test_the_card_shows_texts_as_texts() -> None:
    assert _cell("a\0b\u202ec\x1b[1m\n</b>|~~x~~ é👍") == r"aU+0000bU+202EcU+001B\[1m \</b\>\|\~\~x\~\~ é👍"


def test_split_names_are_what_datasets_takes() -> None:
    """A name that was one run's is never another's later, when runs that would share it are published, too."""
    run_ids = ["a.b", "a-b", "a_b", "all", "007"]
    names = split_names(run_ids)
    assert {name.rpartition("_")[0] for name in list(names.values())[:3]} == {"a_b"}
    assert [names["all"], names["007"]] == ["all_", "007"]
    assert len(set(names.values())) == len(run_ids)
    assert all(datasets.splits.NamedSplit(name) for name in names.values())
    for order in itertools.permutations(run_ids[:3]):
        owners: dict[str, str] = {}
        for count in (1, 2, 3):
            for run_id, name in split_names(sorted(order[:count])).items():
                assert owners.setdefault(name, run_id) == run_id, order


def test_a_served_folder_names_its_url(source: Layout, tmp_path: Path) -> None:
    done = run("publish", str(tmp_path / "out"), "--url", "https://host/wh/", "--warehouse", str(source.root))
    assert done.exit_code == 0, done.output
    with duckdb.connect(str(tmp_path / "out" / "warehouse.duckdb"), read_only=True) as connection:
        (sql,) = connection.execute("select sql from duckdb_views() where view_name = 'routing'").fetchone() or ("",)
    assert "https://host/wh" in sql
    assert str(tmp_path) not in sql
    assert "https://host/wh/warehouse.duckdb" in (tmp_path / "out" / "README.md").read_text()
    assert set(seen(str(tmp_path / "out"))) == set(RUNS)


def test_a_folder_keeps_its_url_until_another_is_given(source: Layout, tmp_path: Path) -> None:
    """`--url ''` is the folder's own path, and a folder that was moved never keeps its old one."""
    place = tmp_path / "out"

    def root(place: Path, *arguments: str) -> tuple[str, bool]:
        """Return the listing's root, and whether the views name no other."""
        done = run("publish", str(place), "--run", "007", "--warehouse", str(source.root), *arguments)
        assert done.exit_code == 0, done.output
        listed: str = json.loads((place / LISTING).read_text())["root"]
        with duckdb.connect(str(place / "warehouse.duckdb"), read_only=True) as connection:
            ((sql,),) = connection.execute("select sql from duckdb_views() where view_name = 'routing'").fetchall()
        return listed, f"'{listed}" in sql

    assert root(place, "--url", "https://host/wh/") == ("https://host/wh", True)
    assert root(place) == ("https://host/wh", True)
    assert root(place, "--url", "https://other/wh") == ("https://other/wh", True)
    assert root(place, "--url", "") == (str(place), True)
    assert root(place) == (str(place), True)
    place.rename(tmp_path / "moved")
    assert root(tmp_path / "moved") == (str(tmp_path / "moved"), True)


# ------------------------------------------------------------------------------------------ without text


@pytest.mark.usefixtures("no_views")
def test_without_text_nothing_gives_the_text_back(source: Layout, tmp_path: Path) -> None:
    place = tmp_path / "out"
    publish(source, FolderTarget(place), PublishOptions(("007", "step-20"), without_text=True))
    for table in schema.TABLES:
        for file in place.rglob(f"run_id=[!~]*/**/{table.file}"):
            held = pq.read_table(file, partitioning=None)
            for column in held.column_names:
                if column in ("text", "source", "metadata", "vocab_id", "token") and table is not schema.VOCABULARY:
                    assert held.column(column).null_count == len(held), (file, column)
    assert not list(place.rglob("run_id=[!~]*/**/hidden_states.parquet"))
    assert run("verify", "--warehouse", str(place)).exit_code == 0
    checked = run("check", "--warehouse", str(place))
    assert checked.exit_code == 0, checked.output
    with open_warehouse(readable(str(place))) as there, open_warehouse(source) as here:
        for name in ("expert_load", "co_routing", "layer_transitions", "domain_specialization", "expert_repetition"):
            sql = f"from {name} where run_id = '007' order by all"
            assert there.execute(sql).fetchall() == here.execute(sql).fetchall() != []
        sql = "select token_id, layer, rank, expert, weight from routing where run_id = '007' order by all"
        assert there.execute(sql).fetchall() == here.execute(sql).fetchall() != []
        assert there.execute("from expert_token_affinity").fetchall() == []
    assert "Runs 007, step-20 were published without" in (place / "README.md").read_text()


@pytest.mark.usefixtures("no_views")
def test_text_that_was_published_is_taken_back(source: Layout, tmp_path: Path) -> None:
    """Then published again: either way, the same command sends nothing the second time."""
    place = FolderTarget(tmp_path / "out")
    publish(source, place, PublishOptions(("007",)))
    withheld = PublishOptions(("007",), without_text=True)
    assert publish(source, place, withheld).changed
    again = publish(source, place, withheld)
    assert (again.sent_files, again.changed) == (0, False)
    assert parse_listing((place.root / LISTING).read_bytes()).without_text == ("007",)
    for kept in (PublishOptions(("007",)), PublishOptions()):
        publish(source, place, kept)
        assert parse_listing((place.root / LISTING).read_bytes()).without_text == ("007",)
    publish(source, place, PublishOptions(("007",), without_text=False))
    assert parse_listing((place.root / LISTING).read_bytes()).without_text == ()
    assert not list(source.staging.glob("publish*"))


def test_a_run_that_is_replaced_stays_without_text(
    target: Target, source: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if that is killed once the old run is withdrawn; other runs keep their text."""
    shutil.copytree(source.root, tmp_path / "other", symlinks=True)
    other = Layout(tmp_path / "other")
    shutil.rmtree(other.root / "geometry" / "run_id=007")
    publish(source, target, PublishOptions(("007",), without_text=True, license="mit"))

    def stopped(*_: Any) -> None:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(type(target), "send", stopped)
        with pytest.raises(Stopped):
            publish(other, target, PublishOptions())
    assert Published(target.place).listing.run_ids == ()
    lines: list[str] = []
    publish(other, target, PublishOptions(), lines.append)
    assert ["without its text" in line for line in lines] == [line.startswith("run 007") for line in lines]
    assert Published(target.place).listing.without_text == ("007",)
    with open_warehouse(reader(target)) as there:
        texts = there.execute("select run_id, count(text) from prompts group by all having count(text) > 0").fetchall()
    assert {run_id for run_id, _ in texts} == {"step-20", "step-30"}


@pytest.mark.parametrize("before", [None, PublishOptions(license="apache-2.0")], ids=["first", "taken back"])
def test_a_killed_command_s_choices_hold(
    before: PublishOptions | None, target: Target, source: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the first file of a run is sent; a shorter command then sends no text and keeps the licence."""
    if before is not None:
        publish(source, target, before)
    send = type(target).send

    def stopped(self: Target, pieces: list[Piece]) -> None:
        if any("/run_id=007" in piece.path for piece in pieces):
            raise Stopped
        send(self, pieces)

    with monkeypatch.context() as patch:
        patch.setattr(type(target), "send", stopped)
        with pytest.raises(Stopped):
            publish(source, target, PublishOptions(("007", "step-20"), without_text=True, license="mit"))
    publish(source, target, PublishOptions())
    assert license_of(target.place.read("README.md").decode()) == "mit"
    with open_warehouse(reader(target)) as there:
        texts = there.execute("select run_id, count(text) > 0 from prompts group by all order by all").fetchall()
    assert texts == [("007", False), ("step-20", False), ("step-30", True)]
    assert Published(target.place).listing.without_text == ("007", "step-20")


def test_every_column_with_text_is_known() -> None:
    """A column of a segment's tables that may give text back is looked at here before it is published without text.

    So may a text, a vector, or a number of an entry; other numbers may not.
    """
    known = {
        "prompts": {"domain", "status"},
        "tokens": {"kind"},
        "routing": {"kind", "domain", "vocabulary_key"},  # the same for every text
        "segments": {"prompts_sha256"},
        "router_logits": {"logits"},
    }
    counted = {"kind", "domain"}
    for table in (table for table in schema.TABLES if table.level == "segment" and table.name not in EMPTY | ABSENT):
        doubtful = {
            column.name for column in table.stored if column.type in ("VARCHAR", "FLOAT[]") or "vocab" in column.name
        }
        assert doubtful - known.get(table.name, counted) == set(WITHHELD.get(table.name, ())), table.name
    assert {"hidden_states", "affinity_counts", "vocab_counts"} == EMPTY | ABSENT
