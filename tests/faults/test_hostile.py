"""Hostile input: any bytes become rows or one clear error, and a label is data, never a path or SQL.

Property-based, with few examples here and many in `make soak` (MOEWH_EXAMPLES).
"""

from __future__ import annotations

import csv
import io
import json
import os
import pickle
import re
import shutil
import string
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from moewh.cli.main import main
from moewh.ingest.model.architecture import model_class
from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.canonical import PromptFile
from moewh.ingest.prompts.readers import read_prompts
from moewh.ingest.run import Progress, ingest
from moewh.warehouse.answer import query
from moewh.warehouse.answer.engine import open_engine
from moewh.warehouse.answer.jail import Limits, open_jailed
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import check_run_id
from moewh.warehouse.views.opening import open_warehouse
from tests.support.models import byte_tokenizer, save_model, tiny_model
from tests.support.synthetic import random_warehouse

settings.register_profile(
    "moewh",
    max_examples=int(os.environ.get("MOEWH_EXAMPLES", "25")),
    deadline=None,
    derandomize="MOEWH_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("moewh")

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
"""Any characters except halves of surrogate pairs."""
HOSTILE = st.sampled_from(
    [
        "'; drop view routes; --",
        "../../../etc/passwd",
        "run_id=x/segment=0",
        "\x00",
        "\u202e\u0000\ufffe",
        "=cmd|' /C calc'!A0",
        "${HOME}`id`$(id)",
        "%2e%2e%2f",
        "a" * 5_000,
        "NULL",
        "",
        "\r\n",
        '"',
        "\\",
        "\U0001d54f" * 50,
    ]
)
LABEL = TEXT | HOSTILE


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return random_warehouse(tmp_path_factory.mktemp("hostile") / "wh")[0]


def rows_of(content: bytes, form: str, **labels: Any) -> list[dict[str, Any]]:
    """Read a prompts file of these bytes."""
    with tempfile.NamedTemporaryFile(suffix=f".{form}") as file:
        file.write(content)
        file.flush()
        prompts = PromptFile(Path(file.name), form, "input", "input", **labels)
        return [row for batch in read_prompts(prompts) for row in batch.to_pylist()]


def moewh(layout: Layout, *arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, env={"MOEWH_WAREHOUSE": str(layout.root)})


# ------------------------------------------------------------------------------------------ prompts

RECORD = st.fixed_dictionaries({"text": LABEL, "domain": LABEL, "source": LABEL, "note": LABEL})
RECORDS = st.lists(RECORD, min_size=1, max_size=5)


def check_rows(records: list[dict[str, str]], rows: list[dict[str, Any]]) -> None:
    """Every label came through unchanged."""
    assert [{name: row[name] for name in ("text", "domain", "source")} for row in rows] == [
        {name: record[name] for name in ("text", "domain", "source")} for record in records
    ]
    assert [json.loads(row["metadata"])["note"] for row in rows] == [record["note"] for record in records]


@given(RECORDS, st.booleans())
def test_json_lines_come_through(records: list[dict[str, str]], ascii_only: bool) -> None:
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in records]
    check_rows(records, rows_of(("\n".join(lines) + "\n").encode(), "jsonl"))


@given(RECORDS)
def test_parquet_comes_through(records: list[dict[str, str]]) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records), buffer)
    check_rows(records, rows_of(buffer.getvalue(), "parquet"))


