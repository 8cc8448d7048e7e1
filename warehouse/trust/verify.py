"""Verification: compares every committed file with its folder's manifest, and every folder with its run.

`plan` lists the folders and the files in their manifests; `check` then reads every byte of every file, several files
at a time. It returns `Fault`s, each with one file and what is wrong with it. Neither torch nor a model is needed.

A file is bad if it is missing or unknown, differs in size, sha256, columns, types or number of rows, or cannot be read
as Parquet. (Page checksums were checked before the sha256 was computed: see `manifest`.) A folder is bad if its
manifest is bad, if it belongs elsewhere (a segment was moved or swapped), or if its counts do not agree with each
other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import has_mark
from moewh.warehouse.files.folders import own_entries, real_path
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.manifest import MANIFEST, Entry, Manifest, ManifestError, file_sha256, read_manifest
from moewh.warehouse.files.names import (
    FOLDERS,
    MARK,
    RUN_FOLDER,
    SCHEMA_RUN,
    SEGMENT_FOLDER,
    UNSEALED,
    is_segment_folder,
    run_of_folder,
)

if TYPE_CHECKING:
    import pyarrow as pa

    from moewh.warehouse.remote.published import Readable

_COUNTED = {"prompts": schema.PROMPTS, "tokens": schema.TOKENS, "routing_rows": schema.ROUTING}
"""Columns of segment.parquet, and the tables whose rows they count."""


@dataclass(frozen=True)
class Fault:
    """One difference from what was committed."""

    folder: Path
    file: str
    """Name within the folder; empty for the folder itself."""
    why: str
    movable: bool = True
    """False for a broken link in place of a folder, whose disk may come back, and for what this user may not read."""

    @property
    def path(self) -> Path:
        """The path of the bad file or folder."""
        return self.folder / self.file if self.file else self.folder


@dataclass
class Folder:
    """A committed folder: its path, the run and segment in that path, and its manifest."""

    path: Path
    level: schema.Level
    run_id: str
    number: int | None
    manifest: Manifest | None = None
    """None if it is missing or invalid."""
    files: dict[str, Entry] = field(default_factory=dict)
    """The files to read: those in the manifest that exist and belong to a table."""
    _totals: dict[tuple[str, str], int] = field(default_factory=dict)

    @cached_property
    def row(self) -> dict[str, Any]:
        """The one row of a run's or a segment's own file."""
        from moewh.warehouse.files.tables import read_rows

        own = schema.RUNS if self.level == "run" else schema.SEGMENTS
        rows: list[dict[str, Any]] = read_rows(self.path / own.file).to_pylist()
        return rows[0]

    def total(self, table: schema.Table, column: str) -> int:
        """Return the sum of a column, which is read once: the set of a sealed run is compared with it too."""
        import pyarrow.compute as pc

        from moewh.warehouse.files.tables import read_rows

        if (table.file, column) not in self._totals:
            values = read_rows(self.path / table.file, [column]).column(column)
            self._totals[table.file, column] = int(pc.sum(values).as_py() or 0)
        return self._totals[table.file, column]


@dataclass
class CommittedPlan:
    """The folders to check, and the faults found while listing them."""

    folders: list[Folder] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)

    @property
    def files(self) -> int:
        """Number of files in the manifests."""
        return sum(len(folder.files) for folder in self.folders)

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(entry.bytes for folder in self.folders for entry in folder.files.values())

    @property
    def segments(self) -> int:
        """Number of segments of all runs."""
        return sum(folder.level == "segment" and folder.run_id != SCHEMA_RUN for folder in self.folders)

    @property
    def runs(self) -> int:
        """Number of runs."""
        return sum(folder.level == "run" and folder.run_id != SCHEMA_RUN for folder in self.folders)


def plan(layout: Layout) -> CommittedPlan:
    """List every committed folder with its manifest. Raises MoewhError if there is no warehouse."""
    found = CommittedPlan()
    for part in (layout.require(), Layout(layout.empty)):
        for level, zero_rows in part.zero_row_folders().items():
            _list_level(part, level, found)
            if not zero_rows.is_dir() and own_entries(zero_rows.parent):  # an older warehouse lacks all of the level
                found.faults.append(Fault(zero_rows, "", f"is missing; `moewh refresh {layout.option}` recreates it"))
        _list_unsealed(part, found)
    for folder in found.folders:
        _take_manifest(folder, found.faults)
    described = {folder.run_id for folder in found.folders if folder.level == "run"}
    for run_id in sorted({folder.run_id for folder in found.folders} - described):
        found.faults.append(Fault(layout.run(run_id), schema.RUNS.file, "is missing"))
    return found


def check(planned: CommittedPlan, jobs: int | None = None, done: Callable[[int], None] = lambda _: None) -> list[Fault]:
    """Read every file and return all faults, ordered by path; `done` is called with the number of bytes read."""
    faults = list(planned.faults)
    work = [
        (folder, name, entry)
        for folder in planned.folders
        if folder.manifest is not None
        for name, entry in folder.files.items()
    ]
    work.sort(key=lambda item: -item[2].bytes)  # the largest first, so that none is left for the end
    workers = ThreadPoolExecutor(jobs or usable_cpus())  # reading and hashing both release the GIL
    try:
        for (_, _, entry), fault in zip(work, workers.map(_file_fault, work), strict=True):
            done(entry.bytes)
            if fault is not None:
                faults.append(fault)
    finally:
        workers.shutdown(cancel_futures=True)
    bad = {fault.folder for fault in faults}
    faults += _check_belonging([folder for folder in planned.folders if folder.path not in bad])
    return sorted(faults, key=lambda fault: (fault.path, fault.why))


def check_rollups(warehouse: Readable) -> list[Fault]:
    """Recompute every rollup from its segment's rows, and sealed totals from rollups, in SQL; return a fault per file.

    Files must be readable.
    """
    layout = warehouse if isinstance(warehouse, Layout) else Layout(Path())
    from moewh.warehouse.answer.query import prepare
    from moewh.warehouse.trust.rollups import compare
    from moewh.warehouse.views.opening import open_warehouse

    files = {table.name: table.file for table in (*schema.ROLLUPS, *schema.TOTALS)}
    found: dict[tuple[Path, str], Fault] = {}
    with open_warehouse(warehouse) as connection:
        for difference in compare(partial(prepare, connection)):
            run_id, segment = difference.run_id, difference.segment
            folder = layout.sealed(run_id) if segment is None else layout.segment(run_id, segment)
            key = (folder, files[difference.table])
            found.setdefault(key, Fault(*key, difference.text))
    return list(found.values())


# ------------------------------------------------------------------------------------------ folders


def _list_level(layout: Layout, level: schema.Level, found: CommittedPlan) -> None:
    """Find the folders of one level; anything else among them is a fault."""
    top = layout.root / FOLDERS[level].partition("/")[0]
    if lost := _lost_link(top):
        found.faults.append(Fault(top, "", lost, movable=False))
    for run in own_entries(top):
        if not run.is_dir() or (run_id := run_of_folder(run.name)) is None:
            found.faults.append(_no_folder(run, "is not the folder of a run"))
        elif level == "segment":
            _list_segments(run, run_id, found)
        else:
            found.folders.append(Folder(run, level, run_id, None))


def _list_unsealed(layout: Layout, found: CommittedPlan) -> None:
    """Find runs whose counts no view reads, and entries of `unsealed/` that do not link to a run's segments."""
    top = layout.root / UNSEALED.partition("/")[0]
    for run in own_entries(top):
        run_id = run_of_folder(run.name)
        is_linked = run_id is not None and (
            layout.is_linked(run_id) or (run_id == SCHEMA_RUN and layout.has_unsealed_zero_rows())
        )
        if not is_linked or not has_mark(run):
            found.faults.append(
                Fault(run, "", f"does not link to a run's segments; `moewh refresh {layout.option}` recreates it")
            )
    for folder in found.folders:
        here = folder.level == "run" and folder.path == layout.run(folder.run_id)
        lost = here and not layout.unsealed(folder.run_id).is_dir()
        if lost and (folder.run_id == SCHEMA_RUN or not layout.sealed(folder.run_id).is_dir()):
            missing = f"is missing; `moewh refresh {layout.option}` recreates it"
            found.faults.append(Fault(layout.unsealed(folder.run_id), "", missing))


