"""Published warehouses, read in place: S3, the Hub and a web server give the same results as the local warehouse."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import duckdb
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

import moewh
from moewh.cli.main import main
from moewh.warehouse.answer import jail
from moewh.warehouse.answer import query as queries
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits, open_jailed
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.listing import Listed, listing_text, parse_listing
from moewh.warehouse.files.manifest import file_sha256
from moewh.warehouse.files.names import LISTING
from moewh.warehouse.remote import listed
from moewh.warehouse.remote.published import Published, readable
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import canned_names
from tests.support.escapes import SECRET
from tests.support.hub import Store
from tests.support.published import RUNS, on_the_hub, publishable, s3, shell_rows, stored, web
from tests.support.two_engines import same

pytestmark = pytest.mark.published_file
PLACES = ("folder", "s3", "hub", "web")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return publishable(tmp_path_factory.mktemp("here") / "wh")


@pytest.fixture(scope="module")
def hub_store() -> Store:
    return Store({})


@pytest.fixture(scope="module")
def places(here: Layout, hub_store: Store, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The URL of every place, to which the same warehouse was published."""
    folder = tmp_path_factory.mktemp("folder") / "wh"
    with s3() as bucket, on_the_hub(hub_store) as data_set, web(folder.parent) as address:
        targets = {"folder": str(folder), "s3": f"{bucket}/some/wh", "hub": data_set}
        for url in targets.values():
            done = run("publish", url, "--warehouse", str(here.root), "--license", "mit")
            assert done.exit_code == 0, done.output
        served = run(
            "publish", str(folder.parent / "served"), "--url", f"{address}/served", "--warehouse", str(here.root)
        )
        assert served.exit_code == 0, served.output
        yield {**targets, "web": f"{address}/served"}