@given(RECORDS)
def test_csv_comes_through(records: list[dict[str, str]]) -> None:
    """An empty cell of CSV is NULL; everything else is unchanged."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["text", "domain", "source", "note"], quoting=csv.QUOTE_ALL)
    writer.writeheader()
    writer.writerows(records)
    rows = rows_of(buffer.getvalue().encode(), "csv")
    assert [row["text"] for row in rows] == [record["text"] for record in records]
    assert [row["domain"] or "" for row in rows] == [record["domain"] for record in records]


@given(st.lists(TEXT.filter(lambda text: not {"\n", "\0"} & {*text} and not text.endswith("\r")), min_size=1))
def test_text_lines_come_through(lines: list[str]) -> None:
    assume(not lines[0].startswith("\ufeff"))
    rows = rows_of(("\n".join(lines) + "\n").encode(), "txt")
    assert [row["text"] for row in rows] == lines


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | LABEL,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LABEL, inner, max_size=3),
    max_leaves=8,
)


@given(
    st.binary(max_size=200) | TEXT.map(str.encode),
    st.sampled_from(["jsonl", "json", "csv", "tsv", "parquet", "arrow", "txt"]),
)
@example(b'{"text": "\\ud800"}\n', "jsonl")
@example(b'{"text": "\xed\xa0\x80"}\n', "jsonl")
@example(b'{"text": "a"}\x00{"text": "b"}\n', "jsonl")
@example(b'{"text": 1e999}', "jsonl")
@example(b"\xef\xbb\xbftext\na\n", "csv")
@example(b'text\n"a\n', "csv")
@example(b"text,text\na,b\n", "csv")
@example(b"PAR1PAR1", "parquet")
def test_any_bytes_are_rows_or_one_error(content: bytes, form: str) -> None:
    try:
        rows = rows_of(content, form)
    except MoewhError as error:
        assert "\n" not in str(error).strip()
        assert "input" in str(error)
    else:
        assert all(isinstance(row["text"], str) for row in rows)


@given(st.integers(min_value=0), st.integers(0, 7))
def test_damaged_parquet_is_rows_or_one_error(place: int, bit: int) -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["é", "b"], "source": ["s", None], "n": [1, 2]}), buffer, compression="none")
    data = bytearray(buffer.getvalue())
    data[place % len(data)] ^= 1 << bit
    try:
        rows = rows_of(bytes(data), "parquet")
    except MoewhError as error:
        assert str(error).startswith("input: ")
    else:
        assert all(isinstance(row["text"], str) for row in rows)


def test_a_damaged_name_in_parquet_is_one_error() -> None:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": ["a"], "source": ["s"]}), buffer)
    with pytest.raises(MoewhError, match="input: not a readable Parquet file"):
        rows_of(buffer.getvalue().replace(b"source", b"so\xf5rce"), "parquet")


@given(st.lists(JSON, max_size=4))
def test_any_json_is_rows_or_one_error(values: list[Any]) -> None:
    content = "\n".join(json.dumps(value) for value in values).encode()
    try:
        rows = rows_of(content, "jsonl")
    except MoewhError as error:
        assert "input" in str(error)
    else:
        assert len(rows) == len(values)


@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_a_single_byte_of_json_is_one_error(form: str) -> None:
    """DuckDB reads no value from it."""
    for byte in (bytes([number]) for number in range(256)):
        if byte.strip():
            with pytest.raises(MoewhError, match=r"^input: "):
                rows_of(byte, form)
        else:
            assert rows_of(byte, form) == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"text": "a",\n"b": 1,}',
        b'{\n"prompts": [{"text": "a"},]}',
        b'{"a": {"text": "b",\n}}',
        b'{"text": "a"}\n{"text": "b"}x',
        b'{"text": "a"}\n{"te',
        b'[{"text": "a"}][{"text": "b"}]',
    ],
)
def test_json_that_is_not_quite_is_one_error(content: bytes) -> None:
    """DuckDB accepts some of it, or fails only when its rows are fetched."""
    with pytest.raises(MoewhError, match=r"^input: (line \d )?is not valid JSON: [^\n]*$"):
        rows_of(content, "json")


@pytest.mark.parametrize("form", ["jsonl", "csv", "txt", "parquet"])
def test_a_line_of_megabytes(form: str) -> None:
    text = "long é " * 1_000_000
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": [text]}), buffer)
    content = {
        "jsonl": json.dumps({"text": text}).encode(),
        "csv": f"text\n{text}\n".encode(),
        "txt": f"{text}\n".encode(),
        "parquet": buffer.getvalue(),
    }[form]
    (row,) = rows_of(content, form)
    assert row["text"] == text


NAME = LABEL.filter(lambda name: name not in ("domain", "source", "text", "messages", "input_ids"))


@given(NAME, LABEL)
def test_column_names_are_data_too(name: str, value: str) -> None:
    content = json.dumps({name: value, "domain": "d"}).encode()
    (row,) = rows_of(content, "jsonl", text_column=name)
    assert row["text"] == value


@given(NAME, NAME, LABEL, LABEL)
@example('a"b', "a'b", "x", "y")
@example("Text", "text_1", "x", "y")
@example("x", "X", "y", "z")
def test_column_names_of_tables_are_data_too(name: str, other: str, value: str, second: str) -> None:
    """DuckDB's names are case-insensitive, so columns are found by index."""
    assume(name != other)
    buffer = io.BytesIO()
    pq.write_table(pa.table({other: [second], name: [value], "domain": ["d"]}), buffer)
    (row,) = rows_of(buffer.getvalue(), "parquet", text_column=name)
    assert (row["text"], row["domain"]) == (value, "d")
    assert json.loads(row["metadata"]) == {other: second}


