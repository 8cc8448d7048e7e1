"""JSON documents of any size are read object by object: the same as `json` reads, and one at a time."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moewh.ingest.traces import brackets
from moewh.ingest.traces.documents import read_documents
from moewh.ingest.traces.model import read_model
from moewh.ingest.traces.trace import TraceFile, find_format
from moewh.warehouse.errors import MoewhError
from tests.support.traces import EXPERTS, MOE, TOP_K, config, sglang_answer, traced, vllm_answer, write_flame

HARD = [
    {"a": 'with "quotes", [brackets] and {braces}', "choices": [{"text": "}]\\"}, {"text": "\\\\"}]},
    {"a": [[1, 2], [3, 4]], "b": [[[1], [2]], [[3], [4]]], "c": {"d": [{"choices": [{"e": 1}]}]}},
    {"é": "ü𝄞", "choices": [], "n": None, "x": -1.5e-3, "t": [True, False], "empty": {}},
    {"choices": [{"deep": [[[[{"x": ["]"]}]]]]}], "escaped": "\\u005d\n\t", "after": [1, [2, {"y": []}]]},
    {"first": [{"choices": 1}], "choices": [{"l": [1, 2]}, {"l": []}], "choices2": [{"z": "\\"}]},
    {},
]


def read(path: Path, content: bytes, lists: tuple[str, ...] = ()) -> list[tuple[str, dict[str, Any]]]:
    """Read a file as the formats do; lists that come item by item are used up."""
    path.write_bytes(content)
    documents = read_documents(TraceFile(path, path.name, 1 << 40), lists=lists)
    return [
        (where, {name: list(value) if isinstance(value, Iterator) else value for name, value in document.items()})
        for where, document in documents
    ]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("ascii_only", [True, False])
def test_documents_are_what_json_reads(
    piece: int, indent: int | None, ascii_only: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However a file is cut into pieces while its brackets are counted."""
    monkeypatch.setattr(brackets, "_PIECE", piece)

    def text(value: Any) -> bytes:
        return json.dumps(value, indent=indent, ensure_ascii=ascii_only).encode()

    path = tmp_path / "t.json"
    assert [found for _, found in read(path, text(HARD))] == HARD
    assert [found for _, found in read(path, b"\xef\xbb\xbf \n" + text(HARD) + b"\n\n")] == HARD
    for document in HARD:
        assert read(path, text(document), ("choices",)) == [("t.json", document)]
        assert read(path, text(document)) == [("t.json", document)]
    assert read(path, text([])) == []


def test_lines_are_what_json_reads(tmp_path: Path) -> None:
    content = b"\n".join(json.dumps(document).encode() for document in HARD)
    for more in (b"", b"\n", b"\n\n  \n"):
        found = read(tmp_path / "t.jsonl", content + more, ("choices",))
        assert found == [(f"t.jsonl, line {number}", document) for number, document in enumerate(HARD, 1)]
    assert read(tmp_path / "t.jsonl", b"\n\n" + content)[0] == ("t.jsonl, line 3", HARD[0])


def test_other_encodings_are_read_whole(tmp_path: Path) -> None:
    for encoding in ("utf-16", "utf-16-le", "utf-32"):
        assert [found for _, found in read(tmp_path / "t.json", json.dumps(HARD).encode(encoding))] == HARD


