"""Every Arrow type in every role: as text, messages, ids, and metadata, where it only has to be valid JSON.

The expected values are written by hand, as JSON; the table lists every type that this pyarrow has.
"""

from __future__ import annotations

import datetime as dt
import decimal
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from moewh.ingest.prompts.canonical import PromptFile
from moewh.ingest.prompts.tables import read_tables
from moewh.warehouse.errors import MoewhError

Case = tuple[pa.Array, list[Any]]
NAN, INF = float("nan"), float("inf")
WHEN = dt.datetime(2024, 2, 29, 12, 30, 1)
CHAT = [{"role": "user", "content": "hi"}]


def encoded(values: pa.Array) -> pa.Array:
    """Run-end encode: each value twice."""
    return pa.RunEndEncodedArray.from_arrays(range(2, 2 * len(values) + 1, 2), values)


def sparse(codes: list[int]) -> pa.Array:
    children = [pa.array([7, 0]), pa.array(["", "x"])]
    return pa.UnionArray.from_sparse(pa.array([codes[0], codes[1]], pa.int8()), children, ["n", "s"], codes)


def dense() -> pa.Array:
    children = [pa.array([7.5, NAN]), pa.array(["x"])]
    return pa.UnionArray.from_dense(
        pa.array([0, 1, 0], pa.int8()), pa.array([0, 0, 1], pa.int32()), children, ["n", "s"]
    )


def extension(kind: pa.DataType, storage: pa.Array) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, storage)


