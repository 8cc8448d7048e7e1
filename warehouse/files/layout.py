"""The layout of a warehouse directory, and how an empty one is created.

Layout::

    wh/warehouse.duckdb                       views only (moewh.warehouse.views.publishing)
       runs/run_id=<run>/run.parquet …        what a run is
       segments/run_id=<run>/segment=<n>/     committed rows
       sealed/run_id=<run>/                   the counts of a complete run, merged (moewh.warehouse.sealing)
       unsealed/run_id=<run>/                 a link to the segments of any other run, through which counts are read
       geometry/run_id=<run>/                 measures of the model's weights alone (moewh geometry)
       quarantine/                            damaged segments that were taken out
       .staging/                              work in flight; no view's glob matches it
"""

from __future__ import annotations

import errno
import io
import os
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import (
    IN_FLIGHT,
    add_mark,
    commit,
    has_mark,
    lock,
    locked,
    make_folder,
    move_away,
    require_renames,
    sync,
)
from moewh.warehouse.files.folders import own_entries, real_path
from moewh.warehouse.files.names import (
    ANY_RUN,
    DATABASE,
    FOLDERS,
    MARK,
    OWN_NAMES,
    QUARANTINE,
    RUN_FOLDER,
    SCHEMA_RUN,
    SEGMENT_FOLDER,
    STAGING,
    UNSEALED,
    UNSEALED_LINK,
    glob_literal,
    is_segment_folder,
    run_of_folder,
)

if TYPE_CHECKING:
    import pyarrow as pa


_FIRST_FILES: dict[schema.Level, str] = {
    "run": schema.RUNS.file,
    "segment": schema.SEGMENTS.file,
    "geometry": schema.EXPERT_GEOMETRY.file,
    "sealed": schema.SEGMENTS.file,
}
"""A file that every folder of each level holds."""


_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
"""What file systems without symbolic links answer, such as exFAT and some network disks."""


