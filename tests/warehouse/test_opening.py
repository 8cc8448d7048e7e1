"""Opening a warehouse copies views that were bound before; whatever has become of those, every answer is right."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import pytest

from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import glob_literal
from moewh.warehouse.views import cache as view_cache
from moewh.warehouse.views import publishing
from moewh.warehouse.views.cache import written_to
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.publishing import build
from moewh.warehouse.views.sql import sql_string
from moewh.warehouse.views.statements import create_views
from tests.support.damage import sound_warehouse
from tests.support.synthetic import empty_warehouse, random_run, write_run

READ = ("runs", "routes", "expert_load", "co_routing")


@pytest.fixture(scope="module")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Layout, Layout]:
    """Two warehouses of other rows, one of them where a path needs quotes and is no pattern."""
    folder = tmp_path_factory.mktemp("opening")
    first = empty_warehouse(folder / "first")
    write_run(first, random_run("other", 3, {0: (6, 2), 2: (6, 2)}))
    return first, sound_warehouse(folder / "it's [two]")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache that is still empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moewh"


def answers(connection: duckdb.DuckDBPyConnection) -> dict[str, list[str]]:
    return {name: sorted(map(repr, connection.sql(f"from {name}").fetchall())) for name in READ}


def bound_anew(layout: Layout) -> dict[str, list[str]]:
    with duckdb.connect() as connection:
        create_views(connection, layout, comments=False)
        return answers(connection)


@pytest.fixture(scope="module")
def expected(layouts: tuple[Layout, Layout]) -> list[dict[str, list[str]]]:
    """The answers of each warehouse."""
    return [bound_anew(layout) for layout in layouts]


@pytest.fixture(scope="module")
def bound(layouts: tuple[Layout, Layout], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's cache folder with the one file that opening a warehouse leaves there."""
    folder = tmp_path_factory.mktemp("bound")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        opened(layouts[0])
    return folder / "moewh"


def opened(layout: Layout) -> dict[str, list[str]]:
    with open_warehouse(layout) as connection:
        assert connection.sql("select database_name from duckdb_databases() where not internal").fetchall() == [
            ("memory",)
        ]
        return answers(connection)


@pytest.mark.usefixtures("cache")
def test_two_warehouses_share_the_views_and_nothing_else(
    layouts: tuple[Layout, Layout], expected: list[dict[str, list[str]]]
) -> None:
    first, second = expected
    assert first["routes"] != second["routes"]
    assert [opened(layout) for layout in (*layouts, *layouts)] == [first, second, first, second]


def test_copied_views_are_those_that_were_bound(layouts: tuple[Layout, Layout], cache: Path, tmp_path: Path) -> None:
    """Word for word as DuckDB copies them, except that the copied ones read the path from a macro."""
    layout = layouts[1]
    asked = "select view_name, sql from duckdb_views() where database_name = 'memory' and not internal order by all"
    with written_to(tmp_path / "views.duckdb") as connection:
        create_views(connection, layout, comments=False)
    with duckdb.connect() as connection:
        connection.execute(f"attach '{tmp_path}/views.duckdb' as bound; copy from database bound to memory")
        expected = connection.sql(asked).fetchall()
    with open_warehouse(layout) as connection:
        found = connection.sql(asked).fetchall()
    path = sql_string(glob_literal(layout.root))
    assert [(name, sql.replace("moewh_root())", f"{path})")) for name, sql in found] == expected
    assert len(list(cache.iterdir())) == 1


def published_views(file: Path) -> list[tuple[str, ...]]:
    """Return all SQL and comments of a published file."""
    with duckdb.connect(str(file), read_only=True) as connection:
        views = "select view_name, '', sql, comment from duckdb_views() where not internal"
        columns = "select table_name, column_name, data_type, comment from duckdb_columns() where not internal"
        return connection.sql(f"{views} union all {columns} order by all").fetchall()


def test_published_views_are_those_that_were_bound(
    layouts: tuple[Layout, Layout],
    expected: list[dict[str, list[str]]],
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, layout in zip(("one", "two", "three"), (*layouts, layouts[1]), strict=True):
        build(layout, tmp_path / name)
    (file,) = cache.iterdir()
    assert published_views(tmp_path / "one") == published_views(tmp_path / "two")
    assert all(comment for *_, comment in published_views(tmp_path / "one"))
    file.write_bytes(file.read_bytes()[:5_000])
    build(layouts[1], tmp_path / "damaged")
    monkeypatch.setattr(view_cache, "cached_views", lambda _: None)
    monkeypatch.setattr(publishing, "cached_views", lambda _: None)
    build(layouts[1], tmp_path / "anew")
    path = sql_string(glob_literal(layouts[1].root))
    views = published_views(tmp_path / "anew")
    assert published_views(tmp_path / "damaged") == views
    found = published_views(tmp_path / "three")
    assert [(*names, sql.replace("moewh_root())", f"{path})"), comment) for *names, sql, comment in found] == views
    for name in ("three", "anew"):
        with duckdb.connect(str(tmp_path / name), read_only=True) as connection:
            assert answers(connection) == expected[1]


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:5_000])


def flip(file: Path) -> None:
    file.write_bytes(bytes(byte ^ 255 for byte in file.read_bytes()))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "flipped": flip,
    "empty": lambda file: file.write_bytes(b""),
    "no database": lambda file: file.write_text("no database"),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_of_views_is_made_anew(
    damage: Callable[[Path], object],
    layouts: tuple[Layout, Layout],
    expected: list[dict[str, list[str]]],
    bound: Path,
    cache: Path,
) -> None:
    shutil.copytree(bound, cache)
    (file,) = cache.iterdir()
    sound = file.stat().st_size
    damage(file)
    assert opened(layouts[0]) == expected[0]
    assert opened(layouts[0]) == expected[0]
    (file,) = cache.iterdir()
    assert file.stat().st_size == sound


def test_without_a_cache_the_views_are_bound_anew(
    layouts: tuple[Layout, Layout],
    expected: list[dict[str, list[str]]],
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache.parent.write_text("a file where the cache would be")
    assert opened(layouts[0]) == expected[0]
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.chdir(cache.parent.parent)
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # which counts as unset
    assert opened(layouts[0]) == expected[0]
    assert not Path("relative").exists()


def test_a_cache_of_another_user_is_not_read(
    layouts: tuple[Layout, Layout],
    expected: list[dict[str, list[str]]],
    bound: Path,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(bound, cache)
    (file,) = cache.iterdir()
    with duckdb.connect(str(file)) as connection:
        connection.execute("create or replace view runs as select 'theirs' as run_id")
    with open_warehouse(layouts[0]) as connection:
        assert connection.sql("from runs").fetchall() == [("theirs",)]  # ours to change, so it is used
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    assert opened(layouts[0]) == expected[0]


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.usefixtures("cache")
def test_many_open_at_once(layouts: tuple[Layout, Layout], expected: list[dict[str, list[str]]]) -> None:

    def routes(number: int) -> list[str]:
        with open_warehouse(layouts[number % 2]) as connection:
            return sorted(map(repr, connection.sql("from routes").fetchall()))

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(routes, range(4))) == [answers["routes"] for answers in expected] * 2