INTEGERS = {name: getattr(pa, name)() for name in ("int8", "int16", "int32", "int64")}
UNSIGNED = {name: getattr(pa, name)() for name in ("uint8", "uint16", "uint32", "uint64")}
CASES: dict[str, Case] = {
    "NA": (pa.nulls(2), [None, None]),
    "BOOL": (pa.array([True, None, False]), [True, None, False]),
    **{name.upper(): (pa.array([-3, None, 100], kind), [-3, None, 100]) for name, kind in INTEGERS.items()},
    **{name.upper(): (pa.array([3, None, 200], kind), [3, None, 200]) for name, kind in UNSIGNED.items()},
    "UINT64 at its end": (pa.array([2**64 - 1], pa.uint64()), [2**64 - 1]),
    "HALF_FLOAT": (pa.array(np.array([1.5, NAN, -INF], np.float16)), [1.5, None, None]),
    "FLOAT": (pa.array([0.25, NAN, INF], pa.float32()), [0.25, None, None]),
    "DOUBLE": (pa.array([0.1, None, NAN, -INF]), [0.1, None, None, None]),
    "DECIMAL32": (pa.array([decimal.Decimal("1.50"), None], pa.decimal32(5, 2)), [1.5, None]),
    "DECIMAL64": (pa.array([decimal.Decimal("-1.50"), None], pa.decimal64(9, 2)), [-1.5, None]),
    "DECIMAL128": (pa.array([decimal.Decimal("0.25")], pa.decimal128(38, 2)), [0.25]),
    "DECIMAL128 of a negative scale": (pa.array([decimal.Decimal("1E5")], pa.decimal128(3, -4)), ["1.0E+5"]),
    "DECIMAL256": (pa.array([decimal.Decimal("1.50"), None], pa.decimal256(60, 2)), ["1.50", None]),
    "STRING": (pa.array(["NaN", None, 'q"é\n']), ["NaN", None, 'q"é\n']),
    "LARGE_STRING": (pa.array(["a", None], pa.large_string()), ["a", None]),
    "STRING_VIEW": (pa.array(["a", None, "longer than twelve"], pa.string_view()), ["a", None, "longer than twelve"]),
    "BINARY": (pa.array([b"a\x00\xff", None]), ["a\\x00\\xFF", None]),
    "LARGE_BINARY": (pa.array([b"\\"], pa.large_binary()), ["\\x5C"]),
    "BINARY_VIEW": (pa.array([b"a", None], pa.binary_view()), ["a", None]),
    "FIXED_SIZE_BINARY": (pa.array([b"ab", None], pa.binary(2)), ["ab", None]),
    "DATE32": (pa.array([WHEN.date(), None]), ["2024-02-29", None]),
    "DATE64": (pa.array([WHEN.date(), None], pa.date64()), ["2024-02-29", None]),
    **{
        f"TIMESTAMP {unit}": (pa.array([WHEN, None], pa.timestamp(unit)), ["2024-02-29 12:30:01", None])
        for unit in ("s", "ms", "us", "ns")
    },
    "TIMESTAMP": (pa.array([WHEN], pa.timestamp("us", "Asia/Tokyo")), ["2024-02-29 12:30:01+00"]),
    "TIMESTAMP out of range": (
        pa.array([2**60, 0], pa.timestamp("s")),
        ["<value out of range: 1152921504606846976>", "1970-01-01 00:00:00"],
    ),
    "TIME32": (pa.array([WHEN.time(), None], pa.time32("s")), ["12:30:01", None]),
    "TIME64": (pa.array([WHEN.time(), None], pa.time64("us")), ["12:30:01", None]),
    "DURATION": (pa.array([dt.timedelta(hours=1, milliseconds=1), None], pa.duration("ms")), ["01:00:00.001", None]),
    "DURATION out of range": (pa.array([2**62], pa.duration("s")), [str(2**62)]),
    "INTERVAL_MONTH_DAY_NANO": (
        pa.array([(14, 2, 3_000), None], pa.month_day_nano_interval()),
        ["1 year 2 months 2 days 00:00:00.000003", None],
    ),
    "LIST": (pa.array([[1.5, NAN], [], None]), [[1.5, None], [], None]),
    "LARGE_LIST": (pa.array([["a", None], None], pa.large_list(pa.string())), [["a", None], None]),
    "FIXED_SIZE_LIST": (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [[1, 2], None]),
    "LIST_VIEW": (pa.ListViewArray.from_arrays([1, 0], [1, 2], pa.array([7, 8])), [[8], [7, 8]]),
    "LARGE_LIST_VIEW": (pa.array([[1], None], pa.large_list_view(pa.int8())), [[1], None]),
    "LIST of half floats": (pa.array([[np.float16(1), np.float16(NAN)]], pa.list_(pa.float16())), [[1.0, None]]),
    "STRUCT": (pa.array([{"a": NAN, "b": {"c": [1, None]}}, None]), [{"a": None, "b": {"c": [1, None]}}, None]),
    "STRUCT without fields": (pa.array([{}, None], pa.struct([])), [{}, None]),
    "STRUCT of two cases": (pa.StructArray.from_arrays([pa.array([1]), pa.array([2])], ["a", "A"]), [{"a": 1, "A": 2}]),
    "MAP": (pa.array([[("k", 1), ("l", None)], None], pa.map_(pa.string(), pa.int8())), [{"k": 1, "l": None}, None]),
    "MAP of numbers": (pa.array([[(1, NAN)]], pa.map_(pa.int8(), pa.float64())), [{"1": None}]),
    "MAP of half floats": (pa.array([[("k", np.float16(2))]], pa.map_(pa.string(), pa.float16())), [{"k": 2.0}]),
    "SPARSE_UNION": (sparse([0, 1]), [{"n": 7}, {"s": "x"}]),
    "SPARSE_UNION of other codes": (sparse([5, 9]), [{"n": 7}, {"s": "x"}]),
    "DENSE_UNION": (dense(), [{"n": 7.5}, {"s": "x"}, {"n": None}]),
    "DICTIONARY": (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
    "DICTIONARY of half floats": (
        pa.DictionaryArray.from_arrays(pa.array([0, 0]), pa.array(np.array([2], np.float16))),
        [2.0, 2.0],
    ),
    "RUN_END_ENCODED": (encoded(pa.array(["a", None])), ["a", "a", None, None]),
    "EXTENSION": (extension(pa.opaque(pa.int8(), "t", "v"), pa.array([1, None], pa.int8())), [1, None]),
    "EXTENSION uuid": (extension(pa.uuid(), pa.array([b"a" * 16], pa.binary(16))), [f"61616161{'-6161' * 4}61616161"]),
    "EXTENSION bool8": (extension(pa.bool8(), pa.array([1, 0], pa.int8())), [True, False]),
    "EXTENSION json": (extension(pa.json_(), pa.array(['{"a":1}', None])), [{"a": 1}, None]),
    "EXTENSION json that is none": (extension(pa.json_(), pa.array(["nope"])), ["nope"]),
    "EXTENSION tensor": (
        extension(pa.fixed_shape_tensor(pa.float16(), [2]), pa.array([[np.float16(1)] * 2], pa.list_(pa.float16(), 2))),
        [[1.0, 1.0]],
    ),
}  # fmt: skip
NO_ARRAYS = {"INTERVAL_MONTHS", "INTERVAL_DAY_TIME"}
"""Arrow types without arrays in pyarrow."""


def read(table: pa.Table, **labels: Any) -> list[dict[str, Any]]:
    file = PromptFile(Path("x"), "arrow", "input", "input", **labels)
    return [row for batch in read_tables([table], file) for row in batch.to_pylist()]


def no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def test_every_type_is_covered() -> None:
    known = {"EXTENSION"} | {name.removeprefix("Type_") for name in dir(pa.lib) if name.startswith("Type_")}
    assert known - NO_ARRAYS == {name.split()[0] for name in CASES}


@pytest.mark.parametrize("name", CASES)
def test_beside_a_prompt_it_is_metadata(name: str) -> None:
    values, expected = CASES[name]
    texts = pa.array([f"text {place}" for place in range(len(values))])
    rows = read(pa.table({"text": texts, "beside": values, "n": range(len(values))}))
    assert [row["text"] for row in rows] == texts.to_pylist()
    for place, (row, value) in enumerate(zip(rows, expected, strict=True)):
        found = json.loads(row["metadata"], parse_constant=no_constant)
        assert found == {"beside": value, "n": place}
        assert json.loads(json.dumps(found["beside"])) == value


@pytest.mark.parametrize("name", CASES)
def test_a_slice_of_it_is_the_same(name: str) -> None:
    """Slices of longer arrays, and arrays nested in lists and structs, keep their values."""
    values, expected = CASES[name]
    twice = pa.chunked_array([values, values])
    table = pa.table({"text": pa.array(["t"] * len(twice)), "beside": twice}).slice(len(values) - 1, 2)
    assert [json.loads(row["metadata"])["beside"] for row in read(table)] == (expected * 2)[len(values) - 1 :][:2]
    nested = pa.table({"text": ["t"], "beside": pa.ListArray.from_arrays([0, len(values)], values)})
    assert json.loads(read(nested)[0]["metadata"], parse_constant=no_constant) == {"beside": expected}


TEXTS = {"STRING", "LARGE_STRING", "STRING_VIEW", "BINARY_VIEW", "FIXED_SIZE_BINARY", "DICTIONARY", "RUN_END_ENCODED"}
TEXTS |= {"EXTENSION json that is none"}
NO_UTF8 = {"BINARY"}
AS_BYTES = {"LARGE_BINARY": ["\\"], "EXTENSION json": ['{"a":1}', ""]}
"""Texts that metadata would write differently."""
LISTS_OF_INTEGERS = {"FIXED_SIZE_LIST", "LIST_VIEW", "LARGE_LIST_VIEW"}


@pytest.mark.parametrize("name", CASES)
def test_as_a_text_it_is_read_or_refused(name: str) -> None:
    values, expected = CASES[name]
    table = pa.table({"text": values})
    if name in TEXTS | AS_BYTES.keys():
        assert [row["text"] for row in read(table)] == AS_BYTES.get(name, [value or "" for value in expected])
    elif name in LISTS_OF_INTEGERS:
        assert [(row["form"], row["text"]) for row in read(table)] == [
            ("text", "") if value is None else ("input_ids", json.dumps(value, separators=(",", ":")))
            for value in expected
        ]
    else:
        says = "not UTF-8" if name in NO_UTF8 else "not text"
        with pytest.raises(MoewhError, match=rf"^input: column 'text' holds .*{says}"):
            read(table)


@pytest.mark.parametrize("role", ["messages", "conversations", "input_ids"])
@pytest.mark.parametrize("name", CASES)
def test_as_a_list_it_is_read_or_refused(name: str, role: str) -> None:
    """No list here holds messages; ids are the list as JSON, for the tokenizer to check."""
    values, expected = CASES[name]
    try:
        rows = read(pa.table({role: values}))
    except MoewhError as error:
        assert str(error).startswith("input: ")
        assert "\n" not in str(error)
        assert role != "input_ids" or name not in LISTS_OF_INTEGERS
        return
    for row, value in zip(rows, expected, strict=True):
        if value in (None, []):
            assert row["text"] in ("", "[]")
        else:
            assert role == "input_ids"
            assert (row["form"], json.loads(row["text"])) == ("input_ids", value)


LISTS = [pa.list_, pa.large_list, pa.list_view, pa.large_list_view, lambda item: pa.list_(item, 1)]
MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize(
    "text",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.binary_view(),
        pa.binary(3),
        pa.dictionary(pa.int8(), pa.string()),
        pa.dictionary(pa.int8(), pa.binary()),
    ],
)
@pytest.mark.parametrize("column", ["messages", "conversations", "prompt", "elsewhere"])
def test_messages_of_every_kind_of_list(listed: Any, text: pa.DataType, column: str) -> None:
    dictionary = pa.types.is_dictionary(text)
    content = pa.array(["hé"], text.value_type).dictionary_encode() if dictionary else pa.array(["hé".encode()], text)
    messages = pa.StructArray.from_arrays([pa.array(["user"]), content], ["role", "content"])
    values = pa.array([None], listed(messages.type))
    if pa.types.is_fixed_size_list(values.type):
        values = pa.FixedSizeListArray.from_arrays(messages, 1)
    elif pa.types.is_list_view(values.type) or pa.types.is_large_list_view(values.type):
        values = type(values).from_arrays([0], [1], messages)
    else:
        values = type(values).from_arrays([0, 1], messages)
    (row,) = read(pa.table({column: values}), text_column="elsewhere" if column == "elsewhere" else None)
    assert (row["form"], json.loads(row["text"])) == ("messages", [{"role": "user", "content": "hé"}])


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2)], ids=str)
def test_texts_within_structs_and_labels_may_be_bytes(kind: pa.DataType) -> None:
    """As Parquet files without the annotation of a string have them."""
    text = pa.array([None, "é".encode()], kind)
    beside = pa.array([b"\xff\xfe"] * 2, kind)
    struct = pa.StructArray.from_arrays([text, beside], ["b", "image"])
    labels = {"domain": text, "source": text}
    _, row = read(pa.table({"a": struct, **labels}), text_column="a.b")
    assert (row["text"], row["domain"], row["source"]) == ("é", "é", "é")
    _, row = read(pa.table({"text": ["t", "t"], "a": struct}), domain_column="a.b")
    assert row["domain"] == "é"
    with pytest.raises(MoewhError, match=r"^input: column 'a\.image' holds bytes that are not UTF-8\.$"):
        read(pa.table({"a": struct}), text_column="a.image")
    for label in ("domain", "source"):  # one name for each label: not bytes in one batch and text in another
        with pytest.raises(MoewhError, match=rf"^input: column '{label}' holds bytes that are not UTF-8\.$"):
            read(pa.table({"text": ["t", "t"], label: beside}))
    _, row = read(pa.table({"text": ["t", "t"], "domain": beside}), domain="mine")
    assert row["domain"] == "mine"
    message = pa.struct({"role": pa.string(), "content": kind})
    messages = pa.array([[{"role": "user", "content": b"\xff\xfe"}]], pa.list_(message))
    with pytest.raises(MoewhError, match=r"^input: column 'messages' holds bytes that are not UTF-8\.$"):
        read(pa.table({"messages": messages}))