VIEWS = ("runs", "layers", "experts", "prompts", "tokens", "router_logits", *canned_names())
Rows = dict[str, list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def rows_here(here: Layout) -> Rows:
    """The rows of each view here."""
    with open_warehouse(here) as local:
        return {name: sorted(local.execute(f"from {name}").fetchall(), key=repr) for name in VIEWS}


@pytest.mark.parametrize("place", PLACES)
def test_every_view_answers_as_here(place: str, rows_here: Rows, places: dict[str, str]) -> None:
    with open_warehouse(readable(places[place])) as connection:
        for name, expected in rows_here.items():
            rows = sorted(connection.execute(f"from {name}").fetchall(), key=repr)
            assert len(rows) == len(expected) > 0, name
            for row, wanted in zip(rows, expected, strict=True):
                assert all(same(value, target) for value, target in zip(row, wanted, strict=True)), (name, row, wanted)


COUNT = ("query", "-c", "select count(*) as n from routing where layer = $layer", "-p", "layer=0", "--format", "csv")
SHOW = ("show", "--prompt", "0", "--run", "007")
REPORT = ("report", "--run", "007", "-o")


@pytest.fixture(scope="module")
def said_here(here: Layout, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What commands print here, and the report that one writes."""
    local, page = ("--warehouse", str(here.root)), tmp_path_factory.mktemp("page") / "here.html"
    assert run(*REPORT, str(page), *local).exit_code == 0
    return {"count": run(*COUNT, *local).stdout, "show": run(*SHOW, *local).stdout, "report": page.read_text()}


@pytest.mark.parametrize("place", PLACES)
def test_commands_read_there(
    place: str, said_here: dict[str, str], places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    url = places[place]
    assert run(*COUNT, "--warehouse", url).stdout == said_here["count"] != ""
    monkeypatch.setenv("MOEWH_WAREHOUSE", url)
    listed_runs = run("runs", "--format", "csv")
    assert [line.split(",")[0] for line in listed_runs.stdout.splitlines()[1:]] == (list(RUNS))
    verified = run("verify")
    assert (verified.exit_code, "3 runs, 6 segments" in verified.stdout) == (0, True), verified.output


@pytest.mark.parametrize("place", ["folder", "hub"])
def test_what_asks_many_queries_reads_there(
    place: str, said_here: dict[str, str], places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the two ways that files are read: by DuckDB itself, and through `ListedFiles`, as the other places are."""
    url = places[place]
    monkeypatch.setenv("MOEWH_WAREHOUSE", url)
    assert run("check", "-p", "run=007").exit_code == 0
    assert "007" in run("query", "load_matrix", "-p", "run=nobody").stderr
    assert run(*SHOW).stdout == said_here["show"] != ""
    written = run(*REPORT, str(tmp_path / "there.html"))
    assert written.exit_code == 0, written.output
    assert (tmp_path / "there.html").read_text() == said_here["report"]
    with moewh.open(url) as warehouse:
        assert warehouse.query("co_routing_where", layer=0).fetchall()
        assert warehouse.verify() == []
        assert str(warehouse.path) == url


# What a query there refers to and must not reach. {root}: the place; {beside}: next to it, where a secret is.
OUTSIDE = {
    "a file here": "select content from read_text('{secret}')",
    "a file uri": "select content from read_text('file://{secret}')",
    "beside it": "select content from read_text('{beside}/secret.txt')",
    "a sibling with the same beginning": "select content from read_text('{root}-copy/secret.txt')",
    "dot dot": "select content from read_text('{root}/../secret.txt')",
    "what is not listed": "select content from read_text('{root}/secret.txt')",
    "a pattern": "select content from read_text('{root}/*')",
    "a pattern of everything": "from glob('{beside}/*')",
    "another host": "select content from read_text('http://127.0.0.1:9/secret.txt')",
    "another bucket": "select content from read_text('s3://{bucket}/secret.txt')",
    "the Hub": "select content from read_text('hf://datasets/org/other/secret.txt')",
    "from": "from '{beside}/secret.csv'",
    "attach": "attach '{root}/warehouse.duckdb'",
    "copy there": "copy (select 1 as x) to '{root}/x.csv'",
    "copy over a file": "copy (select 1 as x) to '{root}/runs/run_id=007/run.parquet'",
    "moewh_root": "select content from read_text('{root}/.zero-rows/secret.txt')",
}


@pytest.mark.parametrize("place", PLACES)
def test_sql_reaches_nothing_else(place: str, hub_store: Store, places: dict[str, str], tmp_path: Path) -> None:
    import s3fs

    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    beside = places[place].rpartition("/")[0]
    folder = Path(places["folder"])
    for name in ("secret.txt", "wh-copy/secret.txt", "wh/secret.txt", "served-copy/secret.txt", "served/secret.txt"):
        (folder.parent / name).parent.mkdir(exist_ok=True)
        (folder.parent / name).write_text(SECRET)
    store = s3fs.S3FileSystem()
    for path in ("some/secret.txt", "some/wh-copy/secret.txt", "some/wh/secret.txt", "secret.txt"):
        store.pipe_file(f"bucket/{path}", SECRET.encode())

    def held() -> tuple[object, ...]:
        files = [path for path in folder.parent.rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in files}, stored(), dict(hub_store.files)

    before = held()
    with open_engine("duckdb", None, readable(places[place]), Limits()) as ask:
        for name, sql in OUTSIDE.items():
            if place == "folder" and name in ("what is not listed", "a pattern"):
                continue  # a local folder is readable as a whole
            filled = sql.format(secret=secret, root=places[place], beside=beside, bucket="bucket")
            try:
                answer = ask(queries.Query(name, filled), {})
                assert answer is not None
                assert answer.execute().fetchall() == [], name
            except (duckdb.Error, MoewhError) as error:
                assert SECRET not in str(error)
    result = run("query", "-c", f"from read_text('{beside}/secret.txt')", "--warehouse", places[place])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert held() == before


def test_each_layer_of_the_jail_holds_alone(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """DuckDB's allowed directories, and the file system of what is listed: with both taken away, SQL gets out."""
    beside = "s3://bucket/secret.txt"

    def reads(*taken: str) -> bool:
        if "directories" in taken:
            monkeypatch.setattr(jail, "_lock", lambda *_: None)
        with open_jailed(readable(places["s3"]), Limits()) as connection:
            if "listing" in taken:
                monkeypatch.setattr(listed.ListedFiles, "_below", lambda _, path: path)
                monkeypatch.setattr(listed.ListedFiles, "size", lambda *_: len(SECRET))
                monkeypatch.setattr(listed.ListedFiles, "read_range", lambda *_: SECRET.encode())
            try:
                return bool(connection.execute(f"select content from read_text('{beside}')").fetchall())
            except duckdb.Error:
                return False
            finally:
                monkeypatch.undo()

    assert not reads()
    assert not reads("directories")
    assert not reads("listing")
    assert reads("directories", "listing")


WRITERS = (
    ["ingest", "--model", "demo", "--prompts", "demo"],
    ["import", "vllm", "x.json", "--model", "y"],
    ["seal"],
    ["refresh"],
    ["runs", "--delete", "007", "--yes"],
    ["verify", "--repair"],
    ["geometry"],
    ["demo"],
    ["publish", "elsewhere"],
)


@pytest.mark.parametrize("arguments", WRITERS, ids=lambda arguments: arguments[0])
@pytest.mark.parametrize("place", ["folder", "s3", "web"])
def test_commands_that_write_refuse(place: str, arguments: list[str], places: dict[str, str]) -> None:
    result = run(*arguments, "--warehouse", places[place])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert "read-only" in result.stderr, result.stderr


def test_python_writes_to_none_of_them(places: dict[str, str]) -> None:
    for url in places.values():
        with pytest.raises(UsageError, match="read-only"):
            moewh.ingest("demo", ["a"], url)
        with pytest.raises(UsageError, match="read-only"):
            moewh.record(None, None, url)


@pytest.mark.parametrize(
    ("url", "code", "says"),
    [
        ("{s3}/none", 1, "there is no published warehouse"),
        ("s3://no-such-bucket/wh", 1, "there is no published warehouse"),
        ("{web}-none", 1, "there is no published warehouse"),
        ("http://127.0.0.1:9/wh", 1, "Cannot connect"),
        ("hf://datasets/no/one", 1, "If it is private, run `hf auth login` first."),
        ("hf://models/x/y", 2, "not a dataset"),
        ("ftp://host/wh", 2, "cannot read ftp://host/wh"),
        ("s3://", 2, "not a plain URL"),
        ("s3://bucket/../other", 2, "not a plain URL"),
        ("https://host/a?b=c", 2, "not a plain URL"),
    ],
)
def test_what_cannot_be_read_is_one_line(url: str, code: int, says: str, places: dict[str, str]) -> None:
    result = run("runs", "--warehouse", url.format(**places))
    assert (result.exit_code, len(result.stderr.splitlines())) == (code, 1), result.output
    assert says in result.stderr


def test_a_forbidden_bucket_is_one_line(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import s3fs

    async def forbidden(*_: object, **__: object) -> bytes:
        raise PermissionError("Forbidden")

    monkeypatch.setattr(s3fs.S3FileSystem, "_cat_file", forbidden)
    result = run("runs", "--warehouse", places["s3"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "access is denied (Forbidden). Check your credentials." in result.stderr


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.registry import _registry

    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(_registry, "s3", raising=False)
    result = run("runs", "--warehouse", "s3://bucket/wh")
    assert (result.exit_code, "pip install 'moewh[remote]'" in result.stderr) == (1, True), result.output


# ------------------------------------------------------------------------------------------ damage


@pytest.mark.parametrize("place", ["s3", "web", "folder"])
def test_verify_finds_a_damaged_file(place: str, places: dict[str, str], tmp_path: Path) -> None:
    """Flipped, cut, grown and gone: each is reported; a query over a shorter or missing file fails, with its name."""
    import s3fs

    damaged = tmp_path / "wh"
    listing = parse_listing((Path(places["folder"]) / LISTING).read_bytes()).without({"step-20", "step-30"})
    for path in listing.files:
        (damaged / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(places["folder"]) / path, damaged / path)
    (damaged / LISTING).write_bytes(listing_text(listing))
    files = [f"segments/run_id=007/segment=0/{name}.parquet" for name in ("routing", "tokens", "prompts", "segment")]
    data = {file: (damaged / file).read_bytes() for file in files}
    flipped = bytes([data[files[0]][100] ^ 1])
    (damaged / files[0]).write_bytes(data[files[0]][:100] + flipped + data[files[0]][101:])
    (damaged / files[1]).write_bytes(data[files[1]][:-7])
    (damaged / files[2]).write_bytes(data[files[2]] + b"more")
    (damaged / files[3]).unlink()
    if place == "s3":
        s3fs.S3FileSystem().put(str(damaged), "bucket/damaged", recursive=True)
    with web(tmp_path) as address:
        url = {"s3": "s3://bucket/damaged", "web": f"{address}/wh", "folder": str(damaged)}[place]
        result = run("verify", "--warehouse", url)
        assert result.exit_code == 1
        found = dict(line.split(": ", 1) for line in result.stdout.splitlines()[:-1])
        assert found[files[0]] == "has another sha256"
        assert f"than {len(data[files[1]]):,} bytes" in found[files[1]]
        assert f"has more than {len(data[files[2]]):,} bytes" == found[files[2]]
        assert found[files[3]] == "is missing"
        assert len(found) == 4
        failed = run("query", "-c", "from tokens where run_id = '007' and segment = 0", "--warehouse", url)
        assert (failed.exit_code, files[1] in failed.stderr, "Traceback" in failed.stderr) == (1, True, False)
        assert run("query", "runs", "--verify", "--warehouse", url).exit_code == 1


def test_verify_compares_the_manifests_with_the_listing(places: dict[str, str], tmp_path: Path) -> None:
    """Another file in a run whose listing has its digest, and what is no manifest, with its digest too."""
    folder = tmp_path / "wh"
    shutil.copytree(places["folder"], folder)
    listing = parse_listing((folder / LISTING).read_bytes())
    changed, manifest = "runs/run_id=007/layers.parquet", "geometry/run_id=007/manifest.json"
    (folder / changed).write_bytes((folder / "runs/run_id=step-20/layers.parquet").read_bytes())
    (folder / manifest).write_text("{")
    digests = {path: Listed((folder / path).stat().st_size, file_sha256(folder / path)) for path in (changed, manifest)}
    (folder / LISTING).write_bytes(listing_text(replace(listing, files={**listing.files, **digests})))
    found = run("verify", "--warehouse", str(folder))
    assert found.exit_code == 1
    bad, other, _ = found.stdout.splitlines()
    assert bad.startswith(f"{manifest}: ")
    assert other == f"{changed}: differs between manifest.json and published.json"


def test_a_damaged_listing_is_refused(places: dict[str, str], tmp_path: Path) -> None:
    folder = tmp_path / "wh"
    folder.mkdir()
    text = (Path(places["folder"]) / LISTING).read_text()
    for wrong in (
        "{",
        "[]",
        text.replace('"format": 2', '"format": 3'),
        text.replace("runs/run_id=007/layers.parquet", "runs/../../layers.parquet"),
        text.replace("runs/run_id=007/layers.parquet", "/etc/layers.parquet"),
        text.replace("sealed/run_id=007/expert_counts.parquet", "sealed/run_id=007/expert_counted.parquet"),
    ):
        (folder / LISTING).write_text(wrong)
        result = run("runs", "--warehouse", str(folder))
        assert (result.exit_code, LISTING in result.stderr, len(result.stderr.splitlines())) == (1, True, 1), wrong[:40]


def test_a_published_folder_becomes_ones_own(places: dict[str, str], tmp_path: Path) -> None:
    """Without its listing it is a warehouse like any other, sound and with the same results."""
    own = tmp_path / "wh"
    shutil.copytree(places["folder"], own)
    expected = run("query", "load_balance", "--format", "csv", "--warehouse", str(own)).stdout
    (own / LISTING).unlink()
    assert run("refresh", "--warehouse", str(own)).exit_code == 0
    assert run("verify", "--warehouse", str(own)).exit_code == 0
    assert run("query", "load_balance", "--format", "csv", "--warehouse", str(own)).stdout == expected
    assert run("runs", "--delete", "007", "--yes", "--warehouse", str(own)).exit_code == 0


# ------------------------------------------------------------------------------------------ the card


@pytest.mark.parametrize("place", ["folder", "s3", "web"])
def test_the_card_s_code_runs_for_its_readers(
    place: str, here: Layout, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its Python and its command, as they stand; its SQL loads httpfs where that is needed."""
    url = places[place]
    there = readable(url)
    assert isinstance(there, Published)
    text = there.place.read("README.md").decode()
    code = dict(re.findall(r"```(\w+)\n(.*?)\n```", text, re.DOTALL))
    assert code["sql"].startswith("ATTACH" if place == "folder" else "INSTALL httpfs;\nLOAD httpfs;\nATTACH")
    assert ("CREATE SECRET" in text) == (place == "s3")
    assert run(*shlex.split(code["sh"])[1:]).exit_code == 0
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # which concerns web servers, too
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    *imports, call = code["python"].splitlines()
    names: dict[str, Any] = {}
    exec("\n".join(imports), names)
    loaded = eval(call, names)
    folders = "segment=*" if place == "folder" else "segment=0"
    files = (here.root / "segments" / "run_id=007").glob(f"{folders}/routing.parquet")
    assert loaded.num_rows == sum(pq.read_metadata(file).num_rows for file in files) > 0


# ------------------------------------------------------------------------------------------ the plain shell


def test_a_plain_shell_attaches_the_folder(here: Layout, places: dict[str, str]) -> None:
    rows = shell_rows(Path(places["folder"]) / "warehouse.duckdb", "from wh.load_balance order by all")
    with open_warehouse(here) as connection:
        assert rows == connection.execute(queries.find_query("load_balance").sql).fetchall()


@pytest.mark.parametrize("place", ["s3", "web"])
def test_a_plain_shell_attaches_by_httpfs(place: str, here: Layout, places: dict[str, str]) -> None:
    package = pytest.importorskip("duckdb_extension_httpfs", reason="duckdb-extension-httpfs is not installed")
    extension = Path(package.__path__[0]) / f"extensions/v{duckdb.__version__}/httpfs.duckdb_extension"
    if not extension.is_file():
        pytest.skip(f"duckdb-extension-httpfs has no httpfs for DuckDB {duckdb.__version__}")
    endpoint = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://")
    secret = (
        "create secret (type s3, key_id 'key', secret 'secret', region 'us-east-1', "
        f"endpoint '{endpoint}', use_ssl false, url_style 'path')"
    )
    url = f"{places[place]}/warehouse.duckdb"
    rows = shell_rows(url, "from wh.load_balance order by all", f"load '{extension}'", secret)
    with open_warehouse(here) as connection:
        assert rows == connection.execute(queries.find_query("load_balance").sql).fetchall()
