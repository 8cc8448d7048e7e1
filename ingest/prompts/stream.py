"""Prompts, from any supported file to one canonical stream of (text, form, domain, source, metadata).

The planning pass reads the input once, with compiled readers, and leaves three things in `.staging/`: a spool (the
canonical columns as Parquet, in which any process can seek), the digest of the whole stream, and the segment cuts. The
spool is deleted when its run is complete; the small plan stays, so that re-running a finished command reads only that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moewh.ingest.options import IngestOptions, option_of
from moewh.ingest.prompts.canonical import BATCH_ROWS, CANONICAL
from moewh.ingest.prompts.digest import PromptDigest
from moewh.ingest.prompts.records import MESSAGES
from moewh.ingest.prompts.sources import Found, Input, find_inputs
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.commit import locked
from moewh.warehouse.files.layout import Layout


@dataclass(frozen=True)
class SizeRule:
    """How to estimate a prompt's size before it is tokenised: see `estimated_rows`."""

    rows_per_token: int
    max_length: int
    chunked: bool
    segment_rows: int
    generate: int = 0


@dataclass(frozen=True)
class PromptPlan:
    """The result of the planning pass: the digest of all prompts, and the first prompt of each segment."""

    prompts: int
    prompts_sha256: str
    starts: tuple[int, ...]
    chats: bool = False
    """Whether any prompt consists of chat messages."""
    pinned: tuple[str, ...] = ()
    """Data sets on the Hub that the prompts come from, each with its commit."""

    @property
    def segments(self) -> int:
        """Number of segments of the run."""
        return len(self.starts)

    def bounds(self, segment: int) -> tuple[int, int]:
        """First prompt of `segment`, and the first prompt after it."""
        return (*self.starts, self.prompts)[segment], (*self.starts, self.prompts)[segment + 1]


class PromptStream:
    """The prompts of one command: planned once, then read segment by segment.

    A context manager: leaving it removes the spool, and also the plan unless `finished` was called. Only a killed
    process leaves them, for the command that resumes it.
    """

    def __init__(self, options: IngestOptions, layout: Layout, found: Found | None = None) -> None:
        """Use the inputs in `found`, or else look up those in the options."""
        self._options = options
        found = find_inputs(options) if found is None else found
        self._inputs = found.inputs
        self.skipped = found.skipped
        """Files in folders and patterns that are not prompts."""
        self._pinned = tuple(dict.fromkeys(given.pinned for given in found.inputs if given.pinned))
        key = _input_key(self._inputs, options)
        self._folder = layout.staging / "prompts"
        self._plan = self._folder / f"{key}.json" if key else None
        self._layout = layout
        self._spool = self._folder / f"{key or f'stdin.{os.getpid()}'}.parquet"
        self._reader: pq.ParquetFile | None = None
        self._plan_is_new = False
        self._finished = False
        self._spool_is_needed = False

    def __enter__(self) -> PromptStream:
        return self

    def __exit__(self, *_: object) -> None:
        if self._reader is not None:
            self._reader.close()
        if not self._spool_is_needed:
            self._spool.unlink(missing_ok=True)  # another process that completed the run may have removed it
        if not self._finished:
            if self._plan is not None and self._plan_is_new:
                self._plan.unlink(missing_ok=True)
            self._layout.remove_empty()

    def finished(self, *, complete: bool) -> None:
        """Record that this command did its share; once the run is complete, no other command needs the spool."""
        self._finished = True
        self._spool_is_needed = not complete and self._plan is not None

    def plan(self, rule: SizeRule) -> PromptPlan:
        """Digest the prompts and cut them into segments. Raises MoewhError for unreadable input.

        One process does the work, and the others wait for its result.
        """
        if self._plan is None:
            return self._make_plan(rule)
        found = self._cached_plan(rule)
        if found is None:
            with self._layout.writing():
                self._folder.mkdir(parents=True, exist_ok=True)
            with locked(self._folder):
                found = self._cached_plan(rule) or self._make_plan(rule)
        return found

    def _cached_plan(self, rule: SizeRule) -> PromptPlan | None:
        if self._plan is None:
            return None
        try:
            saved = json.loads(self._plan.read_text())
        except FileNotFoundError:
            return None
        if saved["rule"] != asdict(rule) or "chats" not in saved:
            return None
        starts = tuple(saved["starts"])
        return PromptPlan(saved["prompts"], saved["prompts_sha256"], starts, saved["chats"], self._pinned)

    def _make_plan(self, rule: SizeRule) -> PromptPlan:
        digest = PromptDigest()
        sizes, chats = [], False
        for batch in self._open().iter_batches(BATCH_ROWS):
            digest.update(batch)
            sizes.append(prompt_bytes(batch))
            chats = chats or bool(pc.any(pc.equal(batch.column("form"), MESSAGES)).as_py())
        rows_P = estimated_rows(np.concatenate(sizes or [np.zeros(0, np.int64)]), rule)
        if not len(rows_P):
            names = ", ".join(given.name for given in self._inputs)
            raise MoewhError(f"there are no prompts in {names}. Give at least one.")
        starts = segment_starts(rows_P, rule.segment_rows)
        plan = PromptPlan(len(rows_P), digest.hexdigest(), starts, chats, self._pinned)
        if self._plan is not None:
            self._plan_is_new = True
            _write_text(self._layout, self._plan, json.dumps({"rule": asdict(rule), **asdict(plan)}))
        return plan

    def read(self, start: int, stop: int) -> pa.Table:
        """Return prompts `start` to `stop` (exclusive) with the canonical columns."""
        reader = self._open()
        first, parts = 0, []
        for group in range(reader.num_row_groups):
            rows = reader.metadata.row_group(group).num_rows
            if first < stop and first + rows > start:
                table = reader.read_row_group(group)
                parts.append(table.slice(max(0, start - first), min(rows, stop - first) - max(0, start - first)))
            first += rows
        return pa.concat_tables(parts)

    def _open(self) -> pq.ParquetFile:
        while self._reader is None:
            if not self._spool.is_file():
                self._write_spool()
            with suppress(FileNotFoundError):  # another process that completed the run may have just removed it
                self._reader = pq.ParquetFile(self._spool)
        return self._reader

    def _write_spool(self) -> None:
        """Read the whole input into the spool, which gets its name only once it is complete."""
        with self._layout.writing(), self._layout.staged("prompts") as folder:
            left = self._options.limit
            with pq.ParquetWriter(folder / "spool.parquet", CANONICAL, compression="zstd") as writer:
                for batch in self._batches(folder):
                    writer.write_batch(batch.slice(0, left))
                    left = left if left is None else left - min(left, batch.num_rows)
                    if left == 0:
                        break
            _put(folder / "spool.parquet", self._spool)

    def _batches(self, folder: Path) -> Iterator[pa.RecordBatch]:
        """Yield the canonical batches of every input in turn; `folder` is for temporary copies."""
        for given in self._inputs:
            yield from given.batches(folder, self._options)


