"""Real-world files: the same records in every format, compression and location give the same prompts."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts import json_records
from moewh.ingest.prompts.readers import FORMATS, SUFFIXES
from moewh.ingest.prompts.stream import PromptStream, SizeRule
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout

RULE = SizeRule(rows_per_token=4, max_length=100, chunked=False, segment_rows=1_000)
Rows = list[dict[str, Any]]
RECORDS: Rows = [
    {"text": 'é "quoted", it\tsaid', "domain": "a", "source": "s", "note": "1"},
    {"text": "NaN", "domain": "b", "source": "s", "note": "[1,2]"},
    {"text": "two\nlines; | more", "domain": "a", "source": "t", "note": "漢"},
]
EXPECTED = [
    {
        **{name: row[name] for name in ("text", "domain", "source")},
        "form": "text",
        "metadata": json.dumps({"note": row["note"]}, ensure_ascii=False, separators=(",", ":")),
    }
    for row in RECORDS
]
CHAT = [{"role": "user", "content": "hi"}]
SHARED = [{"from": "human", "value": "hi"}]


def stream(folder: Path, *prompts: str | Path, **options: Any) -> PromptStream:
    return PromptStream(IngestOptions("m", tuple(map(str, prompts)), **options), Layout(folder / "wh"))


def read(folder: Path, *prompts: str | Path, **options: Any) -> Rows:
    with stream(folder, *prompts, **options) as opened:
        rows: Rows = opened.read(0, opened.plan(RULE).prompts).to_pylist()
        return rows


def written(write: Callable[[io.BytesIO], Any]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def delimited(delimiter: str, rows: Rows = RECORDS) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def streamed() -> bytes:
    table = pa.Table.from_pylist(RECORDS)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


CATEGORIES = pd.DataFrame(RECORDS).astype("category")
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in RECORDS).encode()
FILES: dict[str, bytes] = {
    "lines.jsonl": JSONL,
    "lines.ndjson": JSONL.replace(b"\n", b"\r\n"),
    "lines.json": JSONL,
    "array.json": json.dumps(RECORDS).encode(),
    "indented.json": json.dumps(RECORDS, indent=2).encode() + b"\n",
    "one-after-another.json": "\n".join(json.dumps(row, indent=1) for row in RECORDS).encode(),
    "under-a-key.json": json.dumps({"version": "1", "tags": ["x"], "data": RECORDS}).encode(),
    "under-a-key-indented.json": json.dumps({"rows": RECORDS}, indent=4).encode(),
    "commas.csv": delimited(","),
    "semicolons.csv": delimited(";"),
    "pipes.csv": delimited("|"),
    "tabs.csv": delimited("\t"),
    "tabs.tsv": delimited("\t"),
    "arrow.parquet": written(lambda out: pq.write_table(pa.Table.from_pylist(RECORDS), out)),
    "pandas.parquet": written(lambda out: pd.DataFrame(RECORDS).to_parquet(out, index=False)),
    "categories.parquet": written(lambda out: CATEGORIES.to_parquet(out, index=False)),
    "categories.feather": written(CATEGORIES.to_feather),
    "polars.parquet": written(lambda out: pl.DataFrame(RECORDS).write_parquet(out)),
    "categorical.parquet": written(
        lambda out: pl.DataFrame(RECORDS).with_columns(pl.all().cast(pl.Categorical)).write_parquet(out)
    ),
    "polars.arrow": written(lambda out: pl.DataFrame(RECORDS).write_ipc(out)),
    "polars-zstd.feather": written(lambda out: pl.DataFrame(RECORDS).write_ipc(out, compression="zstd")),
    "polars.csv": pl.DataFrame(RECORDS).write_csv().encode(),
    "polars.ndjson": pl.DataFrame(RECORDS).write_ndjson().encode(),
    "stream.arrow": streamed(),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data[:20]) + gzip.compress(data[20:]),
    ".zst": lambda data: pa.compress(data, "zstd", asbytes=True),
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", FILES)
def test_the_same_records_are_the_same_prompts(name: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / (name + suffix)
    path.write_bytes(COMPRESSED[suffix](FILES[name]))
    assert read(tmp_path, path) == EXPECTED


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(("json", "jsonl", "csv", "tsv"))])
def test_byte_order_marks(name: str, codec: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(FILES[name].decode().encode(codec))
    assert read(tmp_path, tmp_path / name) == EXPECTED


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["lines.jsonl", "array.json", "tabs.tsv", "polars.parquet", "stream.arrow"])
def test_standard_input_of_every_format(name: str, suffix: str, tmp_path: Path, monkeypatch: Any) -> None:
    data = COMPRESSED[suffix](FILES[name])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert read(tmp_path, "-", prompts_format=name.split(".")[1]) == EXPECTED


def test_a_name_that_promises_another_compression_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "plain.jsonl.gz").write_bytes(JSONL)
    (tmp_path / "gzip.jsonl").write_bytes(gzip.compress(JSONL))
    assert read(tmp_path, tmp_path / "plain.jsonl.gz", tmp_path / "gzip.jsonl") == EXPECTED * 2


def test_folders_and_patterns(tmp_path: Path) -> None:
    folder = tmp_path / "data [v1]"
    for place in ("b/x.jsonl", "a.csv.gz", "b/.hidden.jsonl", ".git/x.jsonl", "README.md", "LICENSE.txt", "state.json"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_bytes(b'{"text":"x"}\n' if place.endswith("jsonl") else b"text\na\n")
    with stream(tmp_path, folder) as opened:
        assert opened.read(0, opened.plan(RULE).prompts).column("source").to_pylist() == ["a.csv.gz", "b/x.jsonl"]
        assert [Path(path).name for path in opened.skipped] == ["LICENSE.txt", "README.md", "state.json"]
    for pattern, sources in ((f"{tmp_path}/data*/*.gz", ["data [v1]/a.csv.gz"]), (f"{tmp_path}/d*/b/*", None)):
        rows = read(tmp_path, pattern)
        assert [row["source"] for row in rows] == (sources or ["data [v1]/b/x.jsonl"])
    with pytest.raises(UsageError, match=r"/\*\.parquet matches no file"):
        read(tmp_path, f"{tmp_path}/*.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="empty matches no file"):
        read(tmp_path, tmp_path / "empty")


def test_links_to_folders_are_followed_and_circles_refused(tmp_path: Path) -> None:
    elsewhere, folder = tmp_path / "elsewhere", tmp_path / "data"
    for place in (elsewhere / "deep", folder):
        place.mkdir(parents=True)
        (place / "x.jsonl").write_bytes(b'{"text":"x"}\n')
    (folder / "code").symlink_to(elsewhere)
    assert [row["source"] for row in read(tmp_path, folder)] == ["code/deep/x.jsonl", "x.jsonl"]
    for target in (folder, tmp_path, elsewhere):
        (elsewhere / "back").symlink_to(target)
        with pytest.raises(UsageError, match=r"back is a link to .*, which it is in\. Remove the link"):
            read(tmp_path, folder)
        (elsewhere / "back").unlink()


def test_what_is_no_file_is_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
        for name in ("pipe.jsonl", "socket"):
            with pytest.raises(UsageError, match=f"{name} is not a regular file"):
                read(tmp_path, tmp_path / name)


CHOICES: list[tuple[dict[str, Any], str | None, tuple[str, Any, Any]]] = [
    ({"prompt": "a ", "completion": "b", "k": 1}, None, ("text", "a b", {"k": 1})),
    ({"prompt": "a", "completion": None}, None, ("text", "a", None)),
    ({"prompt": "a", "completion": "b"}, "prompt", ("text", "a", {"completion": "b"})),
    ({"prompt": CHAT, "completion": CHAT}, None, ("messages", CHAT + CHAT, None)),
    ({"prompt": CHAT, "chosen": CHAT}, None, ("messages", CHAT, {"chosen": CHAT})),
    ({"prompt": "a", "chosen": CHAT}, "chosen", ("messages", CHAT, {"prompt": "a"})),
    ({"text": "t", "prompt": "a"}, None, ("text", "t", {"prompt": "a"})),
    ({"instruction": "i", "input": "", "output": "o"}, None, ("text", "i\no", None)),
    ({"instruction": "i", "input": "x", "output": "o", "text": "t"}, "text", ("text", "t", "rest")),
    ({"instruction": "i", "input": "x", "output": "o"}, None, ("text", "i\nx\no", None)),
    (
        {"conversations": [{"from": "human", "value": "hi"}]},
        None,
        ("messages", [{"from": "human", "value": "hi"}], None),
    ),
    ({"messages": CHAT, "tools": None}, None, ("messages", CHAT, {"tools": None})),
    ({"messages": CHAT, "tools": [{"a": 1}]}, None, ("messages", {"messages": CHAT, "tools": [{"a": 1}]}, "rest")),
    ({"messages": CHAT, "tools": "[]"}, None, ("messages", {"messages": CHAT, "tools": "[]"}, "rest")),
    (
        {"messages": CHAT, "documents": [{"t": "d"}], "tools": "x"},
        None,
        ("messages", {"messages": CHAT, "tools": "x", "documents": [{"t": "d"}]}, "rest"),
    ),
    ({"messages": json.dumps(CHAT)}, None, ("messages", CHAT, None)),
    ({"input_ids": [1, 2], "attention_mask": [1, 1]}, None, ("input_ids", [1, 2], "rest")),
    (
        {"input_ids": [0, 2], "attention_mask": [0, 1]},
        None,
        ("input_ids", {"input_ids": [0, 2], "attention_mask": [0, 1]}, "rest"),
    ),
    ({"text": "t", "messages": CHAT}, "messages", ("messages", CHAT, {"text": "t"})),
    ({"text": "t", "messages": CHAT}, "text", ("text", "t", {"messages": CHAT})),
    ({"text": "t", "input_ids": [3]}, "input_ids", ("input_ids", [3], {"text": "t"})),
    ({"ids": [3, 4]}, "ids", ("input_ids", [3, 4], None)),
    ({"messages": "just a text"}, "messages", ("text", "just a text", None)),
    ({"a": {"b": "t", "c": 1}}, "a.b", ("text", "t", {"a": {"c": 1}})),
    ({"a": {"b": {"messages": CHAT}, "c": 1}}, "a.b.messages", ("messages", CHAT, {"a": {"c": 1, "b": {}}})),
    ({"a.b": "t", "a": {"b": "u"}}, "a.b", ("text", "t", {"a": {"b": "u"}})),
    ({"text": None, "k": 1}, None, ("text", "", {"k": 1})),
    ({"messages": None, "k": 1}, None, ("text", "", {"k": 1})),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet", "json"])
@pytest.mark.parametrize(("record", "column", "expected"), CHOICES)
def test_which_columns_are_the_prompt(record: Any, column: Any, expected: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        table = pa.Table.from_pylist([record])
        table = table.cast(
            pa.schema([(f.name, pa.string() if pa.types.is_null(f.type) else f.type) for f in table.schema])
        )
        pq.write_table(table, path)
    else:
        path.write_text(json.dumps([record] if suffix == "json" else record))
    (row,) = read(tmp_path, path, text_column=column)
    form, text, metadata = expected
    if metadata == "rest":
        metadata = {name: value for name, value in record.items() if name not in (column or form, "text")}
    assert row["form"] == form
    assert (row["text"] if form == "text" else json.loads(row["text"])) == text
    assert json.loads(row["metadata"] or "null") == metadata


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("record", "column", "says"),
    [
        ({"text": "t", "messages": CHAT}, None, "1 has both 'text' and 'messages'. Choose one with --text-column."),
        ({"prompt": "t", "messages": CHAT}, None, "1 has both 'prompt' and 'messages'"),
        ({"text": "t", "input_ids": [1]}, None, "1 has both 'text' and 'input_ids'"),
        ({"messages": CHAT, "conversations": CHAT}, None, "1 has both 'messages' and 'conversations'"),
        ({"text": "t", "messages": json.dumps(CHAT)}, None, "1 has both 'text' and 'messages'"),
        ({"prompt": "t", "completion": CHAT}, None, "1 has a 'completion' that does not go on after its 'prompt'"),
        ({"instruction": CHAT, "output": "t"}, None, "1 has a 'output' that does not go on after its 'instruction'"),
        ({"question": "q", "answer": "a"}, None, "it has 'question', 'answer'"),
        ({"question": "q"}, "body", "has no"),
        ({"a": {"c": "q"}}, "a.b", "1 has no 'a.b'; it has 'a'"),
        ({"messages": CHAT}, "text", "has no"),
        ({"text": ["a", "b"]}, None, "text"),
    ],
)
def test_records_without_one_prompt_are_named(record: Any, column: Any, says: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"p.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record))
    with pytest.raises(MoewhError) as caught:
        read(tmp_path, path, text_column=column)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_tables_choose_per_row(tmp_path: Path) -> None:
    rows = [{"text": "t", "messages": None, "n": 1}, {"text": None, "messages": CHAT, "n": 2}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet, lines = (read(tmp_path, tmp_path / f"p.{suffix}") for suffix in ("parquet", "jsonl"))
    assert [{**row, "source": ""} for row in parquet] == [{**row, "source": ""} for row in lines]
    assert [row["form"] for row in parquet] == ["text", "messages"]


MIXED: Rows = [
    {"text": "t"},
    {"messages": CHAT, "tools": [{"n": 1}], "n": 2},
    {"prompt": "p", "completion": "c", "domain": "d"},
    {"input_ids": [1, 2], "attention_mask": [0, 1]},
    {"prompt": "p", "source": "s"},
    {"instruction": CHAT, "output": CHAT},
]


@pytest.mark.parametrize("at_once", [1, 2, 5, 100])
def test_json_records_are_converted_alike_whatever_others_are_converted_with_them(
    at_once: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The SQL for a batch leaves out the columns that none of its records has."""
    monkeypatch.setattr(json_records, "BATCH_ROWS", at_once)
    path = tmp_path / "p.json"
    path.write_text(json.dumps(MIXED))
    rows = read(tmp_path, path)
    assert [row["form"] for row in rows] == ["text", "messages", "text", "input_ids", "text", "messages"]
    assert [row["text"] for row in rows[::2]] == ["t", "pc", "p"]
    told = [json.loads(row["text"]) for row in rows[1::2]]
    assert told == [{"messages": CHAT, "tools": [{"n": 1}]}, MIXED[3], [*CHAT, *CHAT]]
    assert [json.loads(row["metadata"] or "null") for row in rows[:2]] == [None, {"tools": [{"n": 1}], "n": 2}]
    path.write_text(json.dumps({"rows": [*MIXED, None]}))
    with pytest.raises(MoewhError, match=r"p\.json: record 7 has no 'text', .*; it has no keys\. Name the column"):
        read(tmp_path, path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_nested_domain(suffix: str, tmp_path: Path) -> None:
    record = {"text": "t", "meta": {"set": {"name": "web"}, "k": 1}}
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), tmp_path / "p.parquet")
    else:
        (tmp_path / "p.jsonl").write_text(json.dumps(record))
    (row,) = read(tmp_path, tmp_path / f"p.{suffix}", domain_column="meta.set.name")
    assert (row["domain"], json.loads(row["metadata"])) == ("web", {"meta": {"k": 1, "set": {}}})
    with pytest.raises(MoewhError, match=r"meta\.name.*Check --domain-column"):
        read(tmp_path, tmp_path / f"p.{suffix}", domain_column="meta.name")


