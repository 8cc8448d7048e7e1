"""`moewh verify`: report the faults that `moewh.warehouse.trust` finds, as text or JSON and an exit code."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moewh.cli.options import readable_option
from moewh.warehouse.errors import escaped
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.listing import run_of
from moewh.warehouse.files.names import SCHEMA_RUN
from moewh.warehouse.remote.published import Readable, only_written

if TYPE_CHECKING:
    from moewh.warehouse.trust.published import PublishedPlan
    from moewh.warehouse.trust.verify import CommittedPlan, Fault


@dataclass(frozen=True)
class Reported:
    """A fault as reported."""

    run_id: str | None
    path: str
    """Relative to the warehouse."""
    why: str
    quarantined: str | None
    """Where the folder was moved; None if it stayed."""
    restore: str | None
    """The command that rewrites it."""


@click.command(short_help="Compare every file with what was committed; exit with 1 if any is bad.")
@click.option("--repair", is_flag=True, help="Move what is bad to quarantine/, so that ingest can rewrite it.")
@click.option("--rollups", is_flag=True, help="Also recount every rollup from the rows (slower).")
@click.option("--jobs", type=click.IntRange(min=1), metavar="N", help="Files to read at once.  [default: one per core]")
@click.option(
    "--format", "form", type=click.Choice(["text", "json"]), default="text", show_default=True, help="Report format."
)
@readable_option
def verify(*, warehouse: Readable, repair: bool, rollups: bool, jobs: int | None, form: str) -> None:
    """Read every file and compare it with its manifest: presence, size, sha256, columns and rows.

    In a published warehouse, every file is compared with published.json: presence, size and sha256.
    Each bad file is listed with the reason. The exit code is 1 if anything was bad, even if --repair moved it.
    Hidden files, which file managers and network disks leave, are not faults.
    Leftovers of dead processes in .staging/ are removed.
    """
    from moewh.warehouse.trust import repair as repairing
    from moewh.warehouse.trust.published import check_any, plan_any
    from moewh.warehouse.trust.reports import emit
    from moewh.warehouse.trust.verify import check_rollups

    if repair:
        only_written(warehouse)
    began = time.monotonic()
    planned = plan_any(warehouse)
    with _progress(planned.bytes) as done:
        faults = check_any(planned, jobs, done)
        if rollups and not faults:
            faults = check_rollups(warehouse)
    seconds = max(time.monotonic() - began, 1e-9)
    moved: dict[Path, Path] = {}
    if isinstance(warehouse, Layout):
        stay = {fault.folder for fault in faults if not fault.movable}
        bad = {fault.folder for fault in faults} - stay
        moved = repairing.quarantine(warehouse, bad) if repair and faults else {}
        warehouse.sweep()
    reported = [_reported(warehouse, fault, moved) for fault in faults]
    if form == "json":
        text = _json(planned, seconds, reported)
    else:
        movable = isinstance(warehouse, Layout) and not repair and any(fault.movable for fault in faults)
        text = _text(planned, seconds, reported, warehouse if movable else None)
    emit(f"{text}\n", sys.stdout)
    if faults:
        raise SystemExit(1)


def _reported(warehouse: Readable, fault: Fault, moved: dict[Path, Path]) -> Reported:
    from moewh.ingest.options import command_words
    from moewh.warehouse.trust import repair

    if not isinstance(warehouse, Layout):
        named = run_of(str(fault.path))
        return Reported(None if named == SCHEMA_RUN else named, str(fault.path), fault.why, None, None)
    run_id = repair.run_of(warehouse, fault.folder)
    went = moved.get(fault.folder)
    return Reported(
        run_id,
        str(fault.path.relative_to(warehouse.root)),
        fault.why,
        str(went.relative_to(warehouse.root)) if went else None,
        repair.remedy(warehouse, fault.folder, command_words) if fault.movable else None,
    )


def _json(planned: CommittedPlan | PublishedPlan, seconds: float, reported: list[Reported]) -> str:
    counts = {"runs": planned.runs, "segments": planned.segments, "files": planned.files, "bytes": planned.bytes}
    return json.dumps(
        {**counts, "seconds": round(seconds, 3), "faults": [asdict(fault) for fault in reported]}, indent=1
    )


def _text(
    planned: CommittedPlan | PublishedPlan, seconds: float, reported: list[Reported], movable: Readable | None
) -> str:
    """Return a line per fault, then what was moved, how to restore it, and a summary.

    Given the warehouse if some of what is bad can still be moved.
    """
    lines = [escaped(f"{fault.path}: {fault.why}") for fault in reported]
    folders = {fault.quarantined for fault in reported if fault.quarantined}
    lines += [f"moved to {folder}" for folder in sorted(folders)]
    commands = {fault.restore for fault in reported if fault.restore}
    if isinstance(movable, Layout):
        rewritten = "; then this writes it again:" if commands else "."
        lines.append(f"`moewh verify --repair {movable.option}` moves what is bad to quarantine/{rewritten}")
    elif commands:
        lines.append("this writes it again:")
    lines += [f"  {command}" for command in sorted(commands)]
    size = planned.bytes / 1e9
    found = f"{len(reported):,} fault{'s'[: len(reported) != 1]}" if reported else "all as committed"
    lines.append(
        f"{_many(planned.runs, 'run')}, {_many(planned.segments, 'segment')}, {_many(planned.files, 'file')}, "
        f"{size:,.2f} GB in {seconds:,.1f} s ({size / seconds:,.2f} GB/s): {found}"
    )
    return "\n".join(lines)


def _many(number: int, what: str) -> str:
    return f"{number:,} {what}{'s'[: number != 1]}"


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show the bytes read as a bar on a terminal, on stderr; elsewhere the summary is enough."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("verify", total=total)
        yield lambda size: bar.advance(task, size)