# ------------------------------------------------------------------------------------------ names, parameters, SQL


@given(LABEL)
@example("a" * 65)
@example("..")
@example("a\n")
@example("run_id=a")
def test_a_run_id_is_a_name_or_refused(run_id: str) -> None:
    root = Path("/warehouse")
    try:
        check_run_id(run_id)
    except UsageError as error:
        assert "is not allowed" in str(error)
        assert not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", run_id)
    else:
        assert set(run_id) <= set(string.ascii_letters + string.digits + "._-")
        assert Layout(root).segments(run_id).parent == root / "segments"
        assert os.path.normpath(Layout(root).run(run_id)) == str(Layout(root).run(run_id))


@given(LABEL)
@example("../wh")
@example("%")
@example("r' or 'a' = 'a")
def test_deleting_a_run_of_any_name_deletes_no_other(layout: Layout, name: str) -> None:
    before = sorted(layout.root.rglob("*"))
    assume(name not in {path.name.removeprefix("run_id=") for path in layout.root.glob("runs/*")})
    result = moewh(layout, "runs", "--yes", f"--delete={name}")
    assert (result.exit_code, result.stdout) in ((1, ""), (2, ""))
    assert len(result.stderr.splitlines()) == 1, result.stderr
    assert sorted(layout.root.rglob("*")) == before


@pytest.fixture(scope="module")
def jailed(layout: Layout) -> Iterator[duckdb.DuckDBPyConnection]:
    with open_jailed(layout, Limits()) as connection:
        yield connection


@given(LABEL)
def test_a_parameter_is_a_value(jailed: duckdb.DuckDBPyConnection, value: str) -> None:
    assume(query.parse_value(value) == value)
    values = query.parse_parameters((f"x={value}",))
    sql = query.Query("test", "select $x as bound, getvariable('x') as variable, count(*) > 0 as some from runs")
    answer = query.prepare(jailed, sql, values)
    assert answer is not None
    assert answer.execute().fetchall() == [(value, value, True)]


@given(LABEL, LABEL)
def test_parameter_names_are_names(name: str, value: str) -> None:
    try:
        values = query.parse_parameters((f"{name}={value}",))
    except UsageError:
        return
    assert all(re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", known) for known in values)


SQL_WORDS = st.sampled_from(
    """
    select from where with as union all copy to insert into explain analyze pivot unnest routes runs
    read_text('/etc/passwd') getvariable('x') 'x' "y" $x $1 ? 1 ( ) [ ] { } ; , * :: -- /* */ ' " $$ \x00
    """.split()  # noqa: SIM905 - forty quoted words hide what is in the list
)


@given(st.lists(SQL_WORDS, max_size=12).map(" ".join) | LABEL)
@example("select 1\x00; select 2")
@example("select '\x00'")
@example("(" * 5_000)
def test_any_sql_file_is_an_answer_or_one_line(layout: Layout, sql: str) -> None:
    before = sorted(path for path in layout.root.rglob("*"))
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "any.sql").write_text(sql, encoding="utf-8")
        result = moewh(layout, "query", f"{folder}/any.sql", "--format", "csv", "--timeout", "20")
        assert [path.name for path in Path(folder).iterdir()] == ["any.sql"]
    assert result.exit_code in (0, 1, 2), result.exception
    assert len(result.stderr.splitlines()) == (result.exit_code != 0), result.stderr
    assert "root:" not in result.output
    assert sorted(path for path in layout.root.rglob("*")) == before


@given(st.binary(max_size=100))
def test_any_bytes_as_an_sql_file(layout: Layout, content: bytes) -> None:
    with tempfile.NamedTemporaryFile(suffix=".sql") as file:
        file.write(content)
        file.flush()
        result = moewh(layout, "query", file.name, "--format", "csv", "--timeout", "20")
    assert result.exit_code in (0, 1, 2), result.exception
    assert len(result.stderr.splitlines()) == (result.exit_code != 0), result.stderr


# ------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("hostile") / "tiny")


def prompts_file(folder: Path, *texts: str) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(folder: Path, model: Path, prompts: Path, **options: Any) -> list[str]:
    """Ingest into folder/wh; return the warnings."""
    warnings: list[str] = []
    chosen = IngestOptions(model=str(model), prompts=(str(prompts),), **{"run_id": "r", **options})
    ingest(chosen, Layout(folder / "wh"), Progress(warn=warnings.append))
    return warnings


