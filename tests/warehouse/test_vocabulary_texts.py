"""The text of a routing row: looked up once per vocabulary, however many runs have the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.ingest.write.run_files import write_run
from moewh.publish.publish import PublishOptions, publish
from moewh.publish.target import FolderTarget
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.remote.published import Readable, readable
from moewh.warehouse.runs import delete_run
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.shipped import staging_query
from tests.support.database_file import publish_for_reading
from tests.support.synthetic import Prompt, Run, Token, empty_warehouse, record_of, write_segment

VOCABULARIES: dict[str, list[str | None] | None] = {
    "words": ["a", "b", None, "b"],
    "turned": ["b", None, "a", "c"],
    "short": ["a"],
    "unknown": None,
}
"""Equal entries have other texts in each; the last is that of a trace without a tokenizer."""
RUNS = {"007": "words", "five": "turned", "four": "unknown", "one": "words", "six": "short", "two": "turned"}
"""The vocabulary of each run, in the order of DuckDB's files."""
ENTRIES = (3, 0, 2, 1, 3)
"""The entries of each run's tokens."""


def expected(runs: dict[str, str]) -> list[tuple[str, int, str | None]]:
    """Each token's text, looked up in its own run's vocabulary."""
    rows = []
    for run_id, name in sorted(runs.items()):
        texts = dict(enumerate(VOCABULARIES[name] or []))
        rows += [(run_id, position, texts.get(entry)) for position, entry in enumerate(ENTRIES)]
    return rows


def warehouse(root: Path, runs: dict[str, str]) -> Layout:
    layout = empty_warehouse(root)
    for run_id, name in runs.items():
        prompt = Prompt([Token(entry, {0: [(entry % 2, 1.0)]}) for entry in ENTRIES])
        run = Run(run_id, {0: (2, 1)}, [[prompt]])
        texts = VOCABULARIES[name]
        record = replace(record_of(run), vocabulary=None if texts is None else pa.array(texts, pa.string()))
        write_run(layout, record)
        write_segment(layout, record.identity, 0, [prompt], 0, layers=run.layers, last=True)
        seal(layout, run_id)
    return layout


@pytest.fixture(params=["written", "published"])
def six(request: pytest.FixtureRequest, tmp_path: Path) -> Readable:
    layout = warehouse(tmp_path / "wh", RUNS)
    if request.param == "written":
        return layout
    publish(layout, FolderTarget(tmp_path / "published"), PublishOptions(license="mit"))
    return readable(tmp_path / "published")


def asked(warehouse: Readable) -> list[tuple[str, int, str | None]]:
    with open_warehouse(warehouse) as connection:
        return texts_of(connection)


def texts_of(connection: duckdb.DuckDBPyConnection) -> list[tuple[str, int, str | None]]:
    return connection.execute("select run_id, position, token from routes order by run_id, position").fetchall()


def test_each_row_has_the_text_of_its_own_run(six: Readable) -> None:
    assert asked(six) == expected(RUNS)


def test_the_view_equals_its_definition(six: Readable) -> None:
    """moewh reads other files for it than its SQL in `queries/staging/` names, and finds the same rows."""
    with open_warehouse(six) as connection:
        defined = connection.execute(f"from ({staging_query('vocabulary_texts')}) order by all").fetchall()
        assert connection.execute("from vocabulary_texts order by all").fetchall() == defined
    assert len(defined) == len({row[:2] for row in defined}) == 4 + 4 + 1


def test_one_vocabulary_is_read_for_all_runs_that_have_it(six: Readable) -> None:
    """The files of the other runs may hold anything, since no query of routes opens them."""
    for run_id in ("one", "two"):
        file = Path(six.root) / "runs" / f"run_id={run_id}" / schema.VOCABULARY.file
        file.write_bytes(bytes(file.stat().st_size))
    assert asked(six) == expected(RUNS)


def test_rows_repeat_the_key_of_their_run(six: Readable) -> None:
    """Equal for equal vocabularies, and different for different ones."""
    sql = "select distinct run_id, vocabulary_key from {} order by all"
    with open_warehouse(six) as connection:
        keys, of_rows = (connection.execute(sql.format(table)).fetchall() for table in ("runs", "routing"))
    assert keys == of_rows
    key_by_run = dict(keys)
    for a, name_a in RUNS.items():
        assert [b for b in RUNS if key_by_run[b] == key_by_run[a]] == [b for b, name in RUNS.items() if name == name_a]


def test_a_deleted_run_takes_no_text_along(tmp_path: Path) -> None:
    """The run whose file was read for others may go, or lose that file alone, which a plain shell does not refuse."""
    layout = warehouse(tmp_path / "wh", RUNS)
    publish_for_reading(layout)
    with duckdb.connect(layout.database, read_only=True) as plain:
        (layout.run("007") / schema.VOCABULARY.file).unlink()
        assert texts_of(plain) == expected(RUNS)
        (layout.run("five") / schema.VOCABULARY.file).unlink()
        (layout.run("two") / schema.VOCABULARY.file).unlink()
        assert texts_of(plain) == expected({run: "unknown" if name == "turned" else name for run, name in RUNS.items()})
    for run_id in ("007", "five", "two"):
        delete_run(layout, run_id)
    assert asked(layout) == expected({run: name for run, name in RUNS.items() if run not in ("007", "five", "two")})


def test_an_entry_that_the_vocabulary_lacks_keeps_its_row(tmp_path: Path) -> None:
    runs = {"a": "unknown", "b": "words", "c": "short"}
    assert asked(warehouse(tmp_path / "wh", runs)) == expected(runs)


def test_a_copy_of_a_run_is_not_read(tmp_path: Path) -> None:
    """A folder that is no run's, with another text under the same key."""
    layout = warehouse(tmp_path / "wh", {"b": "words"})
    copy = layout.root / "runs" / "run_id=a (copy)"
    copy.mkdir()
    for file in layout.run("b").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    rows = pq.read_table(copy / schema.VOCABULARY.file, partitioning=None)
    others = pa.array(["z"] * len(rows), pa.string())
    pq.write_table(rows.set_column(1, "token", others), copy / schema.VOCABULARY.file)
    assert asked(layout) == expected({"b": "words"})


def test_a_warehouse_without_runs_has_no_texts(tmp_path: Path) -> None:
    assert asked(empty_warehouse(tmp_path / "wh")) == []
