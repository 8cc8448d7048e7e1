"""How a staged folder becomes part of a warehouse: fsync, one rename, the lock of a folder, and its mark."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.names import MARK

IN_FLIGHT = ".part"


def lock(descriptor: int, *, wait: bool, shared: bool = False) -> None:
    """Lock an open folder. Raises OSError where there are no locks, and for one in use unless it may `wait`."""
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))


@contextmanager
def locked(folder: Path, *, shared: bool = False) -> Iterator[bool]:
    """Hold the lock of a folder, which other processes then wait for; yield False, without a lock, if it is not there.

    Several processes may hold a shared lock at once. On a file system without locks, nobody waits.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    try:
        with suppress(OSError):
            lock(descriptor, wait=True, shared=shared)
        yield folder.is_dir()
    finally:
        os.close(descriptor)


def has_mark(folder: Path) -> bool:
    """Return whether a folder has its mark and no other: a copy may lose it, or keep a second one."""
    return len(list(folder.glob(MARK))) == 1


def add_mark(folder: Path) -> None:
    """Add a mark with a unique name to a folder that is to be committed."""
    (folder / MARK.replace("*", os.urandom(8).hex())).touch()


def commit(folder: Path, target: Path) -> bool:
    """Make a staged folder visible at `target`: fsync its files and the folder, rename it, fsync the parent.

    The rename commits everything at once. If another process committed there first, returns False and leaves
    `target` unchanged.
    """
    for file in sorted(folder.iterdir()):
        if not file.is_symlink():  # a link is stored in its folder
            sync(file)
    sync(folder)
    make_folder(target.parent)
    try:
        folder.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        return False
    sync(target.parent)
    return True


def move_away(folder: Path, target: Path) -> bool:
    """Rename a folder out of a warehouse and sync its parent; return False if it is not there, or no longer."""
    try:
        folder.rename(target)
    except FileNotFoundError:
        return False
    sync(folder.parent)
    return True


def require_renames(source: Path, folders: Iterable[Path]) -> None:
    """Raise MoewhError for the first folder that files in `source` cannot be renamed into."""
    for folder in folders:
        if source.is_dir() and folder.is_dir() and not _one_disk(source, folder):
            raise MoewhError(
                f"{folder} is on a different disk from {source}, and moewh commits by a rename, which cannot cross "
                "disks. Keep the whole warehouse on one disk (its root may be a link) while it is written to; complete "
                "runs may move."
            )


def _one_disk(source: Path, target: Path) -> bool:
    """Return whether a rename from one folder to another is possible.

    Compares their devices and tries to rename a missing file; the latter detects a bind mount, which has the same
    device as the disk that it shows.
    """
    if source.stat().st_dev != target.stat().st_dev:
        return False
    name = f"{os.urandom(8).hex()}{IN_FLIGHT}"
    try:
        (source / name).rename(target / name)
    except OSError as error:
        return error.errno != errno.EXDEV
    return True


def make_folder(path: Path) -> None:
    """Create a folder and its missing parents, each synced to disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
