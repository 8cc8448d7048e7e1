"""The Hub as a target: pieces are sent in commits, and the last commit makes them visible to readers.

The Hub stores large files by their sha256, so a commit that is tried again sends only what did not arrive.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from hashlib import sha1
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.publish.pieces import Piece
from moewh.publish.target import require_ours, writing
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.listing import PUBLISHED_MARK, Listed
from moewh.warehouse.remote.place import Remote

if TYPE_CHECKING:
    from collections.abc import Sequence

    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

_FILES = 100
"""Most files per commit."""


@dataclass(frozen=True)
class HubTarget:
    """A data set on the Hub."""

    place: Remote

    @property
    def repo(self) -> str:
        """ORG/NAME."""
        return self.place.root.removeprefix("hf://datasets/")

    def require_data_set(self) -> None:
        """Raise UsageError for a URL with more than a data set."""
        if self.repo.count("/") != 1 or "@" in self.repo:
            raise UsageError(f"{self.place.root} is more than a data set. Publish to hf://datasets/ORG/NAME.")

    def missing(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces that are not there with the same content, by the hashes that the Hub lists."""
        there = self._there()
        require_ours({path.split("/")[0] for path in there}, self.place.root)
        found = []
        for piece in pieces:
            files = {
                name: listed
                for name, listed in piece.files.items()
                if not _same(piece, name, listed, there.get(f"{piece.path}/{name}"))
            }
            if files or _extra_files(piece, there):
                found.append(replace(piece, files=files))
        return found

    def send(self, pieces: list[Piece]) -> None:
        """Commit the files of pieces, and delete other files in their folders."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self._there() if pieces else {}
        operations: list[CommitOperationAdd | CommitOperationDelete] = []
        for piece in pieces:
            operations += [CommitOperationDelete(path) for path in _extra_files(piece, there)]
            operations += [CommitOperationAdd(f"{piece.path}/{name}", _given(piece.data(name))) for name in piece.files]
        for start in range(0, len(operations), _FILES):
            self._commit(operations[start : start + _FILES], "Send files of runs")

    def finish(self, files: dict[str, bytes]) -> None:
        """Commit files at the root, all in one commit."""
        from huggingface_hub import CommitOperationAdd

        self._commit([CommitOperationAdd(name, data) for name, data in files.items()], "Show the runs that were sent")

    def paths(self) -> set[str]:
        """Return the path of every file."""
        return set(self._there())

    def remove(self, paths: list[str]) -> None:
        """Commit the removal of files. The history keeps them."""
        from huggingface_hub import CommitOperationDelete

        for start in range(0, len(paths), _FILES):
            self._commit([CommitOperationDelete(path) for path in paths[start : start + _FILES]], "Remove old files")

    @property
    def _api(self) -> HfApi:
        from huggingface_hub import HfApi
        from huggingface_hub.utils import disable_progress_bars  # type: ignore[attr-defined] # exported, but unmarked

        if not sys.stderr.isatty():
            disable_progress_bars()
        return HfApi(library_name="moewh")

    def _commit(self, operations: Sequence[CommitOperationAdd | CommitOperationDelete], message: str) -> None:
        with writing(self.place.root):
            self._api.create_repo(self.repo, repo_type="dataset", exist_ok=True)
            self._api.create_commit(self.repo, operations, commit_message=message, repo_type="dataset")

    def _there(self) -> dict[str, Any]:
        """Return every file of the data set by its path; empty if it does not exist yet."""
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        with writing(self.place.root):
            try:
                found = list(self._api.list_repo_tree(self.repo, repo_type="dataset", recursive=True))
            except (EntryNotFoundError, RepositoryNotFoundError):
                return {}
        return {entry.path: entry for entry in found if isinstance(entry, RepoFile)}


def _given(data: Path | bytes) -> str | bytes:
    return data if isinstance(data, bytes) else str(data)


def _same(piece: Piece, name: str, listed: Listed, there: Any) -> bool:
    """Return whether the Hub holds a file with the same content, by sha256 for large files and git's hash for small."""
    if there is None or there.size != listed.bytes:
        return False
    if there.lfs is not None:
        return bool(there.lfs.sha256 == listed.sha256)
    data = piece.data(name)
    content = data if isinstance(data, bytes) else data.read_bytes()
    return bool(there.blob_id == sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest())


def _extra_files(piece: Piece, there: dict[str, Any]) -> list[str]:
    """Return the files in a piece's folder on the Hub that are not part of the piece."""
    own = {PUBLISHED_MARK, *(path.name for path in piece.folder.iterdir())}
    return [path for path in there if path.rpartition("/")[0] == piece.path and path.rpartition("/")[2] not in own]
