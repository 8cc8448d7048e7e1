"""One run from end to end: prompts and a model in, committed segments out.

In order: open the prompts, load the model, plan, prove the first batch, begin the run (its own files and the
database), then loop over the segments. The unit is the segment: tokenise its prompts, run its batches, commit. A
segment that exists already is skipped, so that re-running a command resumes it and leaves a finished run alone.

Tokenising, collecting and writing run alongside the forward passes (`moewh.ingest.workers`). Each may run ahead only by
a bounded amount, so memory does not grow with the corpus.
"""

from __future__ import annotations

import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain

import numpy as np
import pyarrow as pa
import torch

from moewh.ingest.capture.expert_outputs import arithmetic_share
from moewh.ingest.capture.forward import Batches, BatchRunner, Proof, Rows
from moewh.ingest.capture.generation import GeneratedBatch, generated_size, plan_equal_batches, with_generated
from moewh.ingest.capture.hooks import PendingRouting
from moewh.ingest.identity import describe_run, has_planned_segments
from moewh.ingest.model.expected import top_k
from moewh.ingest.model.loading import LoadedModel, load_model
from moewh.ingest.options import STDIN, IngestOptions, Sampling
from moewh.ingest.plan import RunPlan, missing_segments, plan_run, release_time, require_tokens
from moewh.ingest.processes import Process
from moewh.ingest.prompts.batches import plan_batches
from moewh.ingest.prompts.chats import chat_arguments
from moewh.ingest.prompts.sources import Found
from moewh.ingest.prompts.stream import PromptStream, estimated_rows, prompt_bytes
from moewh.ingest.prompts.tokenise import tokenise
from moewh.ingest.prompts.vocabulary import vocabulary_texts
from moewh.ingest.record import Identity
from moewh.ingest.routing import RoutingBuffer, TokenisedSegment, TokenTexts, VectorBuffer
from moewh.ingest.workers import WRITERS, InBetween, in_background, start_workers, take_done
from moewh.ingest.write.run_files import write_run
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal, unseal
from moewh.warehouse.views.publishing import publish

_NOT_WHOLE = ("truncated", "chunked", "skipped", "empty")
_BATCHES_AHEAD = 16
"""Batches whose routing may be in flight from the device at once."""


@dataclass
class Summary:
    """What a command did, for its closing line."""

    run_id: str
    segments: int
    """Segments of the whole run."""
    written: list[Committed] = field(default_factory=list)
    """Segments this command committed."""
    not_whole: Counter[str] = field(default_factory=Counter)
    """Their prompts that were not run as a whole, by `prompts.status`; those that failed are reported when they do."""
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds the forward passes waited for copying, assembling and writing."""
    peak_memory: int = 0
    """Most host memory this process has held so far, in bytes."""


@dataclass(frozen=True)
class Progress:
    """Callbacks that report progress; each field is called when its event happens."""

    started: Callable[[Identity, int], None] = lambda *_: None
    """(identity, segments still to write), before the first of them."""
    batch_done: Callable[[int], None] = lambda _: None
    """(tokens of the batch)"""
    segment_done: Callable[[int, int], None] = lambda *_: None
    """(segment number, segments planned)"""
    warn: Callable[[str], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None


def ingest(
    options: IngestOptions,
    layout: Layout,
    progress: Progress | None = None,
    process: Process | None = None,
    *,
    model: LoadedModel | None = None,
    records: Found | None = None,
) -> Summary:
    """Run the prompts through the model and commit every missing segment of this process's share.

    Without `process`, this process is the only one. `model` and `records` are already in memory and replace the
    model and prompts that the options name. Raises UsageError or MoewhError; earlier commits stay, and nothing
    half-written is left.
    """
    progress, process = progress or Progress(), process or Process()
    if process.world > 1 and STDIN in options.prompts:
        raise UsageError("several processes cannot share standard input. Write the prompts to a file first.")
    chat_arguments(options.chat_arguments)  # refused before anything is loaded
    layout.require_one_disk(
        options.run_id if options.run_id and not has_planned_segments(layout, options.run_id) else None
    )
    with PromptStream(options, layout, records) as prompts:
        if prompts.skipped:
            progress.note(_skipped(prompts.skipped))
        if options.without_effect is not None:
            progress.warn(options.without_effect)
        loaded = load_model(options, process) if model is None else model
        plan = plan_run(options, layout, prompts, loaded, process)
        try:
            return _Run(layout, prompts, loaded, plan, progress).execute()
        finally:
            release_time(plan, layout, process)


def _skipped(files: Sequence[str]) -> str:
    named = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    return f"skipped files that are not prompts files: {named}"


@dataclass(frozen=True)
class _Work:
    """A segment in progress: its tokens, the batches still to run, and those already launched."""

    segment: TokenisedSegment
    batches: Batches
    failed: set[int] = field(default_factory=set)
    """Prompts that did not fit in the device's memory."""
    launched: list[tuple[Rows, PendingRouting]] = field(default_factory=list)
    """The batch that proved the model's capture."""


