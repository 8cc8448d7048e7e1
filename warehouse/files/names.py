"""The names of a warehouse's folders and files, the patterns that match them, and which names are legal."""

from __future__ import annotations

import re
from pathlib import Path

from moewh.warehouse.errors import UsageError
from moewh.warehouse.files import schema

SCHEMA_RUN = "~schema"
"""The run_id of the zero-row files, with which every view can answer before the first ingest.

It sorts after every legal run_id: DuckDB estimates sizes from the first file when it plans a join, so an empty first
file would make it build hash tables on the larger side.
"""
ANY_RUN = "run_id=[A-Za-z0-9~]*"
ANY_SEGMENT = "segment=[0-9]*"
"""Patterns of the folders of runs and of segments. They also match the names in STRAYS."""
STRAYS = {
    ANY_RUN: ("run_id=*[!-A-Za-z0-9._]*",),
    ANY_SEGMENT: ("segment=*[!0-9]*", "segment=0?*", "segment=??????????*"),
}
"""Patterns of the names that are not a run's or a segment's. SCHEMA_RUN matches one of them, but is legal.

The hyphen comes first: DuckDB 1.5 takes it for a range at the end of a class.
"""
FOLDERS: dict[schema.Level, str] = {
    "run": f"runs/{ANY_RUN}",
    "segment": f"segments/{ANY_RUN}/{ANY_SEGMENT}",
    "geometry": f"geometry/{ANY_RUN}",
    "sealed": f"sealed/{ANY_RUN}",
}
"""The folders that hold the files of each level's tables, as patterns below the root."""
UNSEALED = f"unsealed/{ANY_RUN}"
"""The folders of the runs that are not sealed: each holds a mark and UNSEALED_LINK, a link to the run's segments.

Views read the counts of segments only through these links, so that no query lists the segments of a sealed run.
"""
UNSEALED_LINK = "segments"
THROUGH_UNSEALED = f"/unsealed/run_id=([^/]*)/{UNSEALED_LINK}/"
"""The part of a path to a segment through its run's link, as a regular expression with the run as its group."""
OWN_SEGMENTS = r"/segments/run_id=\1/"
"""Replaces THROUGH_UNSEALED in a path, in Python and in SQL, to give the path of the segment itself."""
MARK = "mark-*"
"""An empty file in every sealed or unsealed folder, with a new name each time the folder is made.

It lets a query notice that a run was unsealed and sealed again while its files were listed.
"""
RUN_FOLDER = "run_id="
"""Prefix of the name of a run's folders, before its run_id."""
SEGMENT_FOLDER = "segment="
"""Prefix of a segment folder's name, before its number."""
PATH_VALUES = {"run_id": f"[A-Za-z0-9][A-Za-z0-9._-]*|{SCHEMA_RUN}", "segment": "0|[1-9][0-9]{0,8}"}
"""Legal values of the path columns, as regular expressions: a path with any other value is a copy or a stray.

Unlike `check_run_id`, the expression for run_id has no limit of 64 characters: a bounded repetition compiles to that
many copies. STRAYS says the same in patterns, which DuckDB checks faster for each of thousands of files.
"""
DATABASE = "warehouse.duckdb"
"""Name of the file that a plain DuckDB shell opens."""
LISTING = "published.json"
"""Name of the file that makes a folder a published warehouse (see `moewh.warehouse.files.listing`)."""
STAGING = ".staging"
"""Name of the folder for work in flight and caches."""
QUARANTINE = "quarantine"
"""Name of the folder for damaged segments that were taken out."""
PUBLISHED_NAMES = frozenset({*(pattern.partition("/")[0] for pattern in FOLDERS.values()), DATABASE, LISTING, STAGING})
"""The top-level names of a published warehouse, except its card."""
OWN_NAMES = PUBLISHED_NAMES | {UNSEALED.partition("/")[0], QUARANTINE}
"""The top-level names of everything that moewh itself keeps in a warehouse."""
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it is legal; otherwise raise UsageError."""
    if not isinstance(run_id, str) or not _RUN_ID.fullmatch(run_id):
        raise UsageError(
            f"run id {run_id!r} is not allowed. "
            "Use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit."
        )
    return run_id


def is_run_id(text: str) -> bool:
    """Return whether text is a legal run id."""
    return _RUN_ID.fullmatch(text) is not None


def is_segment_folder(name: str) -> bool:
    """Return whether a name is that of a segment's folder, unlike that of a copy such as `segment=0 (1)`."""
    return re.fullmatch(f"{SEGMENT_FOLDER}({PATH_VALUES['segment']})", name) is not None


def run_of_folder(name: str) -> str | None:
    """Return the run whose folders have this name, SCHEMA_RUN included; None for any other name, as of a copy."""
    run_id = name.removeprefix(RUN_FOLDER)
    return run_id if run_id != name and (is_run_id(run_id) or run_id == SCHEMA_RUN) else None


def run_id_characters(name: str) -> str:
    """Return a name with a hyphen in place of each character that a run id must not have."""
    return "".join(char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in name)


def own_paths(text: str) -> str:
    """Return a message with paths through `unsealed/` replaced by the paths of the files themselves."""
    return re.sub(THROUGH_UNSEALED, OWN_SEGMENTS, text)


def glob_literal(path: Path | str) -> str:
    """Return a glob pattern that matches only this path: `*`, `?` and `[` each become a class of one character."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in str(path))
