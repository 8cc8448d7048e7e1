"""Parquet page checksums, checked without decoding a page: the CRC-32 that the writer put into each page's header.

DuckDB does not look at them. A page is a header in Thrift's compact protocol and then its bytes, compressed; see
https://parquet.apache.org/docs/file-format/data-pages/checksumming/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_STOP, _TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT = range(13)
_SIZE, _CRC = 3, 4
"""Fields of a page header: compressed size in bytes, and CRC-32 of that many bytes after the header."""
_DEEPEST = 8


class PageError(Exception):
    """A page that is not what was written."""


def check_pages(path: Path, metadata: pq.FileMetaData) -> None:
    """Check every page of a Parquet file that has a checksum. Raises PageError naming row group and column; OSError."""
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for place in range(row_group.num_columns):
                column = row_group.column(place)
                if not row_group.num_rows:
                    continue
                first = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
                file.seek(first)
                try:
                    _check_chunk(file.read(column.total_compressed_size))
                except PageError as error:
                    raise PageError(f"row group {group}, column {column.path_in_schema}: {error}") from None


def _check_chunk(chunk: bytes) -> None:
    """Check the pages that one column has in one row group."""
    place = page = 0
    view = memoryview(chunk)
    while place < len(chunk):
        try:
            fields, start = _header(chunk, place)
        except IndexError:
            raise PageError(f"page {page} has a header without an end") from None
        place = start + fields.get(_SIZE, len(chunk))
        if not start <= place <= len(chunk):
            raise PageError(f"page {page} has no place in the file")
        if _CRC in fields and zlib.crc32(view[start:place]) != fields[_CRC] & 0xFFFF_FFFF:
            raise PageError(f"page {page} does not match its checksum")
        page += 1


def _header(data: bytes, place: int) -> tuple[dict[int, int], int]:
    """Return the whole-number fields of the struct at `place`, and where it ends."""
    fields: dict[int, int] = {}
    field = 0
    while (lead := data[place]) != _STOP:
        place += 1
        if lead >> 4:
            field += lead >> 4
        else:
            number, place = _varint(data, place)
            field = _signed(number)
        if lead & 15 in (_I16, _I32, _I64):
            number, place = _varint(data, place)
            fields[field] = _signed(number)
        else:
            place = _skip(data, place, lead & 15, 0)
    return fields, place + 1


def _skip(data: bytes, place: int, kind: int, depth: int) -> int:
    """Return where a value of this kind ends."""
    if depth > _DEEPEST:
        raise PageError("a header is nested too deep")
    if kind in (_TRUE, _FALSE):
        return place
    if kind in (_BYTE, _DOUBLE):
        return place + (1 if kind == _BYTE else 8)
    if kind in (_I16, _I32, _I64):
        return _varint(data, place)[1]
    if kind == _BINARY:
        size, place = _varint(data, place)
        return place + size
    if kind in (_LIST, _SET):
        size, element = data[place] >> 4, data[place] & 15
        place += 1
        if size == 15:
            size, place = _varint(data, place)
        for _ in range(size):
            # A boolean in a list takes a byte, as a field it is in the field's kind.
            place = _skip(data, place, _BYTE if element in (_TRUE, _FALSE) else element, depth + 1)
        return place
    if kind == _STRUCT:
        while (lead := data[place]) != _STOP:
            place = place + 1 if lead >> 4 else _varint(data, place + 1)[1]
            place = _skip(data, place, lead & 15, depth + 1)
        return place + 1
    raise PageError(f"a header has a field of kind {kind}")


def _varint(data: bytes, place: int) -> tuple[int, int]:
    """Return the unsigned number at `place`, seven bits a byte, lowest first, and where it ends."""
    number = shift = 0
    while (byte := data[place]) & 0x80:
        number |= (byte & 0x7F) << shift
        shift += 7
        place += 1
        if shift > 63:
            raise PageError("a header holds a number of more than 64 bits")
    return number | byte << shift, place + 1


def _signed(number: int) -> int:
    """Undo the zigzag: 0, 1, 2, 3 stand for 0, -1, 1, -2."""
    return number >> 1 ^ -(number & 1)