def _list_segments(run: Path, run_id: str, found: CommittedPlan) -> None:
    for path in own_entries(run):
        if path.is_dir() and is_segment_folder(path.name):
            found.folders.append(Folder(path, "segment", run_id, int(path.name.removeprefix(SEGMENT_FOLDER))))
        else:
            found.faults.append(_no_folder(path, "is not the folder of a segment"))


def _lost_link(path: Path) -> str | None:
    """Return the fault of a link whose target is not a folder; None for anything else."""
    if not path.is_symlink() or path.is_dir():
        return None
    return f"is a link to {real_path(path)}, which is not a folder: mount that disk, or remove the link"


def _no_folder(path: Path, why: str) -> Fault:
    """Return the fault of an entry that should be a folder; moewh reads links with the name of one of its folders."""
    lost = _lost_link(path) if path.name.startswith((RUN_FOLDER, SEGMENT_FOLDER)) else None
    return Fault(path, "", lost or why, movable=lost is None)


def _take_manifest(folder: Folder, faults: list[Fault]) -> None:
    """Read a folder's manifest and compare its file names with the existing and the required files."""
    try:
        folder.manifest = read_manifest(folder.path)
    except FileNotFoundError:
        faults.append(Fault(folder.path, MANIFEST, "is missing"))
        return
    except (ManifestError, OSError) as error:
        faults.append(_unread(folder.path, MANIFEST, error))
        return
    there = {path.name for path in folder.path.iterdir() if path.is_file()}
    marks = {path.name for path in folder.path.glob(MARK)} if folder.level == "sealed" else set()
    if folder.level == "sealed" and len(marks) != 1:
        faults.append(Fault(folder.path, "", f"has {len(marks)} marks, not 1"))
    listed = folder.manifest.files
    tables = {table.file: table for table in _tables(folder.level)}
    needed = {
        name
        for name, table in tables.items()
        if table.since <= folder.manifest.schema
        and (not table.opt_in or folder.run_id == SCHEMA_RUN or table.counted in listed)
    }
    faults += [Fault(folder.path, name, "is missing") for name in sorted((listed.keys() | needed) - there)]
    known = {MANIFEST} | marks | (listed.keys() & tables.keys())
    for path in own_entries(folder.path):
        if path.name not in known:  # one that the manifest lists is the folder's fault
            folder_of_fault, name = (folder.path, path.name) if path.name in listed else (path, "")
            faults.append(Fault(folder_of_fault, name, "is not a file of this folder"))
    folder.files = {name: entry for name, entry in listed.items() if name in there & tables.keys()}