HOSTILE_LABELS = [
    "'; drop view routes; --",
    "../../../etc/passwd",
    "run_id=x/segment=0",
    "a/b",
    "\x00\x1b[2J",
    "",
    " ",
    "*",
    "\n",
    "%41",
    "NULL",
    "\U0001d54f",
    "d" * 10_000,
]


def test_labels_are_rows_and_nothing_else(model: Path, tmp_path: Path) -> None:
    """Hostile texts, domains, sources and metadata go through a model and come out of every view unchanged."""
    prompts = tmp_path / "p.jsonl"
    rows = [{"text": f"x{label}", "domain": label, "source": label, "note": label} for label in HOSTILE_LABELS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    before = sorted(tmp_path.iterdir())
    run(tmp_path, model, prompts)
    layout = Layout(tmp_path / "wh")
    assert sorted(tmp_path.iterdir()) == sorted([*before, layout.root])
    assert {path.name for path in layout.segments("r").iterdir()} == {"segment=0"}
    tables = {table.file for table in schema.TABLES} | {"manifest.json"}
    assert {path.name for path in layout.segment("r", 0).iterdir()} <= tables
    with open_warehouse(layout) as connection:
        sql = "select text, domain, source, metadata::json ->> 'note' from prompts order by prompt_id"
        assert connection.execute(sql).fetchall() == [(f"x{label}", label, label, label) for label in HOSTILE_LABELS]
        domains = "select distinct domain from domain_specialization order by all"
        assert connection.execute(domains).fetchall() == [(label,) for label in sorted(HOSTILE_LABELS)]
    asked = query.Query("-c", "select count(*) as n from prompts where domain = getvariable('d')")
    with open_engine("duckdb", None, layout, Limits()) as ask:
        for label in HOSTILE_LABELS:
            if "\x00" in label or label == "":  # the first cannot be in a command's argument; the second is SQL's ''
                continue
            quoted = "'" + label.replace("'", "''") + "'"
            answer = ask(asked, query.parse_parameters((f"d={quoted}",)))
            assert answer is not None
            assert answer.execute().fetchall() == [(1,)]
    assert moewh(layout, "query", "-c", asked.sql, "-p", f"d={quoted}", "--format", "csv").stdout == "n\n1\n"
    assert moewh(layout, "verify", "--rollups").exit_code == 0
    assert moewh(layout, "check").exit_code == 0


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_that_are_none_have_no_rows_and_are_reported(number: str, model: Path, tmp_path: Path) -> None:
    check_no_numbers(number, model, tmp_path)


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("moewh.ingest.write.segment.RoutingBuffer.invalid", lambda _: {}),
        ("numpy.isfinite", lambda weights: np.ones_like(weights, bool)),
    ],
    ids=["not reported", "not left out"],
)
def test_unused_numbers_that_are_wrong_are_noticed(
    what: str, change: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(what, change)
    with pytest.raises(AssertionError):
        check_no_numbers("nan", model, tmp_path)


def check_no_numbers(number: str, model: Path, tmp_path: Path) -> None:
    """A token whose embedding is NaN spoils its own prompt, through attention, and no other."""
    broken = tmp_path / "tiny"
    spoiled = tiny_model("olmoe")
    (token,) = byte_tokenizer()("Z", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        spoiled.model.embed_tokens.weight[token] = float(number)
    spoiled.save_pretrained(broken)
    byte_tokenizer().save_pretrained(broken)
    prompts = prompts_file(tmp_path, "sound", "abZcd", "sound as well", "Z", "the end")
    (tmp_path / "clean").mkdir()
    warnings = run(tmp_path, broken, prompts)
    run(tmp_path / "clean", model, prompts)

    with open_warehouse(Layout(tmp_path / "wh")) as connection:
        statuses = connection.execute("select status from prompts order by prompt_id").fetchall()
        rows = connection.execute("select token_id, layer, expert, weight from routing order by all").fetchall()
    assert [status for (status,) in statuses] == ["ok", "failed", "ok", "failed", "ok"]
    with open_warehouse(Layout(tmp_path / "clean" / "wh")) as connection:
        sql = "select token_id, layer, expert, weight from routing where token_id >> 24 not in (1, 3) order by all"
        clean = connection.execute(sql).fetchall()
    assert [row[:3] for row in rows] == [row[:3] for row in clean]
    assert [row[3] for row in rows] == pytest.approx([row[3] for row in clean], rel=1e-5)
    assert [warning.partition(";")[0] for warning in warnings] == [
        f"layer {layer}: 8 tokens have weights that are not finite (prompts 1, 3)" for layer in range(3)
    ]


def changed_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))


