"""The manifest of a folder: its files with their rows, bytes and sha256, and the run and segment they belong to.

Every committed folder has one, written last: each segment's, each run's own, and the one with the zero-row files.
`moewh.warehouse.trust.verify` compares it with the disk.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.pages import PageError, check_pages
from moewh.warehouse.files.schema import FORMAT_VERSION

MANIFEST = schema.MANIFEST
_LONGEST = 1 << 20
"""Bytes; a manifest has about 3,000."""


class ManifestError(MoewhError):
    """A manifest that moewh did not write, or that was damaged later."""


@dataclass(frozen=True)
class Entry:
    """A file's rows, size and sha256 when it was committed."""

    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A folder's files by name, and the run and segment they belong to."""

    identity: str | None
    """sha256 of the run's identity; None for the zero-row files, which belong to no run."""
    segment: int | None
    """Number of the segment; None for a run's own files."""
    files: dict[str, Entry]
    schema: int = schema.SCHEMA_VERSION
    """Version of the schema that the files were written with."""


def write_manifest(folder: Path, identity: str | None, segment: int | None) -> int:
    """Write the manifest of every Parquet file in `folder`; return their total size in bytes.

    Every page is compared with its checksum first, because the sha256 computed here would preserve any earlier error.
    Raises MoewhError with the file, row group and column of a page that differs from what was written.
    """
    import pyarrow.parquet as pq

    files = {}
    for path in sorted(folder.glob("*.parquet")):
        metadata = pq.read_metadata(path)
        try:
            check_pages(path, metadata)
        except PageError as error:
            raise MoewhError(
                f"{path.name}: {error} right after it was written. It is not committed. Run the same command again; if "
                "it happens again, test this machine's memory and disk."
            ) from error
        files[path.name] = Entry(metadata.num_rows, path.stat().st_size, file_sha256(path))
    (folder / MANIFEST).write_bytes(manifest_text(Manifest(identity, segment, files, schema.SCHEMA_VERSION)))
    return sum(entry.bytes for entry in files.values())


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a folder. Raises ManifestError with what is wrong with it, and OSError."""
    if (folder / MANIFEST).exists() and not (folder / MANIFEST).is_file():
        raise ManifestError("is not a file")
    with (folder / MANIFEST).open("rb") as file:
        text = file.read(_LONGEST)
    return parse_manifest(text)


def parse_manifest(text: bytes) -> Manifest:
    """Parse a manifest's bytes. Raises ManifestError for anything that moewh would not have written."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise ManifestError("is not a JSON object")
    if refused := schema.refusal(content.get("format"), content.get("schema")):
        raise ManifestError(refused)
    if set(content) != {"format", "schema", "identity", "segment", "files"}:
        raise ManifestError(f"has the keys {', '.join(sorted(content))}")
    identity, segment, files = content["identity"], content["segment"], content["files"]
    if not (identity is None or _is_sha256(identity)) or not (segment is None or _is_count(segment)):
        raise ManifestError("does not say which run and segment its files belong to")
    if not isinstance(files, dict):
        raise ManifestError("lists no files")
    entries = {name: _entry(name, entry) for name, entry in files.items()}
    manifest = Manifest(identity, segment, entries, content["schema"])
    if manifest_text(manifest) != text:
        raise ManifestError("is not formatted as moewh writes it")
    return manifest


def manifest_text(manifest: Manifest) -> bytes:
    """Return the bytes of a manifest's file; equal manifests give equal bytes."""
    files = {name: asdict(entry) for name, entry in manifest.files.items()}
    whose = {"identity": manifest.identity, "segment": manifest.segment}
    content = {"format": FORMAT_VERSION, "schema": manifest.schema, **whose, "files": files}
    return f"{json.dumps(content, indent=1)}\n".encode()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex. Raises OSError."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _entry(name: str, entry: Any) -> Entry:
    right = (
        re.fullmatch(r"[a-z_]+\.parquet", name)
        and isinstance(entry, dict)
        and set(entry) == {"rows", "bytes", "sha256"}
        and _is_count(entry["rows"])
        and _is_count(entry["bytes"])
        and _is_sha256(entry["sha256"])
    )
    if not right:
        raise ManifestError(f"has no valid entry for {name!r}")
    return Entry(**entry)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _is_sha256(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None
