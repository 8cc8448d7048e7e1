"""The runs of a warehouse: list them as rows, or delete one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.answer.query import Answer
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.commit import locked, move_away
from moewh.warehouse.files.folders import real_path
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import RUN_FOLDER, SCHEMA_RUN, SEGMENT_FOLDER
from moewh.warehouse.sealing.seal import kept_unsealed
from moewh.warehouse.views.publishing import publish

if TYPE_CHECKING:
    import duckdb

LIST_SQL = """
select
    run_id,
    status,
    segments || '/' || coalesce(
        segments_planned::varchar,
        case when status = 'complete' then segments::varchar end,
        '?'
    ) as segments,
    model,
    revision,
    created_at,
    train_step,
    prompts,
    tokens
from runs
order by created_at, run_id
"""
"""A narrow terminal leaves out the columns in the middle."""


def list_runs(connection: duckdb.DuckDBPyConnection) -> Answer:
    """Return one row per run, oldest first."""
    return Answer(connection, LIST_SQL, {})


def run_ids(layout: Layout) -> list[str]:
    """Return the ids of all runs that have a folder, in order."""
    examples = (layout.run("x"), layout.segments("x"), layout.geometry("x"), layout.sealed("x"), layout.unsealed("x"))
    folders = [folder for example in examples for folder in example.parent.glob(f"{RUN_FOLDER}*")]
    return sorted({folder.name.removeprefix(RUN_FOLDER) for folder in folders} - {SCHEMA_RUN})


def check_known(layout: Layout, run_id: str) -> None:
    """Raise MoewhError, listing the existing runs, if `run_id` is not one of them."""
    known = run_ids(layout)
    if run_id not in known:
        raise MoewhError(f"there is no run {run_id!r} in {layout.root}. Runs: {', '.join(known) or 'none'}.")


def delete_run(layout: Layout, run_id: str) -> list[Path]:
    """Delete a run, its segments and its geometry. Return the targets of the links among its folders.

    The run is unsealed; then one rename moves all its segments away, then the geometry, then the run itself. A process
    killed on the way leaves the whole run, a run without segments (which ingest fills again, or a second delete
    removes), or no run. The files are removed last, when no view can see them; where a folder is a link, only the link
    is removed. A command that writes to the run waits for the renames, and then finds it gone. `warehouse.duckdb` is
    rewritten. Raises MoewhError for an unknown run.
    """
    check_known(layout, run_id)
    layout.require_one_disk()
    folders = (layout.segments(run_id), layout.geometry(run_id), layout.run(run_id))
    links = (link for folder in folders for link in (folder, *folder.glob(f"{SEGMENT_FOLDER}*")) if link.is_symlink())
    kept = [real_path(link) for link in links]
    with layout.writing(), layout.staged("deleted") as folder:
        with kept_unsealed(layout, run_id), locked(layout.runs):
            for name, source in zip(("segments", "geometry", "run"), folders, strict=True):
                move_away(source, folder / name)
            layout.unlink_unsealed(run_id)
        move_away(layout.template_times(run_id), folder / "template_time")
    layout.sweep()
    publish(layout)
    return kept