def prompt_bytes(prompts: pa.RecordBatch | pa.Table) -> npt.NDArray[np.int64]:
    """Return the length in bytes of each prompt's text."""
    return np.asarray(pc.binary_length(prompts.column("text")), np.int64)


def estimated_rows(bytes_P: npt.NDArray[np.int64], rule: SizeRule) -> npt.NDArray[np.int64]:
    """Return the routing rows that each prompt is estimated to need: 1 + min(⌈bytes/4⌉, max_length) + generated tokens.

    There is no cap for chunked prompts.
    """
    tokens_P = -(-bytes_P // 4)
    if not rule.chunked:
        tokens_P = np.minimum(tokens_P, rule.max_length)
    return (1 + tokens_P + rule.generate) * rule.rows_per_token


def segment_starts(rows_P: npt.NDArray[np.int64], segment_rows: int) -> tuple[int, ...]:
    """Return the first prompt of each segment: a cut falls before the prompt that would overfill the segment.

    A prompt larger than a whole segment gets its own segment (and is refused later, by name).
    """
    ends_P = np.cumsum(rows_P)
    starts, start = [0], 0
    while True:
        used = ends_P[start - 1] if start else 0
        start = max(start + 1, int(np.searchsorted(ends_P, used + segment_rows, side="right")))
        if start >= len(rows_P):
            return tuple(starts)
        starts.append(start)


def _input_key(inputs: Sequence[Input], options: IngestOptions) -> str | None:
    """Return a key for the input, from the keys of its bytes and the options that read it; None if one has no key."""
    if any(given.key is None for given in inputs):
        return None
    parts: list[object] = [given.key for given in inputs]
    parts += [[one.name, getattr(options, one.name)] for one in fields(options) if option_of(one).of_input]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _write_text(layout: Layout, target: Path, text: str) -> None:
    with layout.writing(), layout.staged("plan") as folder:
        (folder / target.name).write_text(text)
        _put(folder / target.name, target)


def _put(file: Path, target: Path) -> None:
    """Rename a file into its folder, which another command may have removed because it was empty."""
    target.parent.mkdir(parents=True, exist_ok=True)
    file.replace(target)