LONG_WINDOW = b"\x28\xb5\x2f\xfd\x04\xa8\x09\x00\x00\x78\x23\x11\x04\x83"
"""What `zstd --ultra --long=31` writes for the text x."""


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl.gz", gzip.compress(JSONL)[:-9], "damaged or cut off"),
        ("p.csv.zst", pa.compress(JSONL, "zstd", asbytes=True)[:-5], "damaged or cut off"),
        ("p.jsonl.zst", LONG_WINDOW, "compressed with a long window. Unpack it"),
        ("p.txt.bz2", bz2.compress(JSONL)[:-5], "damaged or cut off"),
        ("p.json.xz", lzma.compress(JSONL)[:-5], "damaged or cut off"),
        ("p.json", b'[{"text": "a"},\n', "is cut off"),
        ("p.json", b'[{"text": "a"},\n{"text" "b"}]', "line 2"),
        ("p.json", b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "it has 'a', 'b'"),
        ("p.json", b"[1]", 'record 1 is not a JSON object. Give each prompt as one, such as {"text"'),
        ("p.json", b"", "there are no prompts in"),
        ("p.json", b"[]", "there are no prompts in"),
        ("p.json", b"[" * 100_000 + b"]", "p.json"),
        ("p.csv", b"text,d\n" + b"x,y\n" * 5 + b"a,b,c\n", "Row #7: Expected 2 columns, got 3"),
        ("p.csv", "text,d\nx,y\n".encode("utf-16-le"), "is UTF-16 without a byte order mark"),
        ("p.csv", b"text;d\nx;y\n\xff;z\n", "line 3 is not UTF-8"),
        ("p.tsv", b"body\td\nx\ty\n", "has no column 'text'; it has 'body', 'd'"),
        ("p.arrow", b"ARROW1 but not really", "not a readable Arrow file"),
        ("p.arrow", streamed()[:-40], "not a readable Arrow file"),
        ("p.parquet", FILES["arrow.parquet"][:-40], "not a readable Parquet file"),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, says: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoewhError) as caught:
        read(tmp_path, tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "wh").exists()