def changed_tokenizer(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(folder)


def changed_weights(folder: Path) -> None:
    save_model(folder, seed=7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (changed_config, "config_sha256 was "),
        (changed_tokenizer, "tokenizer_sha256 was "),
        (changed_weights, "weights_sha256 was "),
    ],
    ids=["config", "tokenizer", "weights"],
)
def test_another_model_under_the_same_run_id_is_refused(change: Any, says: str, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "tiny")
    prompts = prompts_file(tmp_path, "one", "two")
    run(tmp_path, folder, prompts)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "wh").rglob("*")}
    change(folder)
    with pytest.raises(MoewhError, match=says) as refused:
        run(tmp_path, folder, prompts)
    assert str(refused.value).count(" was ") == 1, "nothing else differs"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "wh").rglob("*")} == before


def test_a_tokenizer_that_is_not_looked_at_is_noticed(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moewh.ingest.identity.tokenizer_sha256", lambda _: "")
    folder = shutil.copytree(model, tmp_path / "tiny")
    run(tmp_path, folder, prompts_file(tmp_path, "one", "two"))
    changed_tokenizer(folder)
    run(tmp_path, folder, prompts_file(tmp_path, "one", "two"))  # not refused here: the digest refuses it


def test_other_prompts_or_revision_under_the_same_run_id_are_refused(model: Path, tmp_path: Path) -> None:
    run(tmp_path, model, prompts_file(tmp_path, "one", "two"))
    with pytest.raises(MoewhError, match="prompts_sha256 was "):
        run(tmp_path, model, prompts_file(tmp_path, "one", "three"))
    renamed = prompts_file(tmp_path, "one", "two").rename(tmp_path / "renamed.jsonl")
    with pytest.raises(MoewhError, match=r"prompts_sha256 was .* source, which is the file's name unless a column"):
        run(tmp_path, model, renamed)
    prompts = prompts_file(tmp_path, "one")
    run(tmp_path, Path("demo"), prompts, run_id="d", revision="step-000400")
    with pytest.raises(MoewhError, match="revision was step-000400, now step-002000"):
        run(tmp_path, Path("demo"), prompts, run_id="d", revision="step-002000")


def test_code_of_the_model_does_not_run(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "tiny")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(MoewhError, match="--trust-remote-code"):
        run(tmp_path, folder, prompts_file(tmp_path, "one"))
    assert not (tmp_path / "ran").exists()


class Evil:
    """Creates a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_loaded_only_when_allowed(model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "tiny")
    (folder / "model.safetensors").unlink()
    prompts = prompts_file(tmp_path, "one")
    torch.save(tiny_model("olmoe").state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MoewhError, match="--allow-pickle"):
        run(tmp_path, folder, prompts)
    run(tmp_path, folder, prompts, allow_pickle=True)
    torch.save(tiny_model("olmoe", seed=3).state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(MoewhError, match="weights_sha256 was "):
        run(tmp_path, folder, prompts, allow_pickle=True)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil(tmp_path / "ran")}))
    for allowed in (False, True):
        with pytest.raises(MoewhError):
            run(tmp_path, folder, prompts, run_id="s", allow_pickle=allowed)
        assert not (tmp_path / "ran").exists()


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub cache that holds the tiny model as somebody/tiny, with main at one commit."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    home = tmp_path / "hub" / "models--somebody--tiny"
    shutil.copytree(model, home / "snapshots" / commit)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    yield commit


def test_a_hub_model_is_pinned_to_a_commit(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str | None] = []
    real = model_class

    def spy(*arguments: Any) -> Any:
        kind = real(*arguments)

        class Spy:
            @staticmethod
            def from_pretrained(*places: Any, revision: str | None, **named: Any) -> Any:
                asked.append(revision)
                return kind.from_pretrained(*places, revision=revision, **named)

        return Spy

    monkeypatch.setattr("moewh.ingest.model.loading.model_class", spy)
    run(tmp_path, Path("somebody/tiny"), prompts_file(tmp_path, "one"))
    assert asked == [hub], "the weights come from the commit of the configuration, wherever the branch is by then"
    with open_warehouse(Layout(tmp_path / "wh")) as connection:
        rows = connection.execute("select commit_hash, options::json ->> 'revision' from runs").fetchall()
    assert rows == [(hub, hub)]
