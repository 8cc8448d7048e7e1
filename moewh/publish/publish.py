"""Publish runs: send what a target lacks, and then the files that make it visible to readers.

    zero-row files → views, card, listing → each run: its folders → views, card, listing

A reader uses the listing (`moewh.warehouse.files.listing`), or the views in `warehouse.duckdb`, which list every file.
Each of the two is replaced in one step, so readers see only whole runs. A published run with other files is first
removed from both. If it is killed anywhere, the same command resumes it. What a command chose (runs without text, the
licence, the URL) is written before the files of runs, so a shorter command that resumes it does not undo that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from moewh.publish.card import card, license_of
from moewh.publish.pieces import Piece, complete_runs, run_pieces, zero_rows
from moewh.publish.target import CARD, Target
from moewh.publish.withhold import without_text as withhold
from moewh.warehouse import __version__
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.folders import is_left_by_others
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.listing import Listed, Listing, ListingError, listing_text, parse_listing, run_of
from moewh.warehouse.files.names import DATABASE, FOLDERS, LISTING, RUN_FOLDER, SCHEMA_RUN
from moewh.warehouse.remote.place import Folder
from moewh.warehouse.remote.published import Published
from moewh.warehouse.runs import check_known, run_ids
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.trust import verify
from moewh.warehouse.views.publishing import build


@dataclass(frozen=True)
class PublishOptions:
    """What to publish, and how."""

    runs: tuple[str, ...] = ()
    """Empty: every complete run."""
    without_text: bool | None = None
    """For every run; None: for those that were published so before."""
    license: str | None = None
    """In the Hub's spelling, such as cc-by-4.0; None: the one that the target's card names, if it has one."""


@dataclass
class Summary:
    """What was done."""

    published: list[str] = field(default_factory=list)
    """The requested runs, which are now published."""
    left_out: list[str] = field(default_factory=list)
    """Runs that are not complete."""
    sent_files: int = 0
    sent_bytes: int = 0
    changed: bool = False
    """Whether readers see anything new."""


def publish(
    layout: Layout, target: Target, options: PublishOptions, report: Callable[[str], None] = lambda _: None
) -> Summary:
    """Send runs to a target and return what was done; `report` is called with a line per run.

    Raises MoewhError for a run that is unknown, incomplete or damaged, and when a target refuses.
    """
    layout.require()
    for run_id in options.runs:
        check_known(layout, run_id)
    complete, others = complete_runs(layout, list(dict.fromkeys(options.runs)) or run_ids(layout))
    if options.runs and others:
        raise MoewhError(f"run {others[0]} is not complete. Run its ingest again, or leave it out.")
    if not complete:
        raise MoewhError(f"{layout.root} has no complete run. There is nothing to publish.")
    summary = Summary(complete, others)
    layout.create()  # adds zero-row files of tables newer than the warehouse
    for run_id in complete:
        seal(layout, run_id)
    planned = verify.plan(layout)
    before = listing_at(target)
    licensed = _license_at(target)
    without_text = _without_text(options, complete, before)
    license = options.license or licensed
    target.missing([])  # refuses a place with files of others before anything there changes
    empty, files = zero_rows(layout), dict[str, Listed]()
    listed = before or Listing(_send_missing(target, empty, summary), __version__, target.place.root)
    chosen = _with_choices(listed, target, without_text)
    if before is None or chosen != before or license != licensed:
        _write_root_files(target, chosen, license)
        summary.changed = True
    for run_id in complete:
        withheld = run_id in without_text
        with _pieces(layout, run_pieces(layout, planned, run_id), run_id, withheld) as pieces:
            sent = summary.sent_files
            of_run = _send_run(target, run_id, pieces, license, summary)
            size = sum(listed.bytes for listed in of_run.values())
            report(
                f"run {run_id}{' without its text' * withheld}: {len(of_run):,} files, {size / 1e6:,.1f} MB, "
                f"{summary.sent_files - sent:,} sent"
            )
            files |= of_run
    now = listing_at(target)
    listing = _merged_listing(now, files | _send_missing(target, empty, summary), target, without_text)
    if now is None or listing != now or not _has_root_files(target, now):
        _write_root_files(target, listing, license)
        summary.changed = True
    if stale := _stale(target, listing, {SCHEMA_RUN, *complete}):
        target.remove(stale)
    return summary


def listing_at(target: Target) -> Listing | None:
    """Return the listing at a target; None if nothing is published there. Raises MoewhError for a bad one."""
    try:
        return parse_listing(target.place.read(LISTING))
    except FileNotFoundError:
        return None
    except ListingError as error:
        raise MoewhError(
            f"{target.place.root}/{LISTING} {str(error).rstrip('.')}. Publish to another place."
        ) from error


def _without_text(options: PublishOptions, run_ids: list[str], before: Listing | None) -> list[str]:
    """Return the runs to publish without their text: what was withheld once is not sent by a shorter command."""
    if options.without_text is not None:
        return run_ids if options.without_text else []
    return [] if before is None else [run_id for run_id in run_ids if run_id in before.without_text]


def _with_choices(listing: Listing, target: Target, without_text: list[str]) -> Listing:
    """Return a listing that records what a command chose before it sends runs, so that a kill does not undo it.

    Runs whose text is taken back are not listed: their files are still those with text.
    """
    taken_back = set(without_text) - set(listing.without_text)
    all_without_text = tuple(sorted({*listing.without_text, *without_text}))
    return replace(listing.without(taken_back), root=target.place.root, without_text=all_without_text)


def _merged_listing(now: Listing | None, files: dict[str, Listed], target: Target, without_text: list[str]) -> Listing:
    """Return a listing of the runs in `files` and of all other runs that are published now."""
    others = (now or Listing({}, __version__, target.place.root)).without({run_of(path) for path in files})
    all_without_text = tuple(sorted([*others.without_text, *without_text]))
    return Listing({**others.files, **files}, __version__, target.place.root, without_text=all_without_text)


@contextmanager
def _pieces(layout: Layout, pieces: list[Piece], run_id: str, withheld: bool) -> Iterator[list[Piece]]:
    """Yield the pieces of a run, or of a copy without text, which is removed at the end."""
    if not withheld:
        yield pieces
        return
    with layout.staged(f"publish.{run_id}") as folder:
        yield withhold(layout, run_id, pieces, folder)


def _send_run(
    target: Target, run_id: str, pieces: list[Piece], license: str | None, summary: Summary
) -> dict[str, Listed]:
    """Send what a target lacks of a run; return the run's files. A run with other files is withdrawn first."""
    files = {path: listed for piece in pieces for path, listed in piece.listed().items()}
    now = listing_at(target)
    if now is not None and run_id in now.run_ids:
        there = {path: listed for path, listed in now.files.items() if run_of(path) == run_id}
        if there != files:
            withdrawn = replace(now.without({run_id}), without_text=now.without_text)  # not forgotten after a kill
            _write_root_files(target, withdrawn, license)
            summary.changed = True
    _send_missing(target, pieces, summary)
    return files


