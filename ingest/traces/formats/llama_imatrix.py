"""llama.cpp's importance matrix as GGUF (`llama-imatrix`): only counts.

For each layer's stacked experts, `blk.N.ffn_gate_exps.weight.counts` [E] counts how often each was selected. Only one
of a layer's expert tensors is read, because all see the same tokens. The older `.dat` has no counts per expert. GGUF: a
header, key-value pairs, the tensors' names and shapes, then their data (docs/gguf.md of ggml-org/ggml).
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from typing import IO, Any

import numpy as np

from moewh.ingest.traces.trace import Array, Counts, Format, TraceFile, TraceModel

_NAME = re.compile(r"blk\.(\d{1,5})\.ffn_(gate|gate_up|up|down)_exps\.weight\.counts")
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY, _F32 = 8, 9, 0
_MOST_NAMES = 1 << 20
"""Most pairs, tensors or array entries in a file."""
_MOST_BYTES = 1 << 20
"""Most bytes of one text."""


class _Reader:
    """Reads a GGUF's header from its beginning. Raises the file's error for missing data."""

    def __init__(self, stream: IO[bytes], file: TraceFile) -> None:
        self._stream, self._file = stream, file
        if self._take(4) != b"GGUF":
            raise file.error("is not a GGUF file. The older .dat has no counts per expert: write the matrix as GGUF.")
        if (version := self._number("I")) not in (2, 3):
            raise file.error(f"is GGUF of version {version}, and moewh reads 2 and 3.")
        self.tensors, self.pairs = (self._count() for _ in range(2))

    def metadata(self) -> dict[str, Any]:
        """Return the key-value pairs, without arrays."""
        return {self._text(): self._value(self._number("I")) for _ in range(self.pairs)}

    def infos(self) -> dict[str, tuple[tuple[int, ...], int, int]]:
        """Return each tensor's (shape, type, offset in the data) by name."""
        found = {}
        for _ in range(self.tensors):
            name = self._text()
            dimensions = self._number("I")
            if dimensions > 4:
                raise self._file.error(f"says that {name[:80]} has {dimensions} dimensions.")
            shape = tuple(self._number("Q") for _ in range(dimensions))
            found[name] = (shape, self._number("I"), self._number("Q"))
        return found

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._text()
        if kind == _ARRAY:
            inner, entries = self._number("I"), self._count()
            if inner == _ARRAY:
                raise self._file.error("holds arrays of arrays.")
            for _ in range(entries):
                self._value(inner)
            return None
        raise self._file.error(f"has a value of type {kind}, which GGUF does not know.")

    def _count(self) -> int:
        count = int(self._number("Q"))
        if count > _MOST_NAMES:
            raise self._file.error(f"says that it holds {count:,} entries. It is damaged.")
        return count

    def _text(self) -> str:
        if (length := self._number("Q")) > _MOST_BYTES:
            raise self._file.error(f"says that it holds a text of {length:,} bytes. It is damaged.")
        return self._take(length).decode(errors="replace")

    def _number(self, form: str) -> Any:
        return struct.unpack("<" + form, self._take(struct.calcsize("<" + form)))[0]

    def _take(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) != size:
            raise self._file.error("ends within its header. It is cut off.")
        return data


def _read(files: list[TraceFile], model: TraceModel) -> Iterator[Counts]:
    for file in files:
        try:
            with file.path.open("rb") as stream:
                yield _counts(stream, file, model)
        except OSError as error:
            raise file.error(f"cannot be read: {error.strerror or error}.") from error


def _counts(stream: IO[bytes], file: TraceFile, model: TraceModel) -> Counts:
    reader = _Reader(stream, file)
    metadata = reader.metadata()
    infos = reader.infos()
    if metadata.get("general.type") != "imatrix":
        raise file.error(f"is GGUF of type {metadata.get('general.type')!r}, not of an imatrix.")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise file.error(f"has the alignment {alignment!r}.")
    data = math.ceil(stream.tell() / alignment) * alignment
    by_layer: dict[int, str] = {}
    for name in sorted(infos):
        if found := _NAME.fullmatch(name):
            by_layer.setdefault(int(found[1]), name)
    layers = model.numbered(by_layer, file.name)
    if layers != list(model.layers):
        raise file.error(f"has experts in the layers {layers}, {model.name} in {list(model.layers)}. Check --model.")
    counts_LE = np.zeros((model.num_hidden_layers, int(model.experts_L.max())))
    for layer in layers:
        name = by_layer[layer]
        shape, kind, offset = infos[name]
        if kind != _F32 or math.prod(shape) != counts_LE.shape[1]:
            raise file.error(
                f"{name} has shape {list(shape)} and type {kind}, not float32 counts of {counts_LE.shape[1]} experts."
            )
        stream.seek(data + offset)
        counts_LE[layer] = _tensor(stream, counts_LE.shape[1], name, file)
    chunks = metadata.get("imatrix.chunk_count")
    return Counts(file.name, counts_LE, file.path.name, {"chunks": chunks} if type(chunks) is int else None)


def _tensor(stream: IO[bytes], experts: int, name: str, file: TraceFile) -> Array:
    content = stream.read(4 * experts)
    if len(content) != 4 * experts:
        raise file.error(f"ends within {name}. It is cut off.")
    counts_E = np.frombuffer(content, "<f4")
    if not np.isfinite(counts_E).all() or (counts_E < 0).any() or (counts_E != np.floor(counts_E)).any():
        raise file.error(f"{name} holds other numbers than counts.")
    return counts_E


FORMAT = Format(read_counts=_read)
