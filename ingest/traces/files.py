"""The files of an import: names of files and folders in, the paths to read out, each once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moewh.warehouse.errors import MoewhError, UsageError

_PACKED = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0"}
"""What packed files begin with."""


def trace_paths(names: Sequence[str]) -> list[Path]:
    """Return the files that are named, those of a folder in order of their names.

    Raises UsageError or MoewhError for what is not a file, is packed, or is named twice.
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
        _require_unpacked(path)
        status = path.stat()
        if (first := found.setdefault((status.st_dev, status.st_ino), path)) is not path:
            raise UsageError(f"{path} is given twice{'' if first == path else f', also as {first}'}. Name it once.")
    return paths


def _inside(folder: Path) -> list[Path]:
    """Return the files of a folder. Raises UsageError for one that has folders: they would be left out unsaid."""
    entries = sorted(entry for entry in folder.iterdir() if entry.name[0] != ".")
    if inner := next((entry for entry in entries if entry.is_dir()), None):
        raise UsageError(f"{folder} holds the folder {inner.name}. Name each folder of the trace.")
    return [entry for entry in entries if entry.is_file()]


def _require_unpacked(path: Path) -> None:
    """Raise MoewhError for a file that a packer wrote: no format is packed as a whole."""
    try:
        with path.open("rb") as stream:
            begin = stream.read(6)
    except OSError as error:
        raise MoewhError(f"{path}: cannot be read: {error.strerror or error}.") from error
    if packer := next((name for name, magic in _PACKED.items() if begin.startswith(magic)), None):
        raise MoewhError(f"{path}: is packed by {packer}. Unpack it first.")
