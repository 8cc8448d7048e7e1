"""A model's files: a local folder, or a hub repository at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from moewh.warehouse.files.folders import own_entries

_LFS = b"version https://git-lfs.github.com/spec/"
FETCH_LFS = "Git LFS has not fetched {names}. Run `git lfs pull` in that folder."


@dataclass(frozen=True)
class Repository:
    """Where a model's files are: the name and revision for transformers."""

    location: str
    revision: str | None
    """For a hub id, the commit where it is known; None for a folder."""

    def optional_file(self, name: str) -> Path | None:
        """Return a file's path, downloaded if needed; None if there is none. Raises OSError if it is unreachable."""
        path = cached_file(
            self.location,
            name,
            revision=self.revision,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not is_offline_mode(),
        )
        return Path(path) if path else None


def looks_like_path(name: str) -> bool:
    """Return whether a name is a path rather than a hub id, whether or not it exists."""
    return "://" not in name and (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name)


def broken_links(folder: Path, pattern: str) -> list[str]:
    """Return the names of a folder's links to files that do not exist, such as a copy of the hub's cache holds."""
    return [path.name for path in own_entries(folder, pattern) if path.is_symlink() and not path.exists()]


def not_fetched(folder: Path) -> str | None:
    """Return a line that names a folder's files that Git LFS has not fetched, which hold short texts; None without."""
    names = [path.name for path in own_entries(folder) if is_lfs_pointer(path)]
    return FETCH_LFS.format(names=", ".join(names[:3]) + (", …" if len(names) > 3 else "")) if names else None


def is_lfs_pointer(path: Path) -> bool:
    """Return whether Git LFS has not fetched this file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def hub_commit(location: str, revision: str) -> str | None:
    """Return the commit of a hub id's revision, read from its files' path in the hub's cache.

    For an adapter without a config.json, the path is that of its settings. Raises OSError if there is no such file.
    """
    path = Repository(location, revision).optional_file(CONFIG_NAME)
    if path is None:
        path = Repository(location, revision).optional_file(ADAPTER_CONFIG_NAME)
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix()) if path else None
    return found[1] if found else None
