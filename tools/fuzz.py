"""Coverage-guided fuzzing of the readers of foreign bytes: `python -m tools.fuzz TARGET SECONDS`.

Targets: `prompts` (a prompts file of any format), `manifests` and `pages` (Parquet page headers). Any bytes must be
read or refused with the one error that the reader promises; anything else ends the run with a nonzero exit code. Needs
atheris, from the extra `soak`. Prints libFuzzer's lines on stderr.
"""

from __future__ import annotations

import io
import json
import json.decoder
import json.scanner
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris
import duckdb

from moewh.warehouse.errors import MoewhError

with atheris.instrument_imports(
    include=[
        "moewh.ingest.prompts.readers",
        "moewh.ingest.prompts.formats",
        "moewh.ingest.prompts.canonical",
        "moewh.ingest.prompts.json_records",
        "moewh.ingest.prompts.tables",
        "moewh.ingest.prompts.plain_bytes",
        "moewh.ingest.prompts.records",
        "moewh.ingest.prompts.arrow_columns",
        "moewh.warehouse.files.manifest",
        "moewh.warehouse.files.pages",
    ]
):
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moewh.ingest.prompts.canonical import CANONICAL, PromptFile
    from moewh.ingest.prompts.readers import read_prompts
    from moewh.warehouse.files import manifest, pages, schema

FORMATS = ("jsonl", "csv", "txt", "parquet", "json", "tsv", "arrow")
WORDS = (
    *(
        f'"format": {schema.FORMAT_VERSION}',
        f'"schema": {schema.SCHEMA_VERSION}',
        '"identity": ',
        '"segment": ',
        '"files": {',
        '"rows": ',
        '"bytes": ',
        '"sha256": "',
    ),
    *(
        '"text": "',
        '"domain"',
        '"source"',
        '"messages": [',
        '"input_ids": [',
        '"role"',
        '"content"',
        "\\ud83d",
        "\\ud800",
    ),
    *("null", "true", "NaN", "1e999", "-0", '""', "\r\n", ".parquet", "PAR1", "\ufeff"),
)
"""Fragments that the fuzzer combines into inputs."""
_FOLDER = Path(tempfile.mkdtemp(prefix="moewh-fuzz-"))


def prompts(data: bytes) -> None:
    """Read a prompts file: the first byte selects the format, the rest is the file."""
    if not data:
        return
    form = FORMATS[data[0] % len(FORMATS)]
    path = _FOLDER / f"input.{form}"
    path.write_bytes(data[1:])
    file = PromptFile(path, form, "input", "input")
    try:
        batches = list(read_prompts(file))
    except MoewhError as error:
        if not str(error).startswith("input: "):
            raise AssertionError("the error does not name the file") from error
        return
    for batch in batches:
        batch.validate(full=True)
        assert batch.schema.equals(CANONICAL)
        assert batch.column("text").null_count == 0


def manifests(data: bytes) -> None:
    """Read a manifest: an accepted one must equal what moewh would write, byte for byte."""
    try:
        read = manifest.parse_manifest(data)
    except manifest.ManifestError:
        return
    assert manifest.manifest_text(read) == data


def page_headers(data: bytes) -> None:
    """Iterate over the pages of a column."""
    try:
        pages.check_chunk(data)
    except pages.PageError:
        return


def prompt_seeds() -> list[bytes]:
    """Return a small file of each format, with every kind of column."""
    rows = [
        {"text": 'a "quoted", text', "domain": "d", "source": "s", "n": 1},
        {"text": "é\n\u2028", "domain": None, "source": None, "n": None},
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    chat = json.dumps({"messages": [{"role": "user", "content": "hi"}], "x": {"y": [1, None]}})
    parquet = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), parquet, compression="none")
    files = {
        "jsonl": [lines.encode(), f'{chat}\n{{"input_ids": [1, 2]}}\n'.encode(), b'{"text": "\\ud83d\\ude00"}'],
        "csv": [b'text,domain,n\n"a, ""b""\nc",d,1\ne,,\n', b"\xef\xbb\xbftext\r\na\r\n"],
        "txt": ["one\r\ntwo \u2028\n\n".encode()],
        "parquet": [parquet.getvalue()],
    }
    return [bytes([FORMATS.index(form)]) + content for form, contents in files.items() for content in contents]


def manifest_seeds() -> list[bytes]:
    """Return a run's manifest and a segment's."""
    entry = manifest.Entry(rows=3, bytes=120, sha256="0" * 64)
    written = [
        manifest.Manifest("a" * 64, 7, {"tokens.parquet": entry, "routing.parquet": entry}),
        manifest.Manifest(None, None, {}),
    ]
    return [manifest.manifest_text(one) for one in written]


def page_seeds() -> list[bytes]:
    """Return the pages of two columns."""
    path = _FOLDER / "pages.parquet"
    pq.write_table(pa.table({"x": [1, 2, 3], "y": ["a", "b", "a"]}), path, write_page_checksum=True)
    row_group = pq.read_metadata(path).row_group(0)
    data, seeds = path.read_bytes(), []
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        first = column.dictionary_page_offset or column.data_page_offset
        seeds.append(data[first : first + column.total_compressed_size])
    return seeds


TARGETS: dict[str, tuple[Callable[[bytes], None], Callable[[], list[bytes]]]] = {
    "prompts": (prompts, prompt_seeds),
    "manifests": (manifests, manifest_seeds),
    "pages": (page_headers, page_seeds),
}


def use_python_json() -> None:
    """Make Python's json use its Python code, which the fuzzer can instrument, instead of its C code."""
    scanner: Any = json.scanner
    decoder: Any = json.decoder
    whole: Any = json
    for function in (scanner.py_make_scanner, decoder.JSONObject, decoder.JSONArray):
        atheris.instrument_func(function)
    scanner.make_scanner = scanner.py_make_scanner
    whole._default_decoder = json.JSONDecoder()


def speed_up_readers() -> None:
    """Share one DuckDB between inputs and shrink the buffers for long lines: six times as many inputs per second."""
    database: Any = duckdb.connect(config={"threads": 1})
    faster = {"database": database.cursor, "LONGEST_LINE": 1 << 20}
    for module in [module for name, module in sys.modules.items() if name.startswith("moewh.ingest.prompts.")]:
        for name in faster.keys() & vars(module).keys():
            setattr(module, name, faster[name])


def main() -> None:
    """Fuzz one target for the given seconds, starting from its seeds; libFuzzer ends the process."""
    name, seconds = sys.argv[1:]
    use_python_json()
    speed_up_readers()
    target, seeds = TARGETS[name]
    corpus = _FOLDER / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(seeds()):
        target(seed)
        (corpus / str(number)).write_bytes(seed)
    spelled = ["".join(f"\\x{byte:02x}" for byte in word.encode()) for word in WORDS]
    (_FOLDER / "words").write_text("".join(f'"{word}"\n' for word in spelled))
    os.chdir(_FOLDER)  # a crash's input is written here
    limits = [f"-max_total_time={seconds}", "-timeout=30", "-rss_limit_mb=6000", "-max_len=4096", "-dict=words"]
    atheris.Setup(["moewh-fuzz", *limits, "-print_final_stats=1", str(corpus)], target)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
