"""Plain bytes for the readers: decompressed, and UTF-8 without a byte order mark."""

from __future__ import annotations

import codecs
import lzma
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from moewh.warehouse.errors import MoewhError

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
"""Suffixes of compressed files. Detection goes by a file's first bytes, not by its name."""
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
_BZ2_BLOCKS = (b"1AY&SY", b"\x17\x72\x45\x38\x50\x90")
_WIDE = {codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16"} | {
    codecs.BOM_UTF16_BE: "utf-16"
}
_LFS = b"version https://git-lfs"
_BINARY = {
    b"PK\x03\x04": "a zip archive or an Excel file",
    b"\xd0\xcf\x11\xe0": "an Excel file",
    b"%PDF-": "a PDF",
    b"PAR1\x15": "Parquet",
    b"ARROW1\0": "Arrow",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3\0": "an SQLite database",
}
"""First bytes of files that are not text, whatever their names."""
_CHUNK = 1 << 20
_LONG_WINDOW = "too much memory for decoding"
"""Part of zstd's message for a frame whose window is over 128 MiB, as `zstd --long=31` writes."""


def plain_file(path: Path, target: Path, error: Callable[[str], MoewhError], *, text: bool) -> Path:
    """Return a path to a file's plain bytes: the file itself, or `target` if they had to be written there.

    For data that cannot be decompressed or decoded, raises the exception that `error` makes from a sentence.
    """
    codec = compression(path)
    if codec is not None:
        with target.open("wb") as out, _decompressed(path, codec) as data:
            for chunk in _chunks(data, codec, error):
                out.write(chunk)
        path = target
    _require_data(path, error, text=text)
    return _as_utf8(path, target.with_suffix(".utf8"), error) if text else path


def _require_data(path: Path, error: Callable[[str], MoewhError], *, text: bool) -> None:
    """Raise for a file that only points to data, and for one that should be text and is of a binary format."""
    with path.open("rb") as file:
        begin = file.read(len(_LFS))
    if begin == _LFS:
        raise error("is a pointer of Git LFS, not the data itself. Fetch it with `git lfs pull`.")
    kind = next((kind for magic, kind in _BINARY.items() if begin.startswith(magic)), None)
    if text and kind is not None:
        raise error(f"is {kind}, not text. Save it as text, or name its format with --prompts-format.")


def compression(path: Path) -> str | None:
    """Return how a file is compressed, from its first bytes: gzip, zstd, bz2, xz or None. Raises OSError."""
    with path.open("rb") as file:
        begin = file.read(16)
    codec = next((name for magic, name in _MAGIC.items() if begin.startswith(magic)), None)
    return None if codec == "bz2" and not begin[4:].startswith(_BZ2_BLOCKS) else codec


@contextmanager
def _decompressed(path: Path, codec: str) -> Iterator[Any]:
    if codec == "xz":
        with lzma.open(path) as data:
            yield data
    else:
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, codec) as data:
            yield data


def _chunks(data: Any, codec: str, error: Callable[[str], MoewhError]) -> Iterator[bytes]:
    while True:
        try:
            chunk = data.read(_CHUNK)
        except (OSError, EOFError, lzma.LZMAError) as problem:
            if _LONG_WINDOW in str(problem):
                raise error("was compressed with a long window. Unpack it first: `zstd -d --long=31`.") from None
            raise error(f"is damaged or cut off: {problem} ({codec}). Get the file again.") from None
        if not chunk:
            return
        yield chunk


def _as_utf8(path: Path, target: Path, error: Callable[[str], MoewhError]) -> Path:
    """Return a path to the text in UTF-8 without a byte order mark."""
    with path.open("rb") as file:
        begin = file.read(16)
    wide = next((encoding for mark, encoding in _WIDE.items() if begin.startswith(mark)), None)
    if wide is not None:
        try:
            with path.open(encoding=wide, newline="") as text, target.open("w", encoding="utf-8", newline="") as out:
                shutil.copyfileobj(text, out, _CHUNK)
        except UnicodeError as problem:
            raise error(f"is not valid {wide.upper()}: {problem}.") from None
        return target
    if len(begin) >= 8 and (_is_wide(begin[1::2], begin[::2]) or _is_wide(begin[::2], begin[1::2])):
        raise error("is UTF-16 without a byte order mark. Convert it to UTF-8.")
    if not begin.startswith(codecs.BOM_UTF8):
        return path
    with path.open("rb") as file, target.open("wb") as out:
        file.seek(len(codecs.BOM_UTF8))
        shutil.copyfileobj(file, out, _CHUNK)
    return target


def _is_wide(zeros: bytes, others: bytes) -> bool:
    return not any(zeros) and all(others)


def bad_utf8(path: Path) -> str | None:
    """Describe the first line that is not UTF-8; None if there is none."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"line {number} is not UTF-8 (byte {error.start + 1} of the line). Convert the file to UTF-8."
    return None