@pytest.mark.parametrize("lists", [(), ("choices",)])
@pytest.mark.parametrize("document", [HARD, *HARD[:5]], ids=["list", "a", "b", "c", "d", "e"])
def test_document_that_is_cut_anywhere_is_refused(document: Any, lists: tuple[str, ...], tmp_path: Path) -> None:
    content = json.dumps(document).encode()
    for end in range(1, len(content)):
        with pytest.raises(MoewhError, match=r"^t\.json: ") as caught:
            read(tmp_path / "t.json", content[:end], lists)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[{}, {}] {}", "its document is not JSON: something follows its list"),
        ("[{} {}]", "its item 1 is not a JSON object, or there is no comma before it"),
        ("[{}, ,{}]", "its item 1 is not a JSON object"),
        ("[{}, ]", "its item 1 is not a JSON object"),
        ("[{}, 1, {}]", "its item 1 is not a JSON object"),
        ("[{}, [[[1]]]]", "its item 1 is not a JSON object"),
        ("[{}, [1]]", "its item 1 is not a JSON object"),
        ('["a"]', "its item 0 is not a JSON object"),
        ("[{}}", "its document is not JSON: byte 3 closes what is not open"),
        ('{"choices": [{"a": 1]}', "its document is not JSON: byte 20 closes what is not open"),
        ('{"choices": [{"a": 1, 2}]}', "its choices 0 is not JSON: "),
        ('{"choices": [{}], "a": nul}', "its document is not JSON: "),
        ('{"choices": [{}], "choices": [{}]}', "has choices twice"),
        ('{"choices": [{}], "choices": 1}', "its document has the key 'choices' twice"),
        ('{"a": 1}{"a": 2}', "its line 1 is not JSON: Extra data"),
        ('{"a": 1}\n[1]', "its line 2 is not a JSON object"),
        ('{\n"a": 1}\n{"a": 1}', "its line 1 is not JSON: "),
        ('{"a": ' * 2_000, "its document is nested too deeply"),
        ('{"a": "' + "[" * 2_000 + '"}\n{"a": ' + "[" * 200_000, "its line 2 is nested too deeply"),
        ("null", "its document is not a JSON object"),
        (" \n\t\n", "is empty"),
    ],
)
def test_what_is_no_document_is_told(content: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(MoewhError) as caught:
        read(tmp_path / "t.json", content.encode(), ("choices",))
    assert str(caught.value).startswith(f"t.json: {said}")


# ------------------------------------------------------------------------------------------ memory

ANSWERS, TOKENS, PIECE = 48, 5_000, 1 << 18
"""A document of 3 to 8 MB, one answer of less than 200 kB, and how much is read at a time: all a quarter of what would
show the same with the pieces that are read in earnest."""


def _answers(answer: Callable[[Any], dict[str, Any]]) -> Iterator[dict[str, Any]]:
    (short,) = traced(sequences=1)
    rng = np.random.default_rng(0)
    experts = np.argsort(rng.random((TOKENS - 1, *short.experts_RLK.shape[1:2], 7)), -1)[..., :2]
    long = answer(type(short)(rng.integers(1, 200, TOKENS), 5, experts))
    for _ in range(ANSWERS):
        yield long


def _plain(one: Any) -> dict[str, Any]:
    return {"expert_ids": one.experts_RLK.tolist(), "token_ids": one.ids_T.tolist()}


def _write(path: Path, documents: Iterator[dict[str, Any]], before: str = "[", after: str = "]") -> None:
    with path.open("w") as file:
        for number, document in enumerate(documents):
            file.write((", " if number else before) + json.dumps(document))
        file.write(after)


def _batch(path: Path) -> None:
    """One answer to a batch of prompts: a choice for each."""
    choices = (choice for answer in _answers(vllm_answer) for choice in answer["choices"])
    _write(path, choices, '{"id": "cmpl-1", "choices": [', '], "usage": {"prompt_tokens": 5}}')


def _npz(path: Path) -> None:
    arrays: dict[str, Any] = {}
    for number, answer in enumerate(_answers(_plain)):
        arrays[f"{number}/routed_experts"] = np.array(answer["expert_ids"], np.int64)
    np.savez(path, **arrays)


LARGE: dict[str, tuple[str, str, Callable[[Path], None]]] = {
    "vllm, a batch": ("vllm", "t.json", _batch),
    "vllm, a list": ("vllm", "t.json", lambda path: _write(path, _answers(vllm_answer))),
    "vllm, npz": ("vllm", "t.npz", _npz),
    "sglang, a list": ("sglang", "t.json", lambda path: _write(path, _answers(sglang_answer))),
    "plain, a list": ("plain", "t.json", lambda path: _write(path, _answers(_plain))),
}


@pytest.mark.parametrize("case", LARGE)
def test_memory_holds_one_answer(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own count of what it allocates, while every sequence of a large document is read."""
    monkeypatch.setattr(brackets, "_PIECE", PIECE)
    form, name, write = LARGE[case]
    path = tmp_path / name
    write(path)
    model = read_model(str(config(tmp_path / "model")))
    reading = find_format(form).read
    assert reading is not None
    tracemalloc.start()
    try:
        tokens = sum(len(sequence.expert_ids_RLK) for sequence in reading([TraceFile(path, name, 1 << 40)], model))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert tokens == ANSWERS * (TOKENS - 1)
    assert peak < path.stat().st_size / 3


PROMPTS, LENGTH = 200, 5_000
"""A Parquet file of some megabytes in one row group."""


def _plain_parquet(folder: Path) -> list[Path]:
    numbers = np.random.default_rng(0).random(PROMPTS * LENGTH * len(MOE) * TOP_K).astype(np.float32)

    def nested(flat: pa.Array) -> pa.Array:
        tokens = pa.FixedSizeListArray.from_arrays(pa.FixedSizeListArray.from_arrays(flat, TOP_K), len(MOE))
        return pa.ListArray.from_arrays(np.arange(0, PROMPTS * LENGTH + 1, LENGTH, dtype=np.int32), tokens)

    ids = pa.array(np.tile(np.arange(TOP_K, dtype=np.int16), len(numbers) // TOP_K))
    pq.write_table(pa.table({"expert_ids": nested(ids), "weights": nested(pa.array(numbers))}), folder / "t.parquet")
    return [folder / "t.parquet"]


def _flame(folder: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    tokens = PROMPTS * LENGTH
    experts = (rng.integers(0, EXPERTS, (tokens, len(MOE), 1)) + np.arange(TOP_K)) % EXPERTS
    scores = rng.random((tokens, len(MOE), TOP_K)).astype(np.float16)
    return write_flame(folder, rng.integers(0, 200, tokens), experts, scores, row_group_size=tokens)


@pytest.mark.parametrize(("form", "write"), [("plain", _plain_parquet), ("flame-moe", _flame)])
def test_memory_holds_no_row_group(form: str, write: Callable[[Path], list[Path]], tmp_path: Path) -> None:
    """Arrow's own count of what it allocates."""
    paths = write(tmp_path)
    model = read_model(str(config(tmp_path / "model")))
    reading = find_format(form).read
    assert reading is not None
    ours = pa.default_memory_pool()
    counting = pa.proxy_memory_pool(ours)
    pa.set_memory_pool(counting)
    try:
        files = [TraceFile(path, path.name, 1 << 40) for path in paths]
        assert sum(len(sequence.expert_ids_RLK) for sequence in reading(files, model)) == PROMPTS * LENGTH
    finally:
        pa.set_memory_pool(ours)
    assert counting.max_memory() < sum(path.stat().st_size for path in paths) / 2
