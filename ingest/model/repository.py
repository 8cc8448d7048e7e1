"""A model's files: a local folder, or a hub repository at one commit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode
from transformers.utils import CONFIG_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME


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
    return name.startswith((".", "/", "~"))


def hub_commit(location: str, revision: str) -> str | None:
    """Return the commit of a hub id's revision, read from its files' path in the hub's cache.

    For an adapter without a config.json, the path is that of its settings. Raises OSError if there is no such file.
    """
    path = Repository(location, revision).optional_file(CONFIG_NAME)
    if path is None:
        path = Repository(location, revision).optional_file(ADAPTER_CONFIG_NAME)
    found = re.search(r"/snapshots/([0-9a-f]{40})/", path.as_posix()) if path else None
    return found[1] if found else None
