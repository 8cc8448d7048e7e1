"""What is in a folder, apart from what other programs leave there, and where a link leads."""

from __future__ import annotations

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

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


def real_path(path: Path) -> Path:
    """Return an absolute path with its links followed; a link that leads back to itself stays in it.

    `Path.resolve` raises RuntimeError for such a link before Python 3.13.
    """
    return Path(os.path.realpath(path))
