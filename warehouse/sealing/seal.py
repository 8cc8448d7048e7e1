"""Sealing: the counts of a complete run, merged over its segments into one set that every answer reads instead.

In: a run whose every segment is committed. Out: `sealed/run_id=<run>/`, one file for each table of counts and one with
the rows of all its segments, in key order, committed by one rename. After that the run's link in `unsealed/` goes, and
with it the segments' own counts out of every view's sight. They stay where they are: whoever unseals the run puts the
link back, and `moewh verify` holds the merged counts against them.

Whatever takes a segment of a sealed run away, or brings one back, unseals it first. A kill between any two steps
leaves a run that is sealed or one that is not (see `moewh.warehouse.views.base`).
"""

from __future__ import annotations

import time

from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import (
    SCHEMA_RUN,
    SEGMENT_FOLDER,
    Layout,
    add_mark,
    commit,
    exclusive,
    make_folder,
    sync,
)

PAUSE = 0.25
"""Seconds for which a run is in both places: DuckDB lists files while it plans a query, and leaves out what is gone."""


def seal(layout: Layout, run_id: str) -> bool:
    """Seal a complete run; return whether it is sealed now. One that is not complete is left alone.

    Raises MoewhError if the disk refuses.
    """
    if not is_complete(layout, run_id):
        return False
    with layout.writing(), exclusive(layout.segments(run_id)):
        if not layout.sealed(run_id).is_dir() and is_complete(layout, run_id):
            _commit_merged(layout, run_id)
            time.sleep(PAUSE)
        layout.unlink_unsealed(run_id)
        layout.sweep()  # what a kill in the middle of this left
    return True


def unseal(layout: Layout, run_id: str) -> None:
    """Have a run's segments counted one by one again, as before a segment is taken out of it.

    Raises MoewhError if the disk refuses.
    """
    if not layout.sealed(run_id).is_dir():
        return
    make_folder(layout.segments(run_id))
    with layout.writing(), exclusive(layout.segments(run_id)):
        layout.link_unsealed(run_id)
        time.sleep(PAUSE)
        with layout.staged(f"unsealed.{run_id}") as folder:
            layout.sealed(run_id).rename(folder / "gone")
            sync(layout.sealed(run_id).parent)


def is_complete(layout: Layout, run_id: str) -> bool:
    """Tell whether every segment of a run is there: those from 0 on, the last of which says that it is."""
    import pyarrow.parquet as pq

    numbers = segment_numbers(layout, run_id)
    if not layout.run(run_id).is_dir() or not numbers or numbers != list(range(len(numbers))):
        return False
    last = pq.read_table(layout.segment(run_id, numbers[-1]) / schema.SEGMENTS.file, partitioning=None)
    return bool(last["last"][0].as_py())


def segment_numbers(layout: Layout, run_id: str) -> list[int]:
    """Return the numbers of a run's segments that are there, in order."""
    names = (path.name.removeprefix(SEGMENT_FOLDER) for path in layout.segments(run_id).glob(f"{SEGMENT_FOLDER}*"))
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


def require_linked(layout: Layout) -> None:
    """Put every run that is not sealed within reach of the views again, as after a copy that lost links."""
    for run in sorted((layout.root / "runs").glob("run_id=*")):
        run_id = run.name.removeprefix("run_id=")
        if run_id == SCHEMA_RUN or not layout.sealed(run_id).is_dir():
            layout.link_unsealed(run_id)


def _commit_merged(layout: Layout, run_id: str) -> None:
    import pyarrow.parquet as pq

    from moewh.warehouse.files.manifest import write_manifest
    from moewh.warehouse.sealing.merge import write_merged

    identity = pq.read_table(layout.run(run_id) / schema.RUNS.file, partitioning=None)["identity"][0].as_py()
    with layout.staged(f"sealed.{run_id}") as folder:
        write_merged([layout.segment(run_id, number) for number in segment_numbers(layout, run_id)], folder)
        write_manifest(folder, identity, None)
        add_mark(folder)
        commit(folder, layout.sealed(run_id))
