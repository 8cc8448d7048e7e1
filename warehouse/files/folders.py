"""What is in a folder, apart from what other programs leave there, and where a link leads."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from moewh.warehouse.errors import UsageError

_LEFT_BY_OTHERS = re.compile(r"\..*|desktop\.ini|thumbs\.db|icon\r", re.IGNORECASE | re.DOTALL)


def is_left_by_others(name: str) -> bool:
    """Return whether file managers, network disks and sync programs give such names to files in anyone's folders.

    These are hidden files (`.DS_Store`, `._model.safetensors`, `.nfs…`), two of Windows and one of macOS.
    """
    return _LEFT_BY_OTHERS.fullmatch(name) is not None


def own_entries(folder: Path, pattern: str = "*") -> list[Path]:
    """Return what matches in a folder, sorted, without what others left; an empty list if it is not a folder.

    Raises OSError if the folder cannot be read.
    """
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if fnmatchcase(path.name, pattern) and not is_left_by_others(path.name)
    )


def files_below(folder: Path) -> list[Path]:
    """Return all files below a folder, in order, without hidden ones. Links are followed.

    Raises OSError for a folder that cannot be read, and UsageError for a link to a folder that it is in.
    """

    def fail(error: OSError) -> None:
        raise error

    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not is_left_by_others(name)]
        for link in (Path(place, name) for name in folders if Path(place, name).is_symlink()):
            if (target := real_path(link)) in map(real_path, link.absolute().parents):
                raise UsageError(f"{link} is a link to {target}, which it is in. Remove the link.")
        found += [Path(place, name) for name in files if not is_left_by_others(name)]
    return sorted(found)


def real_path(path: Path) -> Path:
    """Return an absolute path with its links followed; a link that leads back to itself stays in it.

    `Path.resolve` raises RuntimeError for such a link before Python 3.13.
    """
    return Path(os.path.realpath(path))