@pytest.mark.parametrize("listed", LISTS)
@pytest.mark.parametrize("kind", [*INTEGERS.values(), *UNSIGNED.values()], ids=str)
def test_ids_of_every_kind_of_list(listed: Any, kind: pa.DataType) -> None:
    rows = read(pa.table({"input_ids": pa.array([[7], None, [9]], listed(kind))}))
    assert [(row["form"], row["text"]) for row in rows] == [("input_ids", "[7]"), ("text", ""), ("input_ids", "[9]")]


def test_messages_as_maps() -> None:
    kind = pa.list_(pa.map_(pa.string(), pa.string()))
    (row,) = read(pa.table({"messages": pa.array([[[("role", "user"), ("content", "hi")]]], kind)}))
    assert json.loads(row["text"]) == CHAT


def test_finite_numbers_keep_their_digits() -> None:
    """Only rows with values that JSON lacks are rewritten."""
    numbers = [0.1, 1e300, -0.0, 2**-1074, 1 / 3]
    rows = read(pa.table({"text": ["t"] * 5, "x": numbers, "note": ["NaN and Infinity"] * 5}))
    assert [json.loads(row["metadata"])["x"] for row in rows] == numbers
    assert math.copysign(1, json.loads(rows[2]["metadata"])["x"]) == -1
