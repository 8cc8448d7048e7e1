"""The files of an import: names of files and folders in, the paths to read out, each once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moewh.ingest.prompts.plain_bytes import compression
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.folders import own_entries


def trace_paths(names: Sequence[str]) -> list[Path]:
    """Return the given files, and those in a folder in the order of their names.

    Raises UsageError or MoewhError for a path that is not a file, is compressed, or is given twice.
    """
    paths: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            paths += _inside(path)
        elif path.is_file():
            paths.append(path)
        elif name == "-" or path.exists():
            raise UsageError(f"{name} is not a file, and a trace is read more than once. Save it to a file.")
        else:
            raise UsageError(f"there is no file {name}. Check the path.")
    if not paths:
        raise UsageError(f"{names[0]} holds no files.")
    found: dict[tuple[int, int], Path] = {}
    for path in paths:
        if path.name != path.name.encode(errors="replace").decode():
            raise UsageError(f"{path} has a name that is not UTF-8, and prompts are named after their file. Rename it.")
        _require_uncompressed(path)
        status = path.stat()
        if (first := found.setdefault((status.st_dev, status.st_ino), path)) is not path:
            raise UsageError(f"{path} is given twice{'' if first == path else f', also as {first}'}. Name it once.")
    return paths


def _inside(folder: Path) -> list[Path]:
    """Return the files of a folder. Raises UsageError for one that holds folders, which would be left out."""
    entries = own_entries(folder)
    if inner := next((entry for entry in entries if entry.is_dir()), None):
        raise UsageError(f"{folder} holds the folder {inner.name}. Name each folder of the trace.")
    return [entry for entry in entries if entry.is_file()]


def _require_uncompressed(path: Path) -> None:
    """Raise MoewhError for a compressed file: no trace format is compressed as a whole."""
    try:
        codec = compression(path)
    except OSError as error:
        raise MoewhError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if codec is not None:
        raise MoewhError(f"{path}: is compressed ({codec}). Decompress it first.")
