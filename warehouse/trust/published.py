"""Verification of a published warehouse: reads every listed file in place and compares it with the listing.

`moewh publish` sends only files that `moewh.warehouse.trust.verify` found unchanged, so a file that still has its
sha256 needs no other check. The manifests must agree with the listing about the files of their folders.

The command and the Python API call `plan_any` and `check_any`, which verify either kind of warehouse.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.listing import Listed, run_of
from moewh.warehouse.files.manifest import MANIFEST, ManifestError, parse_manifest
from moewh.warehouse.files.names import LISTING, SCHEMA_RUN, SEGMENT_FOLDER
from moewh.warehouse.remote.published import Published, Readable
from moewh.warehouse.trust import verify
from moewh.warehouse.trust.verify import CommittedPlan, Fault

_BLOCK = 1 << 22
_REQUESTS = 8
"""Files that are read at the same time: most of the time is spent waiting for responses."""


@dataclass(frozen=True)
class PublishedPlan:
    """The files of a published warehouse to read. Paths in its faults are relative to the root."""

    published: Published

    @property
    def files(self) -> int:
        """Number of files listed."""
        return len(self.published.listing.files)

    @property
    def bytes(self) -> int:
        """Total size of the files."""
        return sum(listed.bytes for listed in self.published.listing.files.values())

    @property
    def segments(self) -> int:
        """Number of segments of all runs."""
        folders = {Path(path).parent for path in self.published.listing.files if run_of(path) != SCHEMA_RUN}
        return sum(folder.name.startswith(SEGMENT_FOLDER) for folder in folders)

    @property
    def runs(self) -> int:
        """Number of runs."""
        return len(self.published.listing.run_ids)


def plan_any(warehouse: Readable) -> CommittedPlan | PublishedPlan:
    """Return the plan of a warehouse's verification. Raises MoewhError if there is no warehouse."""
    if isinstance(warehouse, Published):
        warehouse.read_again()
        return PublishedPlan(warehouse)
    return verify.plan(warehouse)


def check_any(
    planned: CommittedPlan | PublishedPlan, jobs: int | None = None, done: Callable[[int], None] = lambda _: None
) -> list[Fault]:
    """Read every file and return all faults, ordered by path; `done` is called with the number of bytes read."""
    if isinstance(planned, CommittedPlan):
        return verify.check(planned, jobs, done)
    published = planned.published
    work = sorted(published.listing.files.items(), key=lambda item: -item[1].bytes)
    workers = ThreadPoolExecutor(jobs or _REQUESTS)
    faults = []
    try:
        found = workers.map(lambda item: _faults_of(published, *item), work)
        for (_, listed), of_file in zip(work, found, strict=True):
            done(listed.bytes)
            faults += of_file
    finally:
        workers.shutdown(cancel_futures=True)
    return sorted(faults, key=lambda fault: (fault.path, fault.why))


def require_sound(warehouse: Readable) -> None:
    """Raise MoewhError, naming the first bad file, unless every file is unchanged since it was committed."""
    faults = check_any(plan_any(warehouse))
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        repair = "Publish the run again."
        if isinstance(warehouse, Layout):
            repair = f"See `moewh verify --repair {warehouse.option}`."
        raise MoewhError(f"{faults[0].path} {faults[0].why}{more}. {repair}")


def _faults_of(published: Published, path: str, listed: Listed) -> list[Fault]:
    """Return what is wrong with one file; with a sound manifest, also what it says otherwise than the listing."""
    folder, name = Path(path).parent, Path(path).name
    manifest = bytearray() if name == MANIFEST else None
    if why := _file_fault(published, path, listed, manifest):
        return [Fault(folder, name, why)]
    return [] if manifest is None else list(_manifest_faults(published, folder, bytes(manifest)))


def _file_fault(published: Published, path: str, listed: Listed, content: bytearray | None) -> str | None:
    """Return what is wrong with the bytes of one file, or None; they are added to `content` if it is given."""
    digest, place, size = hashlib.sha256(), published.place, listed.bytes
    try:
        if size == 0:  # no byte range can be requested
            return "has more than 0 bytes" if place.read(path) else None
        for start in range(0, size, _BLOCK):
            end = min(start + _BLOCK, size)
            data = place.read_range(path, start, end + (end == size), size)  # one more byte, to detect a longer file
            if len(data) != end - start:
                return f"has {'fewer' if len(data) < end - start else 'more'} than {size:,} bytes"
            digest.update(data)
            if content is not None:
                content += data
    except FileNotFoundError:
        return "is missing"
    except (MoewhError, OSError) as error:
        return str(error).removesuffix(".")
    return None if digest.hexdigest() == listed.sha256 else "has another sha256"


def _manifest_faults(published: Published, folder: Path, text: bytes) -> Iterator[Fault]:
    """Yield the differences between the text of a manifest and the listing."""
    files = published.listing.files
    try:
        manifest = parse_manifest(text)
    except ManifestError as error:
        yield Fault(folder, MANIFEST, str(error))
        return
    for name, entry in manifest.files.items():
        if files.get(f"{folder}/{name}") != Listed(entry.bytes, entry.sha256):
            yield Fault(folder, name, f"differs between {MANIFEST} and {LISTING}")
