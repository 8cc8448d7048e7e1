"""Prompts: every format to the same rows, the digest, and the segment cuts compared with a plain loop."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.digest import PromptDigest
from moewh.ingest.prompts.stream import PromptPlan, PromptStream, SizeRule, estimated_rows, segment_starts
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout

RULE = SizeRule(rows_per_token=4, max_length=100, chunked=False, segment_rows=1_000)
ROWS: list[dict[str, Any]] = [
    {"text": "plain", "domain": "a", "source": "s", "n": "1"},
    {"text": 'quotes " and, commas', "domain": "b", "source": "s", "n": "2"},
    {"text": "new\nline and\r\nanother", "domain": "a", "source": "t", "n": "3"},
    {"text": "", "domain": "a", "source": "t", "n": "4"},
    {"text": "ünïcödé 漢字 🙂 \u2028 tab\t", "domain": "c's; drop table x", "source": "u", "n": "5"},
]
EXPECTED = [{**row, "form": "text", "metadata": json.dumps({"n": row["n"]}, separators=(",", ":"))} for row in ROWS]
for expected_row in EXPECTED:
    del expected_row["n"]


def as_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def as_jsonl(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=place % 2 == 0) + "\n" for place, row in enumerate(rows)).encode()


def read(folder: Path, *files: Path | str, **options: Any) -> tuple[PromptPlan, list[dict[str, Any]]]:
    """Plan and read all prompts of these files."""
    chosen = IngestOptions(model="m", prompts=tuple(str(file) for file in files), **options)
    with PromptStream(chosen, Layout(folder / "wh")) as prompts:
        plan = prompts.plan(RULE)
        return plan, prompts.read(0, plan.prompts).to_pylist()


@pytest.mark.parametrize(("suffix", "spell"), [("jsonl", as_jsonl), ("csv", as_csv), ("parquet", as_parquet)])
def test_formats_give_the_same_rows(suffix: str, spell: Any, tmp_path: Path) -> None:
    path = tmp_path / f"prompts.{suffix}"
    path.write_bytes(spell(ROWS))
    assert read(tmp_path, path)[1] == EXPECTED


def test_txt_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes("one\n\n  two \u2028 \r\nthree".encode())
    assert read(tmp_path, path, domain="d")[1] == [
        {"text": text, "form": "text", "domain": "d", "source": "p.txt", "metadata": None}
        for text in ("one", "", "  two \u2028 ", "three")
    ]


def test_standard_input_is_jsonl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "x", "domain": null}\n{"text": "y"}\n')))
    assert [(row["text"], row["domain"], row["source"]) for row in read(tmp_path, "-")[1]] == [
        ("x", None, "-"),
        ("y", None, "-"),
    ]
    assert not (tmp_path / "wh").exists()


def test_files_follow_each_other_and_limit_cuts(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{name} 1\n{name} 2\n")
    _, rows = read(tmp_path, tmp_path / "b.txt", tmp_path / "a.txt", limit=3)
    assert [row["text"] for row in rows] == ["b.txt 1", "b.txt 2", "a.txt 1"]


def test_other_columns_can_be_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"a.b": "x", "$kind": 7, "domain": "in metadata", "deep": {"text": [1, null]}}\n')
    _, rows = read(tmp_path, path, text_column="a.b", domain_column="$kind")
    assert rows[0]["text"] == "x"
    assert rows[0]["domain"] == "7"
    assert json.loads(rows[0]["metadata"]) == {"domain": "in metadata", "deep": {"text": [1, None]}}


def test_rows_with_other_keys_than_the_first_keep_them(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    lines = [{"text": str(n)} for n in range(30_000)] + [{"text": "last", "late": True}]
    path.write_bytes(as_jsonl(lines))
    plan, rows = read(tmp_path, path)
    assert plan.prompts == 30_001
    assert [row["text"] for row in rows] == [line["text"] for line in lines]
    assert rows[-1]["metadata"] == '{"late":true}'


def test_messages_and_ids_stand_in_for_a_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hi"}]
    rows: list[dict[str, Any]] = [
        {"text": "x", "messages": []},
        {"messages": chat, "domain": "d"},
        {"input_ids": [3, 1, 2], "n": 1},
    ]
    (tmp_path / "p.jsonl").write_bytes(as_jsonl(rows))
    spelled = json.dumps(chat, separators=(",", ":"))
    expected = [
        ("text", "x", '{"messages":[]}'),
        ("messages", spelled, None),
        ("input_ids", "[3,1,2]", '{"n":1}'),
    ]
    assert [(row["form"], row["text"], row["metadata"]) for row in read(tmp_path, tmp_path / "p.jsonl")[1]] == expected
    for place in (1, 2):
        (tmp_path / "p.parquet").write_bytes(as_parquet([rows[place]]))
        stored = read(tmp_path, tmp_path / "p.parquet")[1]
        assert [(row["form"], row["text"], row["metadata"]) for row in stored] == [expected[place]]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_named_domain_column_must_be_there(suffix: str, tmp_path: Path) -> None:
    spell = {"jsonl": as_jsonl, "csv": as_csv, "parquet": as_parquet}[suffix]
    path = tmp_path / f"p.{suffix}"
    path.write_bytes(spell(ROWS))
    with pytest.raises(MoewhError, match="Check --domain-column"):
        read(tmp_path, path, domain_column="subset")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.jsonl", b'{"text":"x"}\n' * 6 + b'{"text": \n{"text":"y"}\n', "line 7 is not valid JSON"),
        ("p.jsonl", b'{"text":"x"}\n\xff\xfe\n', "line 2 is not UTF-8"),
        ("p.jsonl", b'{"text":"x"}\n{"text":"\\ud800"}\n', "line 2 holds half of a surrogate pair"),
        ("p.jsonl", b'{"text":"x"}\n[1]\n', "record 2 is not a JSON object"),
        ("p.jsonl", b'{"text":"x"}\n{"body":"y"}\n', "record 2 has no 'text'"),
        ("p.jsonl", b'{"messages":"hi"}\n', "record 1 has 'messages' that are not a list of messages"),
        ("p.jsonl", b'{"text":5}\n', "record 1 has a 'text' that is not a string"),
        ("p.csv", b"body,domain\nx,y\n", "has no column 'text'; it has 'body', 'domain'"),
        ("p.csv", b"text,domain\nx,y\na,b,c\n", "not valid CSV"),
        ("p.csv", b"text,domain\nx,y\n\xff,b\n", "line 3 is not UTF-8"),
        ("p.txt", b"fine\nbad \xe9\n", "line 2 is not UTF-8"),
        ("p.parquet", b"PAR1 but not really", "not a readable Parquet file"),
        ("p.parquet", as_parquet([{"text": 5}]), "column 'text' holds int64, not text"),
        ("p.jsonl", b"", "there are no prompts in"),
        ("p.csv", b"", "there are no prompts in"),
        ("p.csv", b"text\n", "there are no prompts in"),
        ("p.txt", b"", "there are no prompts in"),
    ],
)
def test_bad_input_is_named_and_leaves_nothing(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoewhError) as caught:
        read(tmp_path, tmp_path / name)
    assert message in str(caught.value)
    assert name in str(caught.value)
    assert not (tmp_path / "wh").exists()


def test_unknown_suffix_and_missing_file_are_wrong_use(tmp_path: Path) -> None:
    (tmp_path / "p.doc").write_text("x")
    for path, message in ((tmp_path / "p.doc", "--prompts-format"), (tmp_path / "none.txt", "no prompts file")):
        with pytest.raises(UsageError, match=message):
            read(tmp_path, path)


def test_digest_does_not_depend_on_batches_and_sees_every_column() -> None:
    rows = [
        {"text": f"text {n}", "form": "text", "domain": None if n % 3 else "d", "source": "s", "metadata": None}
        for n in range(50)
    ]

    def digest(rows: list[dict[str, Any]], size: int) -> str:
        whole = PromptDigest()
        for batch in pa.Table.from_pylist(rows, schema=CANONICAL).to_batches(max_chunksize=size):
            whole.update(batch)
        return whole.hexdigest()

    assert len({digest(rows, size) for size in (1, 7, 50)}) == 1
    changed = [
        [*rows[:-1], {**rows[-1], column: value}] for column in CANONICAL.names for value in ("", "other", "s", None)
    ]
    different = {digest(other, 50) for other in changed if other != rows}
    assert digest(rows, 50) not in different
    assert len(different) == len([other for other in changed if other != rows])


@pytest.mark.parametrize("segment_rows", [1, 50, 333, 10_000])
def test_segments_are_cut_as_a_plain_loop_would(segment_rows: int) -> None:
    sizes = np.random.default_rng(segment_rows).integers(0, 2_000, 300)
    rule = SizeRule(rows_per_token=2, max_length=100, chunked=False, segment_rows=segment_rows)
    rows = [2 * (1 + min(-(-int(size) // 4), 100)) for size in sizes]
    assert estimated_rows(sizes, rule).tolist() == rows
    starts, used = [0], 0
    for place, needed in enumerate(rows):
        if place != starts[-1] and used + needed > segment_rows:
            starts.append(place)
            used = 0
        used += needed
    assert segment_starts(np.array(rows), segment_rows) == tuple(starts)


def test_only_what_is_needed_of_the_spool_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(as_jsonl([{"text": str(n)} for n in range(40_000)]))
    with PromptStream(IngestOptions(model="m", prompts=(str(path),)), Layout(tmp_path / "wh")) as prompts:
        prompts.plan(RULE)
        for start, stop in ((0, 1), (16_383, 16_386), (39_999, 40_000), (10, 35_000)):
            texts = prompts.read(start, stop).column("text").to_pylist()
            assert texts == [str(n) for n in range(start, stop)]
