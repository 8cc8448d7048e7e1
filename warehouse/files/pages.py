"""Parquet page checksums, checked without decoding pages: the CRC-32 that the writer put into each page's header.

DuckDB does not check them. A page is a header in Thrift's compact protocol, followed by its compressed bytes; see
https://parquet.apache.org/docs/file-format/data-pages/checksumming/ and
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow.parquet as pq

_BOOLEANS, _INTEGERS, _BINARY, _STRUCT = (1, 2), (4, 5, 6), 8, 12
"""The kinds of field that occur in page headers. A lead byte of 0 ends a struct."""
_SIZE, _CRC = 3, 4
"""Fields of a page header: compressed size in bytes, and CRC-32 of that many bytes after the header."""


class PageError(Exception):
    """A page that differs from what was written."""


def check_pages(path: Path, metadata: pq.FileMetaData) -> None:
    """Check every page of a Parquet file that has a checksum. Raises PageError with row group and column; OSError."""
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            row_group = metadata.row_group(group)
            for offset in range(row_group.num_columns):
                column = row_group.column(offset)
                if not row_group.num_rows:
                    continue
                first = min(filter(None, (column.dictionary_page_offset, column.data_page_offset)))
                file.seek(first)
                try:
                    check_chunk(file.read(column.total_compressed_size))
                except PageError as error:
                    raise PageError(f"row group {group}, column {column.path_in_schema}: {error}") from None


def check_chunk(chunk: bytes) -> None:
    """Check the pages of one column in one row group. Raises PageError."""
    offset = page = 0
    view = memoryview(chunk)
    while offset < len(chunk):
        try:
            size, crc, start = _header(chunk, offset)
        except IndexError:
            raise PageError(f"page {page} has a header that does not end") from None
        offset = start + size
        if size < 0 or offset > len(chunk):
            raise PageError(f"page {page} has a size that does not fit in the file")
        if crc is not None and zlib.crc32(view[start:offset]) != crc & 0xFFFF_FFFF:
            raise PageError(f"page {page} does not match its checksum")
        page += 1


def _header(data: bytes, offset: int) -> tuple[int, int | None, int]:
    """Return a page's size, its checksum if it has one, and the offset where the header at `offset` ends.

    Parses in one loop without calls, because there are thousands of headers of some twenty fields each. Nested structs
    are walked through. The upper half of a field's lead byte is the step of `field`, the lower half its kind.
    """
    size, crc, field, depth = -1, None, 0, 1
    while depth:
        lead = data[offset]
        offset += 1
        if not lead:
            depth -= 1
            continue
        kind = lead & 15
        if lead < 16:
            number, offset = _varint(data, offset)
            field = _signed(number) if depth == 1 else field
        elif depth == 1:
            field += lead >> 4
        if kind in _INTEGERS:
            start = offset
            while data[offset] & 0x80:
                offset += 1
            offset += 1
            if depth == 1 and field == _SIZE:
                size = _signed(_varint(data, start)[0])
            elif depth == 1 and field == _CRC:
                crc = _signed(_varint(data, start)[0])
        elif kind == _BINARY:
            length, offset = _varint(data, offset)
            offset += length
        elif kind == _STRUCT:
            depth += 1
        elif kind not in _BOOLEANS:
            raise PageError(f"a header has a field of kind {kind}")
    return size, crc, offset


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """Return the unsigned number at `offset`, seven bits per byte, lowest first, and the offset where it ends."""
    number = shift = 0
    while (byte := data[offset]) & 0x80:
        number |= (byte & 0x7F) << shift
        shift += 7
        offset += 1
        if shift > 63:
            raise PageError("a header has a number of more than 64 bits")
    return number | byte << shift, offset + 1


def _signed(number: int) -> int:
    """Undo the zigzag: 0, 1, 2, 3 stand for 0, -1, 1, -2."""
    return number >> 1 ^ -(number & 1)