# ------------------------------------------------------------------------------------------ files


def _tables(level: schema.Level) -> list[schema.Table]:
    return [table for table in (*schema.TABLES, *schema.SEALED) if table.level == level]


def _file_fault(item: tuple[Folder, str, Entry]) -> Fault | None:
    """Return the fault of one file, or None."""
    import pyarrow as pa

    folder, name, _ = item
    try:
        why = _difference(item)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        return _unread(folder.path, name, error)
    return Fault(folder.path, name, why) if why else None


def _difference(item: tuple[Folder, str, Entry]) -> str | None:
    """Return how a file differs from its manifest, or None; a file with the wrong sha256 is not parsed."""
    import pyarrow.parquet as pq

    folder, name, entry = item
    path = folder.path / name
    table = next(table for table in _tables(folder.level) if table.file == name)
    version = folder.manifest.schema if folder.manifest is not None else None
    if (size := path.stat().st_size) != entry.bytes:
        return f"has {size:,} bytes, not {entry.bytes:,}"
    if file_sha256(path) != entry.sha256:
        return "does not match its sha256"
    with pq.ParquetFile(path) as file:
        metadata, columns = file.metadata, file.schema_arrow
    if metadata.num_rows != entry.rows:
        return f"has {metadata.num_rows:,} rows, not {entry.rows:,}"
    return _schema_difference(columns, table.arrow(version))


