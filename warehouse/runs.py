"""The runs of a warehouse: listed as rows, or one of them deleted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.answer.query import Answer
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import SCHEMA_RUN, SEGMENT_FOLDER, Layout, make_folder, sync
from moewh.warehouse.sealing.seal import unseal
from moewh.warehouse.views.publishing import publish

if TYPE_CHECKING:
    import duckdb

LIST_SQL = """
select
    run_id,
    model,
    revision,
    train_step,
    status,
    segments || '/' || coalesce(
        segments_planned::varchar,
        case when status = 'complete' then segments::varchar end,
        '?'
    ) as segments,
    prompts,
    tokens,
    created_at
from runs
order by created_at, run_id
"""


def list_runs(connection: duckdb.DuckDBPyConnection) -> Answer:
    """Return the answer with one row per run, oldest first."""
    return Answer(connection, LIST_SQL, {})


def run_ids(layout: Layout) -> list[str]:
    """Return the ids of all runs that have a folder, in order."""
    examples = (layout.run("x"), layout.segments("x"), layout.geometry("x"), layout.sealed("x"), layout.unsealed("x"))
    folders = [folder for example in examples for folder in example.parent.glob("run_id=*")]
    return sorted({folder.name.removeprefix("run_id=") for folder in folders} - {SCHEMA_RUN})


def check_known(layout: Layout, run_id: str) -> None:
    """Raise MoewhError, listing the runs there are, unless `run_id` is one."""
    known = run_ids(layout)
    if run_id not in known:
        raise MoewhError(f"there is no run {run_id!r} in {layout.root}. Runs: {', '.join(known) or 'none'}.")


def delete_run(layout: Layout, run_id: str) -> list[Path]:
    """Delete a run, its segments and its geometry. Return where links among its folders led.

    It is unsealed; then all its segments leave in one rename, then the geometry, then the run itself. What a kill
    leaves is the whole run, a run without segments (which ingest fills again, or a second delete removes), or no run.
    Files are removed after that, out of every view's sight; of a folder that is a link, the link alone is.
    `warehouse.duckdb` is written again. Raises MoewhError for an unknown run.
    """
    check_known(layout, run_id)
    layout.require_one_disk()
    folders = (layout.segments(run_id), layout.geometry(run_id), layout.run(run_id))
    links = (link for folder in folders for link in (folder, *folder.glob(f"{SEGMENT_FOLDER}*")) if link.is_symlink())
    kept = [link.resolve() for link in links]
    unseal(layout, run_id)
    with layout.staged("deleted") as folder:
        for name, source in zip(("segments", "geometry", "run"), folders, strict=True):
            _take_out(source, folder / name)
        layout.unlink_unsealed(run_id)
        _take_out(layout.template_times(run_id), folder / "template_time")
    layout.sweep()
    publish(layout)
    return kept


def _take_out(folder: Path, target: Path) -> None:
    if folder.is_dir():
        make_folder(target.parent)
        folder.rename(target)
        sync(folder.parent)
