"""Data sets on the Hub, read from a stand-in: pinned to a commit, recorded, and refused in one line."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts import hub as ingest_hub
from moewh.ingest.prompts.stream import PromptStream, SizeRule
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from tests.support.hub import COMMIT, REPO, hub

READ = """
import json, sys
from pathlib import Path
from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.stream import PromptStream, SizeRule
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
for line in sys.stdin:
    folder, given = json.loads(line)
    try:
        options = IngestOptions("m", **given)
        with PromptStream(options, Layout(Path(folder, "wh"))) as prompts:
            plan = prompts.plan(SizeRule(4, 100, False, 1000))
            rows = prompts.read(0, plan.prompts).to_pylist()
            found = {"rows": rows, "pinned": plan.pinned, "skipped": prompts.skipped}
    except MoewhError as error:
        found = {"error": str(error), "code": error.exit_code}
    print("found", json.dumps(found), flush=True)
"""
RULE = SizeRule(rows_per_token=4, max_length=100, chunked=False, segment_rows=1_000)
PINNED = f"hf://datasets/{REPO}@{COMMIT}"


def parquet(*texts: str) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), buffer)
    return buffer.getvalue()


FILES = {
    "data/train-0.parquet": parquet("a", "b"),
    "data/train-1.parquet": parquet("c"),
    "data/test-0.parquet": parquet("z"),
    "more/x.jsonl": b'{"text": "j"}\n',
    "README.md": b"# none\n",
}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with hub(FILES) as address:
        yield address


def started(folder: Path, endpoint: str, **environment: str) -> subprocess.Popen[str]:
    """Start a process that reads prompts, where the Hub is the stand-in."""
    online = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    surroundings = {**os.environ, **online, "PYTHONPATH": str(Path.cwd()), **environment}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    return subprocess.Popen([sys.executable, "-c", READ], cwd=folder, env=surroundings, text=True, **pipes)


def asked(process: subprocess.Popen[str], folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return what such a process reads with these options."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([str(folder), options]) + "\n")
    process.stdin.flush()
    answers = (line.removeprefix("found ") for line in process.stdout if line.startswith("found "))
    found: dict[str, Any] = json.loads(next(answers))
    return found


def read(folder: Path, endpoint: str, **options: Any) -> dict[str, Any]:
    """Read prompts in a separate process."""
    with started(folder, endpoint, **options.pop("env", {})) as process:
        return asked(process, folder, options)


@pytest.fixture(scope="module")
def process(endpoint: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[str]]:
    """One process for many requests, so that it imports the Hub's readers once."""
    with started(tmp_path_factory.mktemp("reader"), endpoint) as running:
        yield running


@pytest.mark.parametrize(
    ("name", "texts"),
    [
        (f"hf://datasets/{REPO}/data/train-0.parquet", "ab"),
        (f"hf://datasets/{REPO}@v1/more/x.jsonl", "j"),
        (f"hf://datasets/{REPO}@{COMMIT}/more/x.jsonl", "j"),
        (f"hf://datasets/{REPO}/data/train-*.parquet", "abc"),
        (f"hf://datasets/{REPO}/data", "zabc"),
        (f"hf://datasets/{REPO}", "zabcj"),
    ],
)
def test_files_are_read_from_one_commit(name: str, texts: str, process: subprocess.Popen[str], tmp_path: Path) -> None:
    found = asked(process, tmp_path, {"prompts": [name]})
    assert [row["text"] for row in found["rows"]] == list(texts), found
    assert found["pinned"] == [PINNED]
    assert all(row["source"].startswith(f"{PINNED}/") for row in found["rows"])
    assert found["skipped"] == ([f"{PINNED}/README.md"] if name.endswith(REPO) else [])


def test_a_pinned_file_is_read_again_without_a_network(endpoint: str, tmp_path: Path) -> None:
    pinned = {"prompts": [f"{PINNED}/more/x.jsonl"]}
    assert read(tmp_path, endpoint, **pinned) == read(tmp_path, endpoint, env={"HF_HUB_OFFLINE": "1"}, **pinned)


