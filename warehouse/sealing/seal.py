"""Sealing: merging the counts of a complete run over its segments into one set, which queries read instead.

In: a run with every segment committed. Out: `sealed/run_id=<run>/`, with one file per table of counts, one with the
rows of `segments` and one per table of totals, in key order, committed by one rename. Then the run's link in
`unsealed/` is removed, and views no longer read the segments' own counts. Those stay on disk: unsealing the run
restores the link, and `moewh verify` compares the merged counts with them.

Any operation that removes or restores a segment of a sealed run unseals it first. A process killed between any two
steps leaves a run that is either sealed or not (see `moewh.warehouse.views.merged`).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from moewh.warehouse.files import schema
from moewh.warehouse.files.commit import add_mark, locked, make_folder, move_away, sync
from moewh.warehouse.files.layout import Layout, deleted
from moewh.warehouse.files.names import MARK, RUN_FOLDER, SCHEMA_RUN, SEGMENT_FOLDER, run_of_folder

PAUSE = 0.25
"""Seconds that a run stays in both places: DuckDB lists files while it plans a query, and skips those that are gone."""


def seal(layout: Layout, run_id: str) -> bool:
    """Seal a run if it is complete; return whether it is sealed now.

    Raises MoewhError if the disk cannot be written.
    """
    if not is_complete(layout, run_id):
        return False
    with layout.writing(), locked(layout.segments(run_id)) as there:
        if not there or not is_complete(layout, run_id):  # deleted, or a segment removed, meanwhile
            return False
        if not layout.sealed(run_id).is_dir():
            _commit_merged(layout, run_id)
            time.sleep(PAUSE)
        layout.unlink_unsealed(run_id)
        layout.sweep()  # remove what a process killed here left
    return True


def unseal(layout: Layout, run_id: str) -> None:
    """Let views read a run's segments one by one again.

    Raises MoewhError if the disk cannot be written.
    """
    with kept_unsealed(layout, run_id):
        pass


@contextmanager
def kept_unsealed(layout: Layout, run_id: str) -> Iterator[None]:
    """Unseal a run, and let no other process seal it during the block, which may remove segments.

    Raises MoewhError if the disk cannot be written.
    """
    with layout.writing():
        if layout.sealed(run_id).is_dir():
            make_folder(layout.segments(run_id))
        with locked(layout.segments(run_id)):
            if layout.sealed(run_id).is_dir():
                layout.link_unsealed(run_id)
                time.sleep(PAUSE)
                with layout.staged(f"unsealed.{run_id}") as folder:
                    move_away(layout.sealed(run_id), folder / "gone")
            yield


def is_complete(layout: Layout, run_id: str) -> bool:
    """Return whether every segment of a run is committed: 0, 1, … up to the one marked as last."""
    from moewh.warehouse.files.tables import read_rows

    numbers = segment_numbers(layout, run_id)
    if not layout.run(run_id).is_dir() or not numbers or numbers != list(range(len(numbers))):
        return False
    try:
        last = read_rows(layout.segment(run_id, numbers[-1]) / schema.SEGMENTS.file, ["last"])
    except FileNotFoundError:  # removed just now
        return False
    return bool(last["last"][0].as_py())


def segment_numbers(layout: Layout, run_id: str) -> list[int]:
    """Return the numbers of a run's committed segments, in order."""
    names = (path.name.removeprefix(SEGMENT_FOLDER) for path in layout.segments(run_id).glob(f"{SEGMENT_FOLDER}*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def require_readable(layout: Layout) -> None:
    """Let views read every run's counts again after a copy that lost links, or the marks, which are empty files."""
    for run in sorted(layout.runs.glob(f"{RUN_FOLDER}*")):
        run_id = run_of_folder(run.name)
        if run_id is None or run_id == SCHEMA_RUN:
            continue
        if not layout.sealed(run_id).is_dir():
            layout.link_unsealed(run_id)
        elif not any(layout.sealed(run_id).glob(MARK)):
            with layout.writing():
                add_mark(layout.sealed(run_id))
                sync(layout.sealed(run_id))


def _commit_merged(layout: Layout, run_id: str) -> None:
    from moewh.warehouse.files.manifest import write_manifest
    from moewh.warehouse.files.tables import run_row
    from moewh.warehouse.sealing.merge import write_sealed

    row = run_row(layout.run(run_id), ["identity"])
    if row is None:
        raise deleted(run_id)
    with layout.staged(f"sealed.{run_id}") as folder:
        segments = [layout.segment(run_id, number) for number in segment_numbers(layout, run_id)]
        write_sealed(layout.run(run_id), segments, folder)
        write_manifest(folder, row["identity"], None)
        add_mark(folder)
        layout.commit_of_run(run_id, folder, layout.sealed(run_id))
