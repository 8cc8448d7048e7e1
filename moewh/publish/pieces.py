"""The published parts of a run: its committed folders, each whole, with the sha256 of every file.

In: a local warehouse and a sealed run. Out: `Piece`s, the run's segments before its counts and its own folder, in the
order in which `moewh ingest` commits them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.listing import PUBLISHED_MARK, Listed
from moewh.warehouse.files.manifest import MANIFEST, file_sha256, read_manifest
from moewh.warehouse.files.names import MARK, SCHEMA_RUN
from moewh.warehouse.sealing.seal import is_complete, segment_numbers
from moewh.warehouse.trust import verify
from moewh.warehouse.trust.repair import run_of

NO_BYTES = Listed(0, hashlib.sha256().hexdigest())


@dataclass(frozen=True)
class Piece:
    """A folder that is sent whole."""

    path: str
    """Its path below the root, both in the local warehouse and in the published one."""
    folder: Path
    files: dict[str, Listed]
    """Its files by name, in the order in which they are sent: the manifest after all files in it."""

    @property
    def size(self) -> int:
        """The total size of its files."""
        return sum(listed.bytes for listed in self.files.values())

    def data(self, name: str) -> Path | bytes:
        """Return a file's content: the local file, or no bytes for a mark, whose local name differs."""
        return b"" if name == PUBLISHED_MARK else self.folder / name

    def listed(self) -> dict[str, Listed]:
        """Return its files by their paths below the root."""
        return {f"{self.path}/{name}": listed for name, listed in self.files.items()}


def zero_rows(layout: Layout) -> list[Piece]:
    """Return the zero-row files of every table, with which every view works."""
    levels = (
        layout.segment(SCHEMA_RUN, 0),
        layout.sealed(SCHEMA_RUN),
        layout.geometry(SCHEMA_RUN),
        layout.run(SCHEMA_RUN),
    )
    return [piece_of(layout, folder) for folder in levels]


def run_pieces(layout: Layout, planned: verify.CommittedPlan, run_id: str) -> list[Piece]:
    """Return the pieces to publish of a sealed run. Raises MoewhError unless every file is as committed.

    `planned` lists the files that `moewh verify` would read.
    """
    _require_sound(layout, planned, run_id)
    folders = [layout.segment(run_id, number) for number in segment_numbers(layout, run_id)]
    folders += [layout.sealed(run_id), layout.geometry(run_id), layout.run(run_id)]
    return [piece_of(layout, folder) for folder in folders if folder.is_dir()]


def complete_runs(layout: Layout, run_ids: list[str]) -> tuple[list[str], list[str]]:
    """Return the complete runs, and the others."""
    complete = [run_id for run_id in run_ids if is_complete(layout, run_id)]
    return complete, [run_id for run_id in run_ids if run_id not in complete]


def piece_of(layout: Layout, folder: Path) -> Piece:
    """Return a committed folder as a piece."""
    files = {name: Listed(entry.bytes, entry.sha256) for name, entry in read_manifest(folder).files.items()}
    marks = {PUBLISHED_MARK: NO_BYTES} if any(folder.glob(MARK)) else {}
    manifest = Listed((folder / MANIFEST).stat().st_size, file_sha256(folder / MANIFEST))
    return Piece(folder.relative_to(layout.root).as_posix(), folder, {**marks, **files, MANIFEST: manifest})


def _require_sound(layout: Layout, planned: verify.CommittedPlan, run_id: str) -> None:
    """Raise MoewhError for the first bad file of a run."""
    of_run = verify.CommittedPlan(
        [folder for folder in planned.folders if folder.run_id == run_id],
        [fault for fault in planned.faults if run_of(layout, fault.folder) == run_id],
    )
    if faults := verify.check(of_run):
        raise MoewhError(
            f"run {run_id} is damaged and was not published: {faults[0].path} {faults[0].why}. "
            "See `moewh verify --repair`."
        )
