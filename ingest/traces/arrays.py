"""Read arrays from untrusted files: `.npy`, `.npz`, base64, and `torch.save` with weights only.

No reader unpickles code, and none makes an array before its header has been checked against the bytes present and
against the most numbers a sequence may have: a header can promise anything, and a compressed file can hold it.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from moewh.ingest.traces.trace import Array, TraceFile
from moewh.warehouse.errors import MoewhError, first_line, short_message

IN_PIECES: dict[str, Any] = {"pre_buffer": False, "buffer_size": 1 << 20}
"""How Parquet is opened, so that memory holds no whole row group: a file may be one."""
_HEADER = 10_000
"""Most bytes of a `.npy` header, as in numpy itself."""


def decode_base64(text: object, where: str) -> bytes:
    """Return the bytes of a base64 string. Raises MoewhError for anything else, such as one that was cut off."""
    if not isinstance(text, str):
        raise MoewhError(f"{where}: its routed experts are not base64 text.")
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise MoewhError(f"{where}: its routed experts are not complete base64 text. The file is damaged.") from None


def decode_npy(text: object, where: str, most_values: int) -> Array:
    """Return the routing [R, L, K] of a `.npy` file in base64."""
    data = decode_base64(text, where)
    return as_array(_read_npy(io.BytesIO(data), len(data), where, most_values), where, most_values, 3)


def raw_array(data: bytes, dtype: str, shape: tuple[int, ...], where: str) -> Array:
    """Return bytes as an array of a dtype and shape. Raises MoewhError if their number differs."""
    kind = np.dtype(dtype).newbyteorder("<")
    if min(shape, default=0) < 0 or len(data) != math.prod(shape) * kind.itemsize:
        raise MoewhError(f"{where}: has {len(data):,} bytes for {kind.name} numbers of shape {shape}.")
    return np.frombuffer(data, kind).reshape(shape)


class NpzArrays:
    """The arrays of an `.npz` file by name, each read on access: together they may exceed memory."""

    def __init__(self, archive: zipfile.ZipFile, file: TraceFile) -> None:
        self._archive, self._file = archive, file
        names = [entry.filename.removesuffix(".npy") for entry in archive.infolist()]
        require_distinct(names, "array", file)
        self._entries = dict(zip(names, archive.infolist(), strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __getitem__(self, name: str) -> Array:
        entry, file = self._entries[name], self._file
        with self._archive.open(entry) as stream:
            return _read_npy(stream, entry.file_size, f"{file.name}, {name}", file.most_values)


@contextmanager
def open_npz(file: TraceFile) -> Iterator[NpzArrays]:
    """Yield the arrays of an `.npz` file. Raises the file's error, also within the block, for what is none."""
    try:
        with zipfile.ZipFile(file.path) as archive:
            yield NpzArrays(archive, file)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, OSError) as error:
        raise file.error(f"cannot be read as .npz: {error}.") from error


def _read_npy(stream: IO[bytes], size: int, where: str, most_values: int) -> Array:
    """Read one `.npy` of `size` bytes. Raises MoewhError for one that is truncated, too large, or holds objects."""
    try:
        version = np.lib.format.read_magic(stream)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(stream, max_header_size=_HEADER)
    except ValueError as error:
        raise MoewhError(f"{where}: is not a .npy array: {short_message(error)}.") from None
    values = math.prod(shape)
    if dtype.hasobject or dtype.kind not in "iufU":
        raise MoewhError(f"{where}: holds {dtype}, not numbers.")
    _require_room(values, where, most_values)
    needed = values * dtype.itemsize
    data = stream.read(needed + 1) if needed <= size else b""
    if len(data) != needed:
        raise MoewhError(f"{where}: promises numbers of shape {shape} that are not there. The file is cut or damaged.")
    array = np.frombuffer(data, dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def load_torch(file: TraceFile) -> Any:
    """Return what `torch.save` wrote: tensors, numpy arrays and plain values, but never code.

    Tensors are memory-mapped, so memory holds only the parts being read, however large the file is.

    Raises the file's error for any other file, a truncated one, and one that refers to code.
    """
    import torch

    if not file.path.is_file():
        raise file.error("there is no such file. Check the path.")
    try:
        with zipfile.ZipFile(file.path) as archive:
            # torch stores its records uncompressed; compressed ones could expand to any size
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise file.error("holds compressed records, which torch.save does not write.")
            if not any(entry.filename.endswith("/data.pkl") for entry in archive.infolist()):
                raise file.error("is a zip file, but not one of torch.save. Check FORMAT.")
    except (zipfile.BadZipFile, OSError):
        raise file.error(
            "is not a complete file of torch.save in its zip format. Save it again with torch.save."
        ) from None
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(file.path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle may fail in any way
        named = re.search(r"(?:GLOBAL |got <class ')([\w.]+)", str(error))
        reason = first_line(error)[:200].rstrip(". ") if named is None else f"it names {named[1]}, which would be run"
        raise file.error(f"cannot be read with weights alone: {reason}.") from None


def _numpy_globals() -> list[Any]:
    """What numpy's arrays and numbers are made of in a pickle, `bytes` for one without numbers: no code to run."""
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [
        type(np.dtype(name))
        for name in ("b1", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", "S1", "U1")
    ]
    legacy = [(one, f"numpy.core.multiarray.{one.__name__}") for one in (reconstruct, scalar)]
    return [reconstruct, scalar, *legacy, np.ndarray, np.dtype, bytes, *kinds]


def as_array(value: Any, where: str, most_values: int, dimensions: int) -> Array:
    """Return a tensor, an array or nested lists of so many dimensions as an array.

    Raises MoewhError for anything else, and for more numbers than `most_values`.
    """
    array = _array(value, where, most_values)
    if array.ndim != dimensions:
        raise MoewhError(f"{where}: has numbers of shape {list(array.shape)}, not of {dimensions} dimensions.")
    return array


def _array(value: Any, where: str, most_values: int) -> Array:
    if hasattr(value, "detach"):
        _require_room(value.numel(), where, most_values)  # before copying: a small tensor may expand to a large one
        try:
            value = value.detach().float().numpy() if value.is_floating_point() else value.detach().numpy()
        except (TypeError, RuntimeError) as error:
            raise MoewhError(
                f"{where}: is a tensor that does not hold plain numbers: {short_message(error)}."
            ) from None
    if isinstance(value, np.ndarray):
        _require_room(value.size, where, most_values)
        return value
    if not isinstance(value, list):
        raise MoewhError(f"{where}: is {type(value).__name__}, not a list of numbers.")
    try:
        return np.array(value)
    except (ValueError, OverflowError):
        raise MoewhError(f"{where}: its lists are not of one length.") from None


def _require_room(numbers: int, where: str, most_values: int) -> None:
    """Raise MoewhError for more numbers than a segment takes."""
    if numbers > most_values:
        raise MoewhError(
            f"{where}: has {numbers:,} numbers, and a segment takes {most_values:,}. Raise --segment-rows."
        )


def require_distinct(names: Sequence[str], what: str, file: TraceFile) -> None:
    """Raise the file's error for a name that it has twice, of which one would be left out."""
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise file.error(f"has the {what} {twice[0]} twice. It is damaged.")


def sibling(file: TraceFile, name: str) -> Path:
    """Return the path of another file in the same folder. Raises the file's error if it does not exist."""
    path = file.path.parent / name
    if not path.is_file():
        raise file.error(f"needs {name} beside it.")
    return path