class _Run:
    """One command's run: prove, begin, loop."""

    def __init__(
        self, layout: Layout, prompts: PromptStream, loaded: LoadedModel, plan: RunPlan, progress: Progress
    ) -> None:
        self.layout, self.prompts, self.loaded, self.plan, self.progress = layout, prompts, loaded, plan, progress
        self.batches = BatchRunner(loaded, plan.wanted)
        self.summary = Summary(plan.identity.run_id, plan.prompts.segments)

    def execute(self) -> Summary:
        """Prove the model, begin the run, and commit every missing segment in order."""
        began = time.monotonic()
        if self.plan.missing:
            if not self.plan.recorded:
                require_tokens(self.plan, self.prompts, self.loaded)
            first = self._work(self._tokenise(self.plan.missing[0]))
            self._begin(self._prove(first))
            self._loop(first)
        elif not self.plan.recorded:  # no segments left for this process, but the run's own files are missing
            self._begin(self.batches.prove_on_probe())
        if complete := not missing_segments(self.layout, self.plan.identity, self.plan.prompts):
            seal(self.layout, self.plan.identity.run_id)
        self.prompts.finished(complete=complete)
        self.summary.seconds = time.monotonic() - began
        self.summary.peak_memory = _peak_memory()
        return self.summary

    @cached_property
    def vocabulary(self) -> pa.Array:
        """[V] texts of the tokenizer's vocabulary, decoded on first use."""
        return vocabulary_texts(self.loaded.tokenizer, self.loaded.vocabulary_rows)

    def _prove(self, first: _Work) -> Proof:
        """Run the first batch of the first missing segment, and prove that the model computes what is captured."""
        if self.plan.sampling is not None:  # prove on a prompt alone; the loop generates after it
            return self.batches.prove(first.segment, deque(batch[:1] for batch in first.batches), lambda _: None)
        proof = self.batches.prove(first.segment, first.batches, self._too_large(first))
        first.launched.extend([proof.first] if proof.first else [])
        return proof

    def _begin(self, proof: Proof) -> None:
        """Create the warehouse, the run's own files and the database, now that the capture is proved."""
        self.layout.create()
        self.layout.sweep()
        if self.plan.missing:
            unseal(self.layout, self.plan.identity.run_id)  # a segment of a sealed run was removed
        if not self.plan.recorded:
            record = describe_run(self.loaded, self.plan.identity, proof.facts, self.plan.prompts)
            write_run(self.layout, replace(record, vocabulary=self.vocabulary))
        publish(self.layout)
        self.progress.started(self.plan.identity, len(self.plan.missing))
        self._report_costs()

    def _report_costs(self) -> None:
        """Report what the opt-in tables cost, before the first segment."""
        wanted, loaded = self.plan.wanted, self.loaded
        if not wanted.tables:
            return
        chosen = top_k(loaded.config)
        size = wanted.bytes_per_token(loaded.moe_layers, loaded.text_config.hidden_size, chosen)
        *others, last = (table.name for table in wanted.tables)
        names = f"{', '.join(others)} and {last}" if others else last
        self.progress.note(f"{names} take about {size:,} bytes per token before compression")
        if wanted.expert_outputs:
            more = arithmetic_share(loaded.model, loaded.moe_layers, chosen)
            self.progress.note(f"expert_outputs run the chosen experts twice: about {more:.0%} more arithmetic")

    def _loop(self, first: _Work) -> None:
        """Commit every missing segment, while the next is tokenised and those before it are written."""
        missing, texts = self.plan.missing, TokenTexts(self.vocabulary)  # decoded here, not by each writer
        at_once = 1 if self.plan.wanted.tables else WRITERS  # the opt-in vectors of a segment may fill a disk
        with start_workers(in_background(self.loaded.model.device)) as (ahead, collector, writer):
            tokenised: list[Future[TokenisedSegment]] = []
            writing: deque[Future[Committed]] = deque()
            for index, number in enumerate(missing):
                current = self._work(tokenised.pop().result()) if tokenised else first
                tokenised = [ahead.submit(self._tokenise, later) for later in missing[index + 1 : index + 2]]
                if self.plan.sampling is None:
                    segment, (routing, collected) = current.segment, self._observe(current, collector)
                else:
                    segment, routing = self._generate(current, self.plan.sampling)
                    collected = []
                self.summary.not_whole.update(status for status in segment.status_P if status in _NOT_WHOLE)
                self._committed(writing, at_once - 1)
                writing.append(writer.submit(self._write, number, segment, routing, collected, texts))
            self._committed(writing, 0)
            self.summary.waiting += sum(w.seconds for w in (collector, writer) if isinstance(w, InBetween))

    def _tokenise(self, number: int) -> TokenisedSegment:
        start, stop = self.plan.prompts.bounds(number)
        table = self.prompts.read(start, stop)
        too_large, most = [], self.plan.size.segment_rows
        if stop == start + 1 and estimated_rows(prompt_bytes(table), self.plan.size)[0] > most:
            too_large = [0]
            self.progress.warn(
                f"prompt {start} alone has more rows than a segment ({most}); it is marked failed. "
                "Raise --segment-rows or lower --max-length."
            )
        segment = tokenise(table, start, self.loaded.tokenizer, self.plan.rules, too_large, warn=self.progress.warn)
        if segment.without_tokens:
            more = f" and {len(segment.without_tokens) - 5} more" if len(segment.without_tokens) > 5 else ""
            self.progress.warn(
                f"prompts that are not empty give no tokens and are marked failed: "
                f"{', '.join(map(str, segment.without_tokens[:5]))}{more}."
            )
        return segment

    def _work(self, segment: TokenisedSegment) -> _Work:
        if self.plan.sampling is None:
            return _Work(segment, deque(plan_batches(segment.length_C, self.plan.batch_tokens)))
        equal = plan_equal_batches(segment.length_C, self.plan.batch_tokens, self.plan.sampling.tokens)
        return _Work(segment, deque(equal))

    def _observe(self, work: _Work, collector: Executor) -> tuple[RoutingBuffer, list[Future[None]]]:
        """Launch every batch of a segment. The buffer is full once the futures are done."""
        routing = self._buffer(len(work.segment.vocab_id_T))
        collected: list[Future[None]] = []
        later = self.batches.run(work.segment, work.batches, self._too_large(work))
        launched = work.launched.copy()
        work.launched.clear()  # the first segment is kept for longer; its device memory must not be
        in_flight: deque[tuple[list[torch.cuda.Event], Future[None]]] = deque()
        for rows_T, pending in chain(launched, later):
            collected.append(collector.submit(_collect, routing, rows_T, pending))
            in_flight.append((pending.arrivals, collected[-1]))
            self.progress.batch_done(len(rows_T))
            if len(in_flight) > _BATCHES_AHEAD:
                arrivals, future = in_flight.popleft()
                for arrival in arrivals:  # the device's own time, which is not counted as waiting
                    arrival.synchronize()
                self._wait_for(future)
        routing.failed_prompts |= work.failed
        return routing, collected

    def _generate(self, work: _Work, sampling: Sampling) -> tuple[TokenisedSegment, RoutingBuffer]:
        """Generate after every prompt of a segment; return the segment with the generated tokens, and all routing."""
        done: list[GeneratedBatch] = []
        for part in self.batches.generate(work.segment, work.batches, sampling, self._too_large(work)):
            done.append(part)
            self.progress.batch_done(sum(part.prompt_length + len(tokens) for tokens in part.generated))
        routing = self._buffer(generated_size(work.segment, done))
        routing.failed_prompts |= work.failed
        return with_generated(work.segment, done, routing), routing

    def _buffer(self, tokens: int) -> RoutingBuffer:
        tables = self.plan.wanted.tables
        return RoutingBuffer(tokens, VectorBuffer(tokens, tables, self.layout.staging) if tables else None)

    def _too_large(self, work: _Work) -> Callable[[int], None]:
        def report(context: int) -> None:
            prompt = int(work.segment.prompt_T[work.segment.start_C[context]])
            work.failed.add(prompt)
            self.progress.warn(f"prompt {prompt} does not fit in the device's memory even alone; it is marked failed.")

        return report

    def _write(
        self,
        number: int,
        segment: TokenisedSegment,
        routing: RoutingBuffer,
        collected: list[Future[None]],
        texts: TokenTexts,
    ) -> Committed:
        for part in collected:
            part.result()
        for layer, indices in routing.invalid().items():
            prompts = ", ".join(str(prompt) for prompt in np.unique(segment.prompt_T[indices])[:5])
            self.progress.warn(
                f"layer {layer}: {len(indices)} tokens have weights that are not finite (prompts {prompts}); "
                "they have no rows there and their prompts are marked failed."
            )
        last = number == self.plan.prompts.segments - 1
        committed = write_segment(self.layout, self.plan.identity, number, segment, routing, texts=texts, last=last)
        self.progress.segment_done(number, self.plan.prompts.segments)
        return committed

    def _committed(self, writing: deque[Future[Committed]], in_flight: int) -> None:
        """Note the segments that are written, and wait until at most `in_flight` are not."""
        began = time.monotonic()
        self.summary.written += take_done(writing, in_flight)
        self.summary.waiting += time.monotonic() - began

    def _wait_for(self, future: Future[None]) -> None:
        """Wait for the future, count the time as stalled, and re-raise its error."""
        began = time.monotonic()
        future.result()
        self.summary.waiting += time.monotonic() - began


def _collect(routing: RoutingBuffer, rows_T: Rows, pending: PendingRouting) -> None:
    routing.add(rows_T, pending.wait())
    if routing.vectors is not None:
        routing.vectors.add(rows_T, pending.wait_for_vectors())


def _peak_memory() -> int:
    """Return this process's peak resident memory in bytes; Linux reports KiB, macOS bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
