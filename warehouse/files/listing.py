"""The listing of a published warehouse: every file that belongs to it, with its size and sha256, in `published.json`.

`moewh publish` writes it after the files it lists, in one step. Whoever reads through it therefore sees only whole
runs, does not need to list folders, and knows the size and sha256 of every file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.names import FOLDERS, PATH_VALUES, RUN_FOLDER, SCHEMA_RUN, SEGMENT_FOLDER

PUBLISHED_MARK = "mark-published"
"""The mark's name in every published folder that has one: a random name would make equal folders differ."""

_SHA256 = r"[0-9a-f]{64}"
_RUN = f"{RUN_FOLDER}({PATH_VALUES['run_id']})"
_FOLDERS = "|".join(
    (
        f"(?:runs|geometry|sealed)/{_RUN}",
        f"segments/{_RUN}/{SEGMENT_FOLDER}(?:{PATH_VALUES['segment']})",
    )
)
_PATH = rf"(?:{_FOLDERS})/(?:[a-z_]+\.parquet|{re.escape(schema.MANIFEST)}|{PUBLISHED_MARK})"


class ListingError(MoewhError):
    """A listing that moewh did not write, or that was damaged later."""


@dataclass(frozen=True)
class Listed:
    """A file's size and sha256 when it was published."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Listing:
    """The files of a published warehouse, by their paths below its root."""

    files: Mapping[str, Listed]
    moewh: str
    """Version of moewh that wrote the listing and the views beside it."""
    root: str
    """Path or URL where those views look for the files."""
    version: int = schema.SCHEMA_VERSION
    """Version of the schema that the files were written with."""
    without_text: tuple[str, ...] = field(default=())
    """Runs that were published without the text of their prompts, in order."""
    views_sha256: str | None = field(default=None, compare=False)
    """Of the `warehouse.duckdb` that was made for this listing: a process that is killed may leave another there."""

    @cached_property
    def run_ids(self) -> tuple[str, ...]:
        """The runs, in order."""
        return tuple(sorted({run_of(path) for path in self.files} - {SCHEMA_RUN}))

    @property
    def zero_rows(self) -> list[str]:
        """The paths of the zero-row files, one for every table that views read."""
        return [path for table in (*schema.TABLES, *schema.TOTALS) for path in self.files_of(table)[-1:]]

    def files_of(self, table: schema.Table) -> list[str]:
        """Return the paths of the files that a table's view reads, the zero-row file last (see `SCHEMA_RUN`).

        Every run is sealed, so for a table that sealing merges, these are the merged files.
        """
        table = schema.sealed(table) if table in schema.MERGED else table
        top, end = f"{FOLDERS[table.level].partition('/')[0]}/", f"/{table.file}"
        return sorted(path for path in self.files if path.startswith(top) and path.endswith(end))

    def without(self, run_ids: set[str]) -> Listing:
        """Return the listing of all other runs."""
        kept = {path: file for path, file in self.files.items() if run_of(path) not in run_ids}
        return Listing(
            kept, self.moewh, self.root, self.version, tuple(run for run in self.without_text if run not in run_ids)
        )


def run_of(path: str) -> str:
    """Return the run that a listed path belongs to."""
    return path.split("/")[1].removeprefix(RUN_FOLDER)


def listing_text(listing: Listing) -> bytes:
    """Return the bytes of a listing's file; equal listings give equal bytes."""
    content = {
        "format": schema.FORMAT_VERSION,
        "schema": listing.version,
        "moewh": listing.moewh,
        "root": listing.root,
        "without_text": list(listing.without_text),
        "views_sha256": listing.views_sha256,
        "files": {path: asdict(listing.files[path]) for path in sorted(listing.files)},
    }
    return f"{json.dumps(content, indent=0)}\n".encode()


def parse_listing(text: bytes) -> Listing:
    """Parse a listing's bytes. Raises ListingError for anything that moewh would not have written."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ListingError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ListingError("is not a JSON object")
    if refused := schema.refusal(content.get("format"), content.get("schema")):
        raise ListingError(refused)
    files, texts, runs = content.get("files"), (content.get("moewh"), content.get("root")), content.get("without_text")
    if not isinstance(files, dict) or not _is_texts(texts) or not _is_texts(runs):
        raise ListingError("lists no files")
    entries = {path: _listed(path, entry) for path, entry in files.items()}
    if (views := content.get("views_sha256")) is not None and not _is_sha256(views):
        raise ListingError("has no valid sha256 of warehouse.duckdb")
    without_text = tuple(content["without_text"])
    listing = Listing(entries, content["moewh"], content["root"], content["schema"], without_text, views)
    _require_whole(listing)
    return listing


def _listed(path: str, entry: object) -> Listed:
    right = (
        re.fullmatch(_PATH, path)
        and isinstance(entry, dict)
        and set(entry) == {"bytes", "sha256"}
        and type(entry["bytes"]) is int
        and entry["bytes"] >= 0
        and _is_sha256(entry["sha256"])
    )
    if not right:
        raise ListingError(f"has no valid entry for {path!r}")
    return Listed(**entry)  # type: ignore[arg-type] # checked above


def _require_whole(listing: Listing) -> None:
    """Raise ListingError for a table without a file, or a run without its own files or its sealed counts.

    Opt-in counts are required only for runs that have the rows they count.
    """
    for table in (table for table in (*schema.TABLES, *schema.TOTALS) if table.since <= listing.version):
        paths = listing.files_of(table)
        if not paths:
            raise ListingError(f"lists no {table.file}")
        if table.level in ("run", "sealed") or table in schema.MERGED:
            counted = f"/{table.counted}" if table.counted else ""
            having = {run_of(path) for path in listing.files if path.endswith(counted)} - {SCHEMA_RUN}
            if lost := having - {run_of(path) for path in paths}:
                raise ListingError(f"lists no {table.file} of run {min(lost)}")


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(_SHA256, value) is not None


def _is_texts(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