def test_a_row_longer_than_a_block(tmp_path: Path) -> None:
    rows = [{"text": "a", "n": "1"}, {"text": "é" * 12_000_000, "n": "2"}, {"text": "b", "n": "3"}]
    (tmp_path / "p.csv").write_bytes(delimited(",", rows))
    assert [(row["text"], row["metadata"]) for row in read(tmp_path, tmp_path / "p.csv")] == [
        (row["text"], json.dumps({"n": row["n"]}, separators=(",", ":"))) for row in rows
    ]


def test_delimiter_can_be_given(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(delimited("~"))
    assert read(tmp_path, tmp_path / "p.csv", delimiter="~") == EXPECTED
    with pytest.raises(UsageError, match="--delimiter is 'ab'"):
        read(tmp_path, tmp_path / "p.csv", delimiter="ab")


@pytest.mark.parametrize("zone", ["Asia/Tokyo", "America/New_York"])
def test_metadata_does_not_depend_on_the_time_zone(zone: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", zone)
    table = pa.table({"text": ["t"], "at": pa.array([0], pa.timestamp("us", "Europe/Berlin"))})
    pq.write_table(table, tmp_path / "p.parquet")
    assert read(tmp_path, tmp_path / "p.parquet")[0]["metadata"] == '{"at":"1970-01-01 00:00:00+00"}'


def test_json_lines_with_numbers_json_does_not_know(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "NaN", "n": NaN, "deep": [{"x": -Infinity}], "say": "NaN, Infinity"}')
    (row,) = read(tmp_path, tmp_path / "p.jsonl")
    assert row["text"] == "NaN"
    assert row["metadata"] == '{"n":null,"deep":[{"x":null}],"say":"NaN, Infinity"}'


def test_plans_of_other_options_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_bytes(b"text;d,prompt\na;b,c\n")
    layout = Layout(tmp_path / "wh")
    seen = set()
    for options in ({}, {"delimiter": ";"}, {"delimiter": ","}, {"text_column": "prompt"}):
        with PromptStream(IngestOptions("m", (str(path),), **options), layout) as opened:  # type: ignore[arg-type]
            seen.add((opened._plan, json.dumps(opened.read(0, opened.plan(RULE).prompts).to_pylist())))
    assert len(seen) == 4


def test_a_format_is_one_file(tmp_path: Path) -> None:
    """A file added to a copy of the folder becomes a choice, a suffix and a reader; --help does not load it."""
    root = Path(__file__).resolve().parents[2]
    for room in ("ingest", "warehouse", "queries"):
        shutil.copytree(root / room, tmp_path / "moewh" / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(root / "moewh" / "cli", tmp_path / "moewh" / "cli")
    shutil.copy(root / "moewh" / "__init__.py", tmp_path / "moewh")
    (tmp_path / "moewh" / "ingest" / "prompts" / "formats" / "upper.py").write_text(
        "import pyarrow as pa\n"
        "from moewh.ingest.prompts.canonical import Format\n"
        "from moewh.ingest.prompts.tables import read_tables\n"
        "def read(path, file):\n"
        "    return read_tables([pa.table({'text': [path.read_text().upper()]})], file)\n"
        "FORMAT = Format(('.up',), read)\n"
    )
    (tmp_path / "a.up").write_text("hi")
    code = (
        "import sys\n"
        "from moewh.ingest.options import IngestOptions, PROMPT_FORMATS\n"
        "assert 'upper' in PROMPT_FORMATS and not {'pyarrow', 'duckdb'} & set(sys.modules)\n"
        "from pathlib import Path\n"
        "from moewh.ingest.prompts.sources import find_inputs\n"
        "options = IngestOptions('m', ('a.up',))\n"
        "(found,) = find_inputs(options).inputs\n"
        "print([text for batch in found.batches(Path(), options) for text in batch.column('text').to_pylist()])\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("['HI']\n", "")


def test_no_two_formats_share_a_suffix() -> None:
    suffixes = [suffix for form in FORMATS.values() for suffix in form.suffixes]
    assert len(SUFFIXES) == len(suffixes)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(UsageError, match=r"--prompts-format is 'yaml'\. Use arrow, csv, "):
        IngestOptions("m", ("-",), prompts_format="yaml")


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_cut_within_a_quoted_field_is_named(suffix: str, tmp_path: Path) -> None:
    """Cut anywhere: within quotes it is refused, elsewhere each whole text is read."""
    whole = b'text\nplain\n"a ""b""\nc"\n'
    first, last = whole.index(b'"'), whole.rindex(b'"')
    for end in range(first, len(whole) + 1):
        (tmp_path / f"p{suffix}").write_bytes(whole[:end])
        before = whole[first:end]
        if end > last or before.count(b'"') % 2 == 0:
            assert read(tmp_path, tmp_path / f"p{suffix}")[0]["text"] == "plain"
        else:
            with pytest.raises(MoewhError, match="ends within a quoted field"):
                read(tmp_path, tmp_path / f"p{suffix}")


def test_a_quote_within_a_plain_field_is_text(tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_bytes(b'text\n5" tall\nshort\n')
    assert [row["text"] for row in read(tmp_path, tmp_path / "p.csv")] == ['5" tall', "short"]


# ------------------------------------------------------------------------------------------ almost what was meant


def columns_of(record: Any, suffix: str, path: Path) -> Path:
    """Write one record as JSON lines or as Parquet."""
    if suffix == "parquet":
        pq.write_table(pa.Table.from_pylist([record]), path)
    else:
        path.write_text(json.dumps(record))
    return path


MISNAMED = [
    ({"text": "t", "Domain": "d"}, "'Domain', but no 'domain'. Rename it, or choose a column with --domain-column."),
    ({"text": "t", " domain": "d"}, "' domain', but no 'domain'"),
    ({"Text": "t", "prompt": "p"}, "'Text', but no 'text'. Rename it, or choose a column with --text-column."),
    ({"prompt": "p", "COMPLETION": "c"}, "'COMPLETION', but no 'completion'"),
    ({"instruction": "i", "Input": "x"}, "'Input', but no 'input'"),
    ({"messages": CHAT, "Tools": [{"a": 1}]}, "'Tools', but no 'tools'"),
    ({"input_ids": [1], "attention_mask ": [1]}, "'attention_mask ', but no 'attention_mask'"),
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize(("record", "says"), MISNAMED)
def test_a_column_that_is_almost_one_that_is_read_is_named(record: Any, says: str, suffix: str, tmp_path: Path) -> None:
    path = columns_of(record, suffix, tmp_path / f"p.{suffix}")
    with pytest.raises(MoewhError, match="has a column ") as caught:
        read(tmp_path, path)
    assert says in str(caught.value)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_column_of_another_case_is_no_mistake_beside_the_one_that_is_read(suffix: str, tmp_path: Path) -> None:
    record = {"text": "t", "Text": "u", "domain": "d", "DOMAIN": "e", "Tools": "x"}
    (row,) = read(tmp_path, columns_of(record, suffix, tmp_path / f"p.{suffix}"))
    assert (row["text"], row["domain"]) == ("t", "d")
    assert json.loads(row["metadata"]) == {"Text": "u", "DOMAIN": "e", "Tools": "x"}
    (row,) = read(tmp_path, tmp_path / f"p.{suffix}", text_column="Text", domain_column="DOMAIN")
    assert (row["text"], row["domain"]) == ("u", "e")


LEFT_OUT: Rows = [
    *({"messages": CHAT, name: "s"} for name in ("system", "system_prompt")),
    {"messages": CHAT, "functions": [{"name": "f"}]},
    {"conversations": SHARED, "system": "s"},
    {"prompt": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
    {"prompt": "p", "system_prompt": "s"},
    {"instruction": "i", "output": "o", "history": [["q", "a"]]},
    {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0]},
]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("record", LEFT_OUT)
def test_what_belongs_to_a_prompt_is_not_left_out_of_it(record: Any, suffix: str, tmp_path: Path) -> None:
    head, name = next(iter(record)), list(record)[-1]
    path = columns_of(record, suffix, tmp_path / f"p.{suffix}")
    with pytest.raises(MoewhError, match=f"1 has {name!r}, which would be left out of the prompt"):
        read(tmp_path, path)
    (row,) = read(tmp_path, path, text_column=head)
    assert json.loads(row["metadata"])[name] == record[name]


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_an_empty_system_prompt_leaves_nothing_out(nothing: Any, tmp_path: Path) -> None:
    record = {"messages": CHAT, "system": nothing, "functions": nothing}
    assert read(tmp_path, columns_of(record, "jsonl", tmp_path / "p.jsonl"))[0]["form"] == "messages"
    record = {"input_ids": [4, 5], "position_ids": [0, 1], "text": None}
    assert read(tmp_path, columns_of(record, "jsonl", tmp_path / "q.jsonl"))[0]["text"] == "[4,5]"


OTHER_DATA: list[tuple[str, Any, str]] = [
    ("p.txt", b"one\rtwo\rthree\r", "its lines end in a lone carriage return"),
    *(
        ("p.txt", f"{text}\n".encode(encoding), "holds NUL bytes: it is not text, or UTF-16 or UTF-32 without a byte")
        for text in ("Привет мир", "你好世界", "no")
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")
        if (text, encoding[:6]) != ("no", "utf-16-")
    ),
    ("p.txt", JSONL, "looks like jsonl, not one prompt per line. Give --prompts-format jsonl"),
    ("p.txt", b"\xef\xbb\xbf" + delimited(","), "looks like csv"),
    ("p.txt", delimited("\t"), "looks like tsv"),
    ("p.csv", b'text,d\n"a \\"b\\" c",d\n', "line 2 has a quoted field that goes on after its closing quote"),
    ("p.csv", b'text,d\n"Yes" she said,d\n', "line 2 has a quoted field that goes on after its closing quote"),
    ("p.tsv", b'text\td\nx\ty\n"Yes" she said\td\n', "line 3 has a quoted field"),
    ("p.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}\n', "has the key 'text' twice in one record"),
    ("p.json", b'[{"text": "a", "m": 1, "m": 2}]', "has the key 'm' twice in one record"),
    ("p.csv", b"messages\n\"[{'role': 'user', 'content': 'hi'}]\"\n", "row 1 has 'messages' that are not a list"),
    ("p.csv", b"prompt\n\"[{'role': 'user', 'content': 'hi'}]\"\n", "row 1 has chat messages in 'prompt', written as"),
    ("p.jsonl", json.dumps({"text": json.dumps(SHARED)}).encode(), "record 1 has chat messages in 'text', written as"),
    ("p.jsonl", b'{"conversations": {"from": ["human"], "value": ["hi"]}}', "'conversations' that are not a list"),
    ("p.csv", b"text,n,n\na,1,2\n", "has two columns of the same name, 'n'"),
    ("p.csv", FILES["arrow.parquet"], "p.csv: is Parquet, not text"),
    ("p.jsonl", FILES["polars.arrow"], "is Arrow, not text"),
    ("p.csv", b"PK\x03\x04\x14\0\x08\x08", "is a zip archive or an Excel file, not text"),
    *(
        (f"p.{form}", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS")
        for form in ("txt", "arrow")
    ),
    ("p.json", b'[{"text": "a"}, {"text": "b"]', "is not valid JSON: Expecting ',' delimiter"),
]


@pytest.mark.parametrize(("name", "content", "says"), OTHER_DATA)
def test_data_of_another_form_than_the_name_says_is_refused(
    name: str, content: bytes, says: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoewhError) as caught:
        read(tmp_path, tmp_path / name)
    assert says in str(caught.value)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_lines_that_look_like_records_are_lines_where_the_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text('{"text": "a"}\nprompt, with a comma\n')
    rows = read(tmp_path, tmp_path / "p.txt", prompts_format="txt")
    assert [row["text"] for row in rows] == ['{"text": "a"}', "prompt, with a comma"]
    (tmp_path / "q.txt").write_text("prompt, with a comma\nwith \r in it\n{1}\n")
    assert [row["text"] for row in read(tmp_path, tmp_path / "q.txt")][1:] == ["with \r in it", "{1}"]


def test_a_domain_that_is_nan_is_missing(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "a", "domain": NaN}\n{"text": "b", "domain": "NaN"}\n')
    pq.write_table(pa.table({"text": ["a", "b"], "domain": [float("nan"), 1.5]}), tmp_path / "p.parquet")
    assert [row["domain"] for row in read(tmp_path, tmp_path / "p.jsonl", tmp_path / "p.parquet")] == [
        *(None, "NaN"),
        *(None, "1.5"),
    ]


def test_a_folder_of_save_to_disk_holds_what_its_state_names(tmp_path: Path) -> None:
    """Not what `map` and an earlier, longer save left there: those prompts would be counted twice."""
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_dict({"text": list("abc")}).save_to_disk(folder, num_shards=3)
    shutil.copy(folder / "data-00000-of-00003.arrow", folder / "cache-0123456789abcdef.arrow")
    shutil.copy(folder / "data-00000-of-00003.arrow", folder / "data-00000-of-00009.arrow")
    state = json.loads((folder / "state.json").read_text())
    state["_data_files"].reverse()
    (folder / "state.json").write_text(json.dumps(state))
    assert [row["text"] for row in read(tmp_path, folder)] == ["c", "b", "a"]
    (folder / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UsageError, match=r"names data-00001-of-00003\.arrow, which is not there"):
        read(tmp_path, folder)


def test_a_folder_names_the_domain_of_its_files(tmp_path: Path) -> None:
    """As Hive, Spark and DuckDB write tables that are partitioned by a column."""
    for name in ("web%20page", "code", "__HIVE_DEFAULT_PARTITION__"):
        (tmp_path / "d" / f"domain={name}").mkdir(parents=True)
        (tmp_path / "d" / f"domain={name}" / "p.jsonl").write_text('{"text": "t"}\n')
    assert [row["domain"] for row in read(tmp_path, tmp_path / "d")] == [None, "code", "web page"]
    assert {row["domain"] for row in read(tmp_path, tmp_path / "d", domain="x")} == {"x"}
    (tmp_path / "d" / "domain=code").rename(tmp_path / "lang=en")
    assert read(tmp_path, str(tmp_path / "lang=*"), domain_column="lang")[0]["domain"] == "en"


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").symlink_to("a.txt")
    for again in (tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / ".." / tmp_path.name, f"{tmp_path}/*.txt"):
        with pytest.raises(UsageError, match=r"(is given twice|is the same file as .*)\. Name it once"):
            read(tmp_path, tmp_path / "a.txt", again)
    with pytest.raises(UsageError, match="a name given to --prompts is empty"):
        read(tmp_path, "")
