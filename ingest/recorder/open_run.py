"""An open-ended run: blocks of sequences in, in order of appearance; segments of about equal size out.

Nobody knows beforehand how many there will be. A segment is cut once the first blocks have enough rows and another
follows; the one that is written when the run is closed says that it is the last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from concurrent.futures import Executor, Future

from moewh.ingest.record import RunRecord
from moewh.ingest.recorder.sequences import Block, Decode, Joined, assemble, join
from moewh.ingest.routing import TokenTexts
from moewh.ingest.workers import WRITERS, take_done
from moewh.ingest.write.run_files import write_run
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.views.publishing import publish


def require_new(layout: Layout, run_id: str) -> None:
    """Raise MoewhError if the warehouse has this run already: a recorded run cannot be resumed."""
    if layout.run(run_id).is_dir() or layout.segments(run_id).is_dir():
        raise MoewhError(
            f"run {run_id!r} exists already. Choose another run_id, or delete it with "
            f"`moewh runs --delete {run_id} {layout.option}`."
        )


class OpenRun:
    """A run that grows until it is closed. `add` and `commit_full` take blocks; `close` writes what is left."""

    def __init__(
        self,
        layout: Layout,
        record: RunRecord,
        segment_rows: int,
        writer: Executor,
        *,
        decode: Decode | None,
        special_ids: Collection[int] = (),
    ) -> None:
        self.layout, self.record = layout, record
        self._segment_rows, self._writer, self._texts = segment_rows, writer, TokenTexts(record.vocabulary)
        self._decode, self._special_ids = decode, special_ids
        self._blocks: deque[Block] = deque()
        """Those that may still grow, and all that follow the first of them."""
        self._ready: list[Joined] = []
        """The closed blocks before these, for the next segment."""
        self._ready_rows = 0
        self._writing: deque[Future[Committed]] = deque()
        self._segments = self._prompts = 0
        self._prepared = self._begun = False

    def prepare(self) -> None:
        """Make the warehouse, if it is not there. Raises MoewhError for a run that exists, and if the disk refuses."""
        require_new(self.layout, self.record.run_id)
        self.layout.create()
        self.layout.require_one_disk()
        self.layout.sweep()
        publish(self.layout)
        self._prepared = True

    def add(self, block: Block) -> None:
        """Append a block, which may still grow. The run begins with the first."""
        if not self._begun:
            if not self._prepared:
                self.prepare()
            write_run(self.layout, self.record)
            self._begun = True
        self._blocks.append(block)

    def commit_full(self) -> None:
        """Have a segment written if the first closed blocks fill one and another block follows.

        A call that is interrupted loses nothing: the next one does what is left.
        """
        while self._blocks:
            if self._ready_rows >= self._segment_rows:
                self._commit(last=False)
            if not self._blocks[0].closed:
                return
            try:
                joined = join(self._blocks[0])
            except MoewhError:
                self._blocks.popleft()  # refused by name
                raise
            self._blocks.popleft()
            self._ready.append(joined)
            self._ready_rows += joined.rows

    def close(self, *, whole: bool) -> None:
        """Write what is left; if the run is whole, the last segment says so, and it is complete.

        Raises MoewhError for a whole run without any sequence.
        """
        for block in self._blocks:
            block.closed = True
        self.commit_full()
        if whole and self._begun and not self._prompts and not any(len(joined.ids_T) for joined in self._ready):
            raise MoewhError(
                f"run {self.record.run_id!r}: attention_mask masks every position of its passes, so it has no tokens. "
                "Give 1 for each token."
            )
        if self._ready:
            self._commit(last=whole)
        take_done(self._writing, 0)
        if whole and self._begun:
            seal(self.layout, self.record.run_id)

    @property
    def begun(self) -> bool:
        """Whether there was any block."""
        return self._begun

    def _commit(self, *, last: bool) -> None:
        """Hand what is ready to the writers, which may be a few segments behind."""
        segment, routing = assemble(self._ready, self._prompts, decode=self._decode, special_ids=self._special_ids)
        take_done(self._writing, WRITERS - 1)
        identity, number = self.record.identity, self._segments
        self._writing.append(
            self._writer.submit(
                write_segment, self.layout, identity, number, segment, routing, texts=self._texts, last=last
            )
        )
        self._ready, self._ready_rows = [], 0
        self._prompts += len(segment.status_P)
        self._segments += 1