@dataclass(frozen=True)
class Layout:
    """The paths of one warehouse, and the operations on them that create, stage, link and sweep folders."""

    root: Path

    @property
    def option(self) -> str:
        """The option that names this warehouse, for commands in messages: without it, they act on the default one."""
        return f"--warehouse {shlex.quote(str(self.root))}"

    @property
    def database(self) -> Path:
        """The published DuckDB file."""
        return self.root / DATABASE

    @property
    def staging(self) -> Path:
        """Work in flight and caches."""
        return self.root / STAGING

    @property
    def empty(self) -> Path:
        """A second copy of the zero-row files: views are bound to these, so that no segment is listed."""
        return self.staging / "empty"

    @property
    def runs(self) -> Path:
        """Folder of all runs' own files. A process that commits to a run, or deletes one, holds its lock meanwhile."""
        return self.root / "runs"

    def run(self, run_id: str) -> Path:
        """Folder of a run's own files."""
        return self.runs / f"{RUN_FOLDER}{run_id}"

    def segments(self, run_id: str) -> Path:
        """Folder of a run's segments."""
        return self.root / "segments" / f"{RUN_FOLDER}{run_id}"

    def segment(self, run_id: str, number: int) -> Path:
        """Folder of one committed segment."""
        return self.segments(run_id) / f"{SEGMENT_FOLDER}{number}"

    def geometry(self, run_id: str) -> Path:
        """Folder of the measures of the weights of a run's model."""
        return self.root / "geometry" / f"{RUN_FOLDER}{run_id}"

    def sealed(self, run_id: str) -> Path:
        """Folder of a sealed run's merged counts."""
        return self.root / "sealed" / f"{RUN_FOLDER}{run_id}"

    def unsealed(self, run_id: str) -> Path:
        """Folder through which the counts of a run that is not sealed are read."""
        return self.root / "unsealed" / f"{RUN_FOLDER}{run_id}"

    def template_times(self, run_id: str) -> Path:
        """Folder that keeps the time that the chat template of a run sees; it exists before the run does."""
        return self.staging / "template_time" / f"{RUN_FOLDER}{run_id}"

    def exists(self) -> bool:
        """Return whether there is a warehouse here; the geometry folder may be missing, as in older warehouses."""
        return self.segment(SCHEMA_RUN, 0).is_dir() and self.run(SCHEMA_RUN).is_dir()

    def inside_of(self) -> Path | None:
        """Return the warehouse among whose own files this path is; None if there is none."""
        return next(
            (
                folder
                for folder in self.root.parents
                if Layout(folder).run(SCHEMA_RUN).is_dir() and self.root.relative_to(folder).parts[0] in OWN_NAMES
            ),
            None,
        )

    def may_be_warehouse(self) -> bool:
        """Return whether this folder is empty or holds a warehouse, even a damaged one."""
        names = {path.name for path in own_entries(self.root)}
        return not names or bool(names & {"runs", "segments"})

    def require(self) -> Layout:
        """Return self if there is a warehouse here that this moewh can read; otherwise raise MoewhError."""
        if not self.exists():
            self._require_folder()
            self.linked_folders()  # a link to an unmounted disk gives a better message
            if (outer := self.inside_of()) is not None:
                raise MoewhError(f"{self.root} is among the files of the warehouse {outer}. Name that folder.")
            lacking = [folder for folder in (self.segment(SCHEMA_RUN, 0), self.run(SCHEMA_RUN)) if not folder.is_dir()]
            if any(self.root.glob(f"*/{ANY_RUN}")) and self.may_be_warehouse():
                raise MoewhError(
                    f"the warehouse at {self.root} lacks {lacking[0].relative_to(self.root)}: it was copied in part. "
                    f"Copy the rest, or run `moewh refresh {self.option}`; "
                    "then `moewh verify` lists what else is missing."
                )
            raise MoewhError(
                f"there is no warehouse at {self.root}. Run `moewh ingest` or `moewh demo` to make one, "
                "or name another with --warehouse."
            )
        self._require_version()
        return self

    def _require_version(self) -> None:
        """Raise MoewhError for a warehouse of a version that this moewh does not support.

        The manifest of the zero-row files gives the version of the whole warehouse: they are written first, and a
        newer moewh rewrites them before it adds anything. `moewh verify` reports a manifest that cannot be read.
        """
        versions = _versions(self.segment(SCHEMA_RUN, 0))
        if versions is not None and (refused := schema.refusal(*versions)):
            raise MoewhError(f"the warehouse at {self.root} {refused}")

    def create(self) -> None:
        """Create an empty warehouse: zero-row files of every table. In an existing one, add those that are missing.

        Files of an older schema are rewritten. Raises MoewhError if the directory cannot be written, and for a
        warehouse of a version that this moewh does not support. Raises UsageError if it is a file or a broken link.
        """
        self._require_folder()
        self._require_version()
        with self.writing():
            self.staging.mkdir(parents=True, exist_ok=True)
            for layout in (Layout(self.empty), self):
                for level, folder in layout.zero_row_folders().items():
                    self._add_empty_tables(level, folder)
                self._add_unsealed_zero_rows(layout)

    def _require_folder(self) -> None:
        """Raise UsageError if the warehouse, or a folder above it, is a file or a broken link."""
        with self.writing():
            there = next(path for path in (self.root, *self.root.parents) if path.exists() or path.is_symlink())
            if there.is_dir():
                return
        what = "is not a folder." if there.exists() else f"is a link to {real_path(there)}, which is missing."
        raise UsageError(f"{there} {what} Name another warehouse with --warehouse.")

    def commit_of_run(self, run_id: str, folder: Path, target: Path) -> None:
        """Commit a staged folder of a run; losing a race is success.

        Raises MoewhError if another command has deleted the run, or begun another run of its name.
        """
        with locked(self.runs, shared=True):
            if not self.run(run_id).is_dir():
                raise deleted(run_id)
            if _manifest(self.run(run_id)).get("identity") not in (None, _manifest(folder)["identity"]):
                raise MoewhError(
                    f"run {run_id!r} is another run now: another command began one of this name meanwhile. Write this "
                    "one under another run id."
                )
            commit(folder, target)

    def link_unsealed(self, run_id: str) -> None:
        """Make a run's segments readable through `unsealed/`, unless they already are.

        A copy of a warehouse may hold the linked files instead of the link: such a folder is replaced by a link.
        Raises MoewhError if the disk cannot be written or has no symbolic links.
        """
        if self.is_linked(run_id) and has_mark(self.unsealed(run_id)):
            return
        with self.writing(), self.staged(f"unsealed.{run_id}") as folder:
            add_mark(folder)
            self._link(folder / UNSEALED_LINK, self._link_target(run_id))
            self.unlink_unsealed(run_id)
            make_folder(self.segments(run_id))
            commit(folder, self.unsealed(run_id))

    def is_linked(self, run_id: str) -> bool:
        """Return whether a run's folder in `unsealed/` has the link to its segments, not one that leads elsewhere."""
        try:
            return (self.unsealed(run_id) / UNSEALED_LINK).readlink() == self._link_target(run_id)
        except OSError:  # missing, or a folder or a file
            return False

    def _link_target(self, run_id: str) -> Path:
        return Path("..", "..", "segments", self.segments(run_id).name)

    def _link(self, link: Path, target: Path) -> None:
        try:
            link.symlink_to(target)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            raise MoewhError(
                f"the disk of {self.root} has no symbolic links, which a warehouse needs. Choose a directory on "
                "another disk with --warehouse."
            ) from error

    def has_unsealed_zero_rows(self) -> bool:
        """Return whether `unsealed/` has its mark and its zero-row files, identical to those among the segments."""
        source = self.segment(SCHEMA_RUN, 0)
        there = self.unsealed(SCHEMA_RUN) / UNSEALED_LINK / f"{SEGMENT_FOLDER}0"
        tables = [table for table in schema.MERGED if (source / table.file).is_file()]
        marked = has_mark(self.unsealed(SCHEMA_RUN))
        return marked and all(_same_bytes(source / table.file, there / table.file) for table in tables)

    def zero_row_folders(self) -> dict[schema.Level, Path]:
        """Return the folder of each level's zero-row files, in the order in which they are written."""
        return {
            "run": self.run(SCHEMA_RUN),
            "segment": self.segment(SCHEMA_RUN, 0),
            "geometry": self.geometry(SCHEMA_RUN),
            "sealed": self.sealed(SCHEMA_RUN),
        }

    def has_table(self, table: schema.Table) -> bool:
        """Return whether a warehouse has files of a table; one that is older than the table has none.

        A copy may lack the zero-row file alone: then their manifest lists it, or a run has the table.
        """
        zero_rows = self.zero_row_folders()[table.level]
        if (zero_rows / table.file).is_file():
            return True
        if table.level == "segment":  # of which there may be thousands
            return table.file in _listed(zero_rows)
        return any(self.root.glob(f"{FOLDERS[table.level]}/{table.file}"))

    def _add_unsealed_zero_rows(self, layout: Layout) -> None:
        """Write the zero-row files of a layout's `unsealed/`: files, not a link, so that every copy has them."""
        if layout.has_unsealed_zero_rows():
            return
        target = layout.unsealed(SCHEMA_RUN)
        self.require_one_disk()
        with self.staged(SCHEMA_RUN) as folder:
            move_away(target, folder / "old")
            files = folder / "new" / UNSEALED_LINK / f"{SEGMENT_FOLDER}0"
            files.mkdir(parents=True)
            for table in schema.MERGED:
                shutil.copyfile(layout.segment(SCHEMA_RUN, 0) / table.file, files / table.file)
                sync(files / table.file)
            sync(files)
            sync(files.parent)
            add_mark(folder / "new")
            commit(folder / "new", target)

    def unlink_unsealed(self, run_id: str) -> None:
        """Remove a run's segments from `unsealed/`, by one rename."""
        if self.unsealed(run_id).is_dir():
            with self.staged(f"unsealed.{run_id}") as folder:
                move_away(self.unsealed(run_id), folder / "gone")

    def linked_folders(self) -> list[Path]:
        """Return the targets of the symbolic links that replace a folder of moewh: `segments`, a run's, a segment's.

        Raises MoewhError for a broken link and a folder without permission, whose rows would be missing from every
        answer, and for a link to a folder that moewh did not write.
        """
        self.require_links()
        return self.committed_links()

    def committed_links(self) -> list[Path]:
        """Return what `linked_folders` does, without a look at `unsealed/`."""
        found = []
        for link, needed in self._links():
            target = real_path(link)
            if not target.is_dir():
                raise MoewhError(
                    f"{link} is a link to {target}, which is not a folder. Mount that disk, or remove the link."
                )
            if own_entries(target) and not any(target.glob(needed)):
                raise MoewhError(f"{link} is a link to {target}, which has no {needed}. Remove the link.")
            found.append(target)
        return found

    def folders(self) -> list[str]:
        """Return the folders that SQL may read, as DuckDB's allowed directories: each as a path and as a glob pattern.

        DuckDB compares prefixes, so a path with `*`, `?` or `[` must be allowed in both spellings. Raises as
        `linked_folders` does.
        """
        return [text for folder in (self.root, *self.linked_folders()) for text in (str(folder), glob_literal(folder))]

    def require_links(self) -> None:
        """Raise MoewhError for a copy of the warehouse that lost a link to a run's segments, or followed it.

        A folder that this user may not read is refused, too.
        """
        for run in _scan(self.unsealed(SCHEMA_RUN).parent):
            if (run_id := run_of_folder(run.name)) is None:
                continue  # no view reads it
            _require_permission(run.path)
            if run_id != SCHEMA_RUN and not self.is_linked(run_id):
                remedy = "refresh" if self.run(run_id).is_dir() else "verify --repair"
                raise MoewhError(
                    f"{run.path} does not link to the run's segments: a copy followed the link or lost it. "
                    f"Run `moewh {remedy} {self.option}`."
                )

    def require_whole(self) -> None:
        """Raise MoewhError for a copy that lacks files that describe a run, or segments of a sealed run."""
        self._require_run_files()
        self._require_segments()

    def _require_run_files(self) -> None:
        """Raise MoewhError for a run whose own folder lacks a file: views that read it would leave the run out."""
        needed = {table.file for table in schema.TABLES if table.level == "run" and not table.may_lack_files}
        for name in sorted({entry.name for level in ("runs", "segments") for entry in _scan(self.root / level)}):
            if (run_id := run_of_folder(name)) is None or run_id == SCHEMA_RUN:
                continue
            lost = sorted(needed - {entry.name for entry in _scan(self.run(run_id))})
            if lost and (self.run(run_id).is_dir() or self._has_only_segments(run_id)):
                self.committed_links()  # a link that leads elsewhere is the reason then
                raise MoewhError(
                    f"{self.run(run_id)} lacks {', '.join(lost)}, so the run would be missing from answers. Copy the "
                    f"rest, or run `moewh verify {self.option}`, which gives the command for it."
                )

    def _has_only_segments(self, run_id: str) -> bool:
        """Return whether a run without its own folder has segments: it was not deleted meanwhile, or quarantined."""
        quarantined = self.root / QUARANTINE / self.run(run_id).relative_to(self.root)
        segments = (entry for entry in _scan(self.segments(run_id)) if is_segment_folder(entry.name))
        return not quarantined.is_dir() and any(segments)

    def _require_segments(self) -> None:
        """Raise MoewhError for a copy that lacks segments of a sealed run: its counts are whole, its rows are not."""
        for run in _scan(self.sealed(SCHEMA_RUN).parent):
            if (run_id := run_of_folder(run.name)) is None or run_id == SCHEMA_RUN:
                continue
            sealed = _listed(Path(run.path)).get(schema.SEGMENTS.file, 0)
            there = sum(is_segment_folder(entry.name) for entry in _scan(self.segments(run_id)))
            if there < sealed and has_mark(Path(run.path)):  # otherwise it was deleted while we counted
                raise MoewhError(
                    f"{self.segments(run_id)} lacks {sealed - there} of the run's {sealed} segments, so rows would be "
                    f"missing. Copy the rest, or run `moewh verify {self.option}`, which gives the command for it."
                )

    def _links(self) -> Iterator[tuple[Path, str]]:
        """Yield the links among moewh's folders, each with a pattern of what its target must contain."""
        for level, file in _FIRST_FILES.items():
            names = FOLDERS[level].split("/")
            folders = [self.root]
            for depth, name in enumerate(names, 1):
                entries = [entry for folder in folders for entry in _scan(folder) if fnmatchcase(entry.name, name)]
                yield from (
                    (Path(entry.path), "/".join([*names[depth:], file])) for entry in entries if entry.is_symlink()
                )
                folders = [Path(entry.path) for entry in entries] if depth < len(names) else []
                if depth == len(names):
                    for entry in entries:
                        _require_permission(entry.path)

    def require_one_disk(self, run_id: str | None = None) -> None:
        """Raise MoewhError if staged folders cannot be renamed into place, among all runs and within `run_id`.

        Broken links are refused, as when reading. Raises UsageError if the warehouse is a file or a broken link.
        """
        self._require_folder()
        self.committed_links()
        folders = [self.root, *(self.root / pattern.partition("/")[0] for pattern in (*FOLDERS.values(), UNSEALED))]
        if run_id is not None:
            folders.append(self.segments(run_id))
        require_renames(self.staging if self.staging.is_dir() else self.root, folders)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn disk errors into a MoewhError that names the warehouse."""
        try:
            yield
        except OSError as error:
            raise MoewhError(
                f"cannot write the warehouse at {self.root}: {error.strerror or error}. What was committed before "
                "is safe. Make room there, or choose a writable directory with --warehouse; then run the same command "
                "again."
            ) from error

    def _add_empty_tables(self, level: schema.Level, target: Path) -> None:
        versions = _versions(target)
        older = versions is not None and versions < (schema.FORMAT_VERSION, schema.SCHEMA_VERSION)
        unlisted = not (target / schema.MANIFEST).is_file()
        tables = [table for table in (*schema.TABLES, *schema.SEALED) if table.level == level]
        missing = [table for table in tables if older or unlisted or not (target / table.file).is_file()]
        unmarked = level == "sealed" and not has_mark(target)
        if not missing and not unmarked:
            return
        from moewh.warehouse.files.manifest import write_manifest

        self.require_one_disk()
        with self.staged(SCHEMA_RUN) as folder:
            for table in missing:
                (folder / table.file).write_bytes(_without_rows(table.arrow()))
            write_manifest(folder, None, None)
            if level == "sealed":
                add_mark(folder)
            if not commit(folder, target):
                for table in missing:
                    (folder / table.file).replace(target / table.file)
                write_manifest(target, None, None)
                if unmarked:
                    for mark in target.glob(MARK):
                        mark.unlink(missing_ok=True)
                    add_mark(target)

    @contextmanager
    def staged(self, name: str) -> Iterator[Path]:
        """Yield a new folder in `.staging/`, removed afterwards if it is still there.

        It is locked while in use, so that `sweep` can recognise what a dead process left.
        """
        while True:
            folder = self.staging / f"{name}.{os.urandom(8).hex()}{IN_FLIGHT}"
            folder.mkdir(parents=True)
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue  # another process's sweep removed it, which was not locked yet
            with suppress(OSError):  # on a file system without locks, nothing is swept either
                lock(descriptor, wait=True)
            if folder.is_dir():  # otherwise a sweep removed it before it was locked
                break
            os.close(descriptor)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(descriptor)

    def sweep(self) -> None:
        """Remove what dead processes left in `.staging/`; a folder in use is locked and stays."""
        for folder in self.staging.glob(f"*{IN_FLIGHT}"):
            try:
                descriptor = os.open(folder, os.O_RDONLY)
            except FileNotFoundError:
                continue
            try:
                lock(descriptor, wait=False)
                shutil.rmtree(folder, ignore_errors=True)
            except OSError:
                continue  # in use, or on a file system without locks
            finally:
                os.close(descriptor)

    def remove_empty(self) -> None:
        """Remove the folders of a warehouse that was never completed, as far as they are empty."""
        for path in (self.staging / "prompts", self.staging / "template_time", self.staging, self.root):
            with suppress(OSError):  # rmdir refuses a folder that is not empty, which makes this safe
                path.rmdir()


def deleted(run_id: str) -> MoewhError:
    """Return the error for a run that another command deleted while this one wrote to it."""
    return MoewhError(f"run {run_id!r} was deleted by another command meanwhile. If you need it, write it again.")


@cache
def _without_rows(columns: pa.Schema) -> bytes:
    """Return a Parquet file with these columns and no rows, cached: a warehouse has each zero-row file twice."""
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(columns.empty_table(), file)
    return file.getvalue()


def _versions(folder: Path) -> tuple[int, int] | None:
    """Return the format and schema version in a folder's manifest; None if it has none."""
    content = _manifest(folder)
    form, version = content.get("format"), content.get("schema")
    return (form, version) if isinstance(form, int) and isinstance(version, int) else None


def _listed(folder: Path) -> dict[str, int]:
    """Return the files that a folder's manifest lists, each with its rows; no file if it cannot be read."""
    try:
        return {name: int(entry["rows"]) for name, entry in _manifest(folder)["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        return {}


def _manifest(folder: Path) -> dict[str, Any]:
    """Return the content of a folder's manifest, unchecked; empty if there is none, or it is not a JSON object."""
    import json

    try:
        content = json.loads((folder / schema.MANIFEST).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _same_bytes(one: Path, other: Path) -> bool:
    return one.is_file() and other.is_file() and one.read_bytes() == other.read_bytes()


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    """Return a folder's entries without a stat call for each; an empty list if it is not a folder."""
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _require_permission(folder: str) -> None:
    """Raise MoewhError for a folder whose files this user may not open: DuckDB would pass over it without an error."""
    if not os.access(folder, os.R_OK | os.X_OK) and Path(folder).is_dir():  # else removed meanwhile, or not a folder
        raise MoewhError(
            f"{folder} cannot be read (Permission denied), and its rows would be missing from every answer. Its owner "
            "can allow it with `chmod -R a+rX`."
        )
