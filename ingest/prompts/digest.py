"""The digest of a stream of prompts, which identifies the prompts without storing them."""

from __future__ import annotations

import hashlib

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moewh.ingest.prompts.canonical import CANONICAL


class PromptDigest:
    """sha256 over a stream of prompts; equal streams have equal digests however they are batched.

    Each canonical column is hashed as its lengths in bytes (-1 for NULL) and its bytes.
    """

    def __init__(self) -> None:
        self._hashes = [(hashlib.sha256(), hashlib.sha256()) for _ in CANONICAL]

    def update(self, batch: pa.RecordBatch) -> None:
        """Add a batch of canonical rows."""
        for (lengths, content), name in zip(self._hashes, CANONICAL.names, strict=True):
            column = batch.column(name)
            sizes = pc.fill_null(pc.binary_length(column), -1).to_numpy(zero_copy_only=False)
            lengths.update(sizes.astype("<i8").tobytes())
            content.update(_content(column))

    def hexdigest(self) -> str:
        """Return the digest of everything added so far."""
        whole = hashlib.sha256()
        for lengths, content in self._hashes:
            whole.update(lengths.digest() + content.digest())
        return whole.hexdigest()


def _content(column: pa.StringArray) -> memoryview | bytes:
    """Return the concatenated bytes of all strings of an array; NULL has none."""
    filled = pc.fill_null(column, "")
    _, offsets, data = filled.buffers()
    if data is None:
        return b""
    ends = np.frombuffer(offsets, np.int32)[filled.offset : filled.offset + len(filled) + 1]
    return memoryview(data)[int(ends[0]) : int(ends[-1])]