def _send_missing(target: Target, pieces: list[Piece], summary: Summary) -> dict[str, Listed]:
    """Send the pieces that a target lacks; return the files of all."""
    missing = target.missing(pieces)
    target.send(missing)
    summary.sent_files += sum(len(piece.files) for piece in missing)
    summary.sent_bytes += sum(piece.size for piece in missing)
    return {path: listed for piece in pieces for path, listed in piece.listed().items()}


def _stale(target: Target, listing: Listing, run_ids: set[str]) -> list[str]:
    """Return the files of runs that a target holds and does not list, without those that other programs leave anywhere.

    They belong to earlier runs of these names, whether or not the process that replaced them was killed.
    """
    folders = {
        (pattern.partition("/")[0], f"{RUN_FOLDER}{run_id}") for pattern in FOLDERS.values() for run_id in run_ids
    }
    return sorted(
        path
        for path in target.paths() - listing.files.keys()
        if tuple(path.split("/")[:2]) in folders and not is_left_by_others(path.rpartition("/")[2])
    )


def _license_at(target: Target) -> str | None:
    """Return the licence that the target's card names; None without a card or a licence."""
    try:
        return license_of(target.place.read(CARD).decode(errors="replace"))
    except FileNotFoundError:
        return None


def _has_root_files(target: Target, listing: Listing) -> bool:
    """Return whether a target has a card and the views of its listing: a killed process may have replaced these."""
    try:
        target.place.read(CARD)
        return hashlib.sha256(target.place.read(DATABASE)).hexdigest() == listing.views_sha256
    except FileNotFoundError:
        return False


def _write_root_files(target: Target, listing: Listing, license: str | None) -> None:
    """Rewrite the views, the card and the listing, the listing last."""
    place = target.place
    with TemporaryDirectory(prefix="moewh-") as scratch:
        build(Published(place, listing), Path(scratch) / DATABASE)
        views = (Path(scratch) / DATABASE).read_bytes()
    here = Folder(place.path) if isinstance(place, Folder) else place
    text = card(Published(here, listing), license).encode()
    listing = replace(listing, views_sha256=hashlib.sha256(views).hexdigest())
    target.finish({CARD: text, DATABASE: views, LISTING: listing_text(listing)})