def _schema_difference(real: pa.Schema, wanted: pa.Schema) -> str | None:
    """Return the first difference from the table's columns; only names and types count, not a writer's metadata."""
    if real.names != wanted.names:
        return f"has the columns {', '.join(real.names)}, not {', '.join(wanted.names)}"
    for has, wants in zip(real, wanted, strict=True):
        if not has.type.equals(wants.type):
            return f"has {has.type} in {has.name}, not {wants.type}"
    return None


def _unread(folder: Path, name: str, error: Exception) -> Fault:
    """Return the fault of a file that could not be read; without permission, it may be intact, and stays."""
    if isinstance(error, PermissionError):
        return Fault(folder, name, f"{_message(error)}; its owner can allow it with `chmod -R a+rX`", movable=False)
    return Fault(folder, name, _message(error))


def _message(error: Exception) -> str:
    """Return an error in one line, without the path, which the fault already names."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split()).removeprefix("Parquet ")


# ------------------------------------------------------------------------------------------ belonging


def _check_belonging(folders: list[Folder]) -> Iterator[Fault]:
    """Find folders that are intact but in the wrong place or inconsistent: swapped, foreign, or with wrong counts."""
    runs = {folder.run_id: folder for folder in folders if folder.level == "run"}
    rows = {run_id: folder.row for run_id, folder in runs.items() if run_id != SCHEMA_RUN}
    lengths = {run_id: row["segments_planned"] or _up_to_last(run_id, folders) for run_id, row in rows.items()}
    for folder in folders:
        run = rows.get(folder.run_id)
        if run is None or folder.manifest is None:
            continue
        if folder.manifest.identity != run["identity"] or folder.manifest.segment != folder.number:
            yield Fault(folder.path, MANIFEST, "belongs to another folder")
        elif folder.level == "run":
            if hashlib.sha256(run["options"].encode()).hexdigest() != run["identity"]:
                yield Fault(folder.path, schema.RUNS.file, "has options that do not match its identity")
        elif folder.level == "segment":
            yield from _check_counts(folder, folder.number or 0, lengths[folder.run_id])
        elif folder.level == "sealed":
            yield from _check_sealed(
                folder, [one for one in folders if one.run_id == folder.run_id and one.number is not None]
            )
        else:
            yield from _check_experts(folder, runs[folder.run_id])


def _up_to_last(run_id: str, folders: list[Folder]) -> int | None:
    """Return the number of segments of a run without a plan, up to the first marked as last; None if none is marked."""
    segments = [folder for folder in folders if folder.level == "segment" and folder.run_id == run_id]
    last = [folder.number or 0 for folder in segments if folder.row["last"]]
    return min(last) + 1 if last else None


def _check_counts(folder: Folder, number: int, planned: int | None) -> Iterator[Fault]:
    """Find contradictions between a segment's files about its totals and its position in the run.

    `planned` is the run's number of segments; None if it is not yet known.
    """
    row = folder.row
    if planned is None:
        pass
    elif number >= planned:
        yield Fault(folder.path, "", f"is beyond the run's {planned} segments")
    elif row["last"] != (number == planned - 1):
        yield Fault(folder.path, schema.SEGMENTS.file, f"is wrong about being the last of {planned} segments")
    expected = [(name, table.file, folder.files[table.file].rows) for name, table in _COUNTED.items()]
    if (outputs := folder.files.get(schema.EXPERT_OUTPUTS.file)) is not None:
        expected.append(("routing_rows", schema.EXPERT_OUTPUTS.file, outputs.rows))
    if row["tokens"]:  # a run that was imported as counts only has a load and no rows
        expected += [("routing_rows", schema.EXPERT_COUNTS.file, folder.total(schema.EXPERT_COUNTS, "tokens"))]
    entries_known = not _unknown(folder.path, schema.TOKENS, "vocab_id")
    if entries_known:
        expected += [("routing_rows", schema.AFFINITY_COUNTS.file, folder.total(schema.AFFINITY_COUNTS, "tokens"))]
    for name, file, count in expected:
        if row[name] != count:
            yield Fault(folder.path, file, f"has {count:,} {name}, but {schema.SEGMENTS.file} says {row[name]:,}")
    if not entries_known or _unknown(folder.path, schema.EXPERT_COUNTS, "first_choice_tokens"):
        return
    first_choices = folder.total(schema.EXPERT_COUNTS, "first_choice_tokens")
    if (tokens := folder.total(schema.VOCAB_COUNTS, "tokens")) != first_choices:
        why = f"has {tokens:,} tokens, but {schema.EXPERT_COUNTS.file} has {first_choices:,} first choices"
        yield Fault(folder.path, schema.VOCAB_COUNTS.file, why)


def _check_sealed(folder: Folder, segments: list[Folder]) -> Iterator[Fault]:
    """Find differences between a sealed set and the run's segments: in their numbers, rows or totals.

    A bad segment has its own fault and is not counted here.
    """
    from moewh.warehouse.files.tables import read_rows

    merged = read_rows(folder.path / schema.SEGMENTS.file).to_pylist()
    numbers = {row["segment"] for row in merged}
    run_segments = folder.path.parents[1] / "segments" / folder.path.name
    if gone := sorted(number for number in numbers if not (run_segments / f"{SEGMENT_FOLDER}{number}").is_dir()):
        yield Fault(folder.path, schema.SEGMENTS.file, f"has segment {gone[0]}, which does not exist")
    if missing := sorted({one.number for one in segments if one.number is not None} - numbers):
        yield Fault(folder.path, schema.SEGMENTS.file, f"lacks segment {missing[0]}, which exists")
    for one in segments:
        there = [row for row in merged if row["segment"] == one.number]
        if there and {**one.row, "segment": one.number} != there[0]:
            yield Fault(folder.path, schema.SEGMENTS.file, f"differs from the file of segment {one.number}")
    if {one.number for one in segments} != numbers:
        return
    yield from _check_sealed_outputs(folder, segments)
    for table in (schema.EXPERT_COUNTS, schema.AFFINITY_COUNTS):  # each counts a routing row at most once
        count, rows = folder.total(table, "tokens"), sum(one.total(table, "tokens") for one in segments)
        if count != rows:
            yield Fault(folder.path, table.file, f"has {count:,} routing_rows, but the run's segments have {rows:,}")


def _check_sealed_outputs(folder: Folder, segments: list[Folder]) -> Iterator[Fault]:
    """Find differences between the opt-in counts of a sealed set and those of its segments."""
    table = schema.EXPERT_OUTPUT_COUNTS
    holding = [one for one in segments if table.file in one.files]
    if bool(holding) != (table.file in folder.files):
        yield Fault(folder.path, table.file, "is missing" if holding else "counts rows that no segment of the run has")
    elif holding:
        count, rows = folder.total(table, "choices"), sum(one.total(table, "choices") for one in holding)
        if count != rows:
            yield Fault(folder.path, table.file, f"has {count:,} choices, but the run's segments have {rows:,}")


def _check_experts(folder: Folder, run: Folder) -> Iterator[Fault]:
    """Find a geometry whose number of experts differs from its run's."""
    measured, known = (
        home.files[table.file].rows for home, table in ((folder, schema.EXPERT_GEOMETRY), (run, schema.EXPERTS))
    )
    if measured != known:
        why = f"has {measured:,} experts, but {schema.EXPERTS.file} of the run has {known:,}"
        yield Fault(folder.path, schema.EXPERT_GEOMETRY.file, why)


def _unknown(folder: Path, table: schema.Table, column: str) -> int:
    """Return how many rows of a column are NULL, from the statistics of its file."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder / table.file) as file:
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        index = file.schema_arrow.get_field_index(column)
    return sum(group.column(index).statistics.null_count for group in groups if group.num_rows)