@pytest.mark.parametrize(("split", "texts"), [("train", "abc"), ("test", "z")])
def test_data_sets_are_streamed_from_one_commit(
    split: str, texts: str, process: subprocess.Popen[str], tmp_path: Path
) -> None:
    found = asked(process, tmp_path, {"dataset": f"{REPO}@v1", "split": split, "config": "default"})
    assert [row["text"] for row in found["rows"]] == list(texts), found
    assert found["pinned"] == [PINNED]
    assert {row["source"] for row in found["rows"]} == {f"{PINNED}/default/{split}"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": ["hf://datasets/org/other/x.jsonl"]}, "org/other"),
        ({"prompts": [f"hf://datasets/{REPO}@v9/x.jsonl"]}, REPO),
        ({"prompts": [f"hf://datasets/{REPO}/none.jsonl"]}, "none.jsonl"),
        ({"prompts": ["hf://datasets/"]}, "is not a data set"),
        ({"dataset": "org/other"}, "org/other"),
        ({"dataset": REPO}, "has the splits"),
        ({"dataset": REPO, "split": "dev"}, "has no split 'dev'"),
        ({"dataset": REPO, "config": "nope"}, "nope"),
        ({"prompts": [f"hf://datasets/{REPO}/x.jsonl"], "env": {"HF_HUB_OFFLINE": "1"}}, "offline"),
        ({"dataset": REPO, "env": {"HF_HUB_OFFLINE": "1"}}, "offline"),
    ],
)
def test_what_the_hub_has_not_is_one_line(
    options: Any, says: str, process: subprocess.Popen[str], endpoint: str, tmp_path: Path
) -> None:
    error = (read(tmp_path, endpoint, **options) if "env" in options else asked(process, tmp_path, options))["error"]
    assert says in error
    assert "\n" not in error
    assert not (tmp_path / "wh").exists()


# ------------------------------------------------------------------------------------------ folders


def rows_of(folder: Path, **options: Any) -> list[dict[str, Any]]:
    with PromptStream(IngestOptions("m", **options), Layout(folder / "wh")) as prompts:
        rows: list[dict[str, Any]] = prompts.read(0, prompts.plan(RULE).prompts).to_pylist()
        return rows


@pytest.mark.parametrize("saved", [False, True])
def test_folders_that_the_library_reads(saved: bool, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": None}]
    if saved:
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(folder)
    else:
        folder.mkdir()
        pq.write_table(pa.Table.from_pylist(rows), folder / "train.parquet")
    (tmp_path / "first.txt").write_text("first\n")
    found = rows_of(tmp_path, dataset=str(folder), prompts=(str(tmp_path / "first.txt"),))
    assert [(row["text"], row["metadata"], row["source"]) for row in found] == [
        ("first", None, "first.txt"),
        ("a", '{"n":1}', "set"),
        ("b", '{"n":null}', "set"),
    ]


def test_a_saved_data_set_is_a_folder_of_prompts_too(tmp_path: Path) -> None:
    datasets.Dataset.from_list([{"text": "a"}, {"text": "b"}]).save_to_disk(tmp_path / "set")
    assert [row["text"] for row in rows_of(tmp_path, prompts=(str(tmp_path / "set"),))] == ["a", "b"]


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'moewh\[datasets\]'"):
        ingest_hub.open_dataset("org/name", None, None)


def test_options_that_need_a_data_set() -> None:
    for options in ({}, {"prompts": ("x",), "split": "train"}, {"prompts": ("x",), "config": "c"}):
        with pytest.raises(UsageError, match="--dataset"):
            IngestOptions("m", **options)  # type: ignore[arg-type]


def test_whatever_a_call_raises_is_one_line() -> None:
    def call() -> None:
        raise RuntimeError("first\nsecond")

    with pytest.raises(MoewhError, match=r"^name: first\. Check the name, the network and your access\.$"):
        ingest_hub.asking("name", call)
