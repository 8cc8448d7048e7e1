"""Targets of publishing: the interface, and the two that hold files by name (a folder, an object store).

A piece counts as present if its manifest, which is sent last, has the same bytes, every file has the same size, and its
folder holds no other file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from shutil import copyfile
from typing import Protocol

from moewh.publish.card import is_card
from moewh.publish.pieces import Piece
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.commit import commit, make_folder, move_away, sync
from moewh.warehouse.files.folders import is_left_by_others, own_entries
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import MANIFEST
from moewh.warehouse.files.names import DATABASE, LISTING, PUBLISHED_NAMES
from moewh.warehouse.remote.place import Folder, Place, Remote, reason

CARD = "README.md"
_REQUESTS = 8
"""Files sent concurrently."""


class Target(Protocol):
    """A place to publish to."""

    @property
    def place(self) -> Place:
        """Where readers find it."""

    def missing(self, pieces: list[Piece]) -> list[Piece]:
        """Return the pieces that are missing or differ, each with the files to send.

        Raises UsageError if the place holds something else.
        """

    def send(self, pieces: list[Piece]) -> None:
        """Send pieces. After a kill, each is either complete or one that `missing` returns."""

    def finish(self, files: dict[str, bytes]) -> None:
        """Replace files at the root, in this order; the last one makes the sent pieces visible to readers."""

    def paths(self) -> set[str]:
        """Return the path of every file below the root, listed or not."""

    def remove(self, paths: list[str]) -> None:
        """Remove files that are not listed."""


def require_ours(names: Iterable[str], root: str) -> None:
    """Raise UsageError for a place with files that no published warehouse has."""
    others = {name for name in names if not is_left_by_others(name)} - PUBLISHED_NAMES - {CARD}
    if "" in others:
        raise UsageError(f"{root} is a file, not a folder. Publish to another place.")
    if others:
        raise UsageError(f"{root} holds {min(others)}, so it is not a published warehouse. Publish to another place.")


def _require_own_files(names: set[str], place: Place, root: str) -> None:
    """Raise UsageError for a card or database of others, which moewh would replace; on the Hub, the history has them.

    Without a listing, they are moewh's if a killed process wrote them. It writes the card first.
    """
    present = names & {CARD, DATABASE}
    if LISTING in names or not present:
        return
    if CARD not in present or not is_card(place.read(CARD).decode(errors="replace")):
        raise UsageError(
            f"{root} holds {min(present)}, which moewh did not write and would replace. Move it away, or publish to "
            "another place."
        )


@dataclass(frozen=True)
class FolderTarget:
    """A local folder: pieces are copied into its `.staging/` and renamed into place."""

    root: Path
    url: str | None = None
    """Where readers find it, if not here."""

    @property
    def place(self) -> Folder:
        """The folder."""
        return Folder(self.root, self.url)

    def missing(self, pieces: list[Piece]) -> list[Piece]:
        """Return the missing pieces."""
        names = {path.name for path in self.root.glob("*")}
        require_ours(names, str(self.root))
        _require_own_files(names, self.place, str(self.root))
        return [piece for piece in pieces if not self._holds(piece)]

    def send(self, pieces: list[Piece]) -> None:
        """Copy each piece, replacing an existing one."""
        layout = Layout(self.root)
        with _writing_folder(self.root):
            make_folder(self.root)
            layout.sweep()
            for piece in pieces:
                with layout.staged("publish") as folder:
                    (folder / "new").mkdir()
                    for name in piece.files:
                        _copy(piece.data(name), folder / "new" / name)
                    target = self.root / piece.path
                    move_away(target, folder / "old")
                    commit(folder / "new", target)

    def finish(self, files: dict[str, bytes]) -> None:
        """Write each file beside its target and rename it."""
        layout = Layout(self.root)
        with _writing_folder(self.root), layout.staged("publish") as folder:
            for name, data in files.items():
                _copy(data, folder / name)
                (folder / name).replace(self.root / name)
                sync(self.root)
        with suppress(OSError):  # another process uses it
            layout.staging.rmdir()

    def paths(self) -> set[str]:
        """Return the path of every file."""
        return {path.relative_to(self.root).as_posix() for path in self.root.rglob("*") if not path.is_dir()}

    def remove(self, paths: list[str]) -> None:
        """Remove files, and folders that are then empty."""
        with _writing_folder(self.root):
            for path in paths:
                (self.root / path).unlink(missing_ok=True)
            for folder in sorted({self.root / path for path in paths}, reverse=True):
                for relative in folder.relative_to(self.root).parents:
                    parent = self.root / relative
                    if parent != self.root and parent.is_dir() and not any(parent.iterdir()):
                        parent.rmdir()

    def _holds(self, piece: Piece) -> bool:
        here = self.root / piece.path
        if not here.is_dir():
            return False
        sizes = {path.name: path.stat().st_size for path in own_entries(here)}
        wanted = {name: listed.bytes for name, listed in piece.files.items()}
        return sizes == wanted and (here / MANIFEST).read_bytes() == (piece.folder / MANIFEST).read_bytes()


@dataclass(frozen=True)
class StoreTarget:
    """A folder in an object store, where a file appears whole or not at all, and nothing can be renamed."""

    place: Remote

    def missing(self, pieces: list[Piece]) -> list[Piece]:
        """Return the missing pieces."""
        there = self._there()
        names = {path.split("/")[0] for path in there}
        require_ours(names, self.place.root)
        _require_own_files(names, self.place, self.place.root)
        with ThreadPoolExecutor(_REQUESTS) as pool:
            held = pool.map(lambda piece: self._holds(piece, there), pieces)
            return [piece for piece, holds in zip(pieces, held, strict=True) if not holds]

    def send(self, pieces: list[Piece]) -> None:
        """Send each piece: first remove invalid files, and send the manifest last."""
        there = self._there()
        for piece in pieces:
            stale = [path for path in _in_folder(there, piece.path) if PurePosixPath(path).name not in piece.files]
            manifest = f"{piece.path}/{MANIFEST}"
            self.remove([manifest] * (manifest in there) + stale)
            with ThreadPoolExecutor(_REQUESTS) as pool:
                names = [name for name in piece.files if name != MANIFEST]
                for _ in pool.map(lambda name, piece=piece: self._put(f"{piece.path}/{name}", piece.data(name)), names):
                    pass
            self._put(manifest, piece.data(MANIFEST))

    def finish(self, files: dict[str, bytes]) -> None:
        """Send each file."""
        for name, data in files.items():
            self._put(name, data)

    def paths(self) -> set[str]:
        """Return the path of every file."""
        return set(self._there())

    def remove(self, paths: list[str]) -> None:
        """Remove files."""
        for path in paths:
            with writing(self.place.root):
                self.place.fs.rm_file(f"{self.place.root}/{path}")

    def _there(self) -> dict[str, int]:
        """Return the size of every file below the root, by its path from there."""
        base = f"{self.place.root.partition('://')[2]}/"
        with writing(self.place.root):
            self.place.fs.invalidate_cache()
            found = self.place.fs.find(self.place.root, detail=True)
        return {name.partition(base)[2]: entry["size"] for name, entry in found.items()}

    def _holds(self, piece: Piece, there: dict[str, int]) -> bool:
        wanted = {f"{piece.path}/{name}": listed.bytes for name, listed in piece.files.items()}
        if {path: there[path] for path in _in_folder(there, piece.path)} != wanted:
            return False
        return self.place.read(f"{piece.path}/{MANIFEST}") == (piece.folder / MANIFEST).read_bytes()

    def _put(self, path: str, data: Path | bytes) -> None:
        url = f"{self.place.root}/{path}"
        with writing(self.place.root):
            if isinstance(data, bytes):
                self.place.fs.pipe_file(url, data)
            else:
                self.place.fs.put_file(str(data), url)


def _in_folder(there: dict[str, int], folder: str) -> list[str]:
    return [path for path in there if path.startswith(f"{folder}/")]


@contextmanager
def writing(root: str) -> Iterator[None]:
    """Turn any error of a file system into a MoewhError: each has its own exceptions, from its own libraries."""
    try:
        yield
    except MoewhError:
        raise
    except Exception as error:
        raise MoewhError(
            f"cannot publish to {root}: {reason(error)} What was published before is unchanged; run the same command "
            "again."
        ) from error


@contextmanager
def _writing_folder(root: Path) -> Iterator[None]:
    """Turn disk errors into a MoewhError that names the target."""
    try:
        yield
    except OSError as error:
        raise MoewhError(
            f"cannot publish to {root}: {error.strerror or error}. What was published before is unchanged. Make room "
            "there, or publish to another place; the same command continues."
        ) from error


def _copy(data: Path | bytes, target: Path) -> None:
    """Write bytes, or copy a file, and wait until they are on disk."""
    if isinstance(data, bytes):
        target.write_bytes(data)
    else:
        copyfile(data, target)
    sync(target)
