"""One run from end to end: prompts and a model in, committed segments out.

The unit is the segment: tokenise its prompts, run its batches, commit. A segment that is already there
is skipped, so that re-running a command resumes it and a finished one is left alone.

Three threads keep a GPU busy: one tokenises the next segment, one waits for copies from the device and puts rows
in their place, one writes (a few more rank and count for it). Each may be only so far ahead, so memory does not grow
with the corpus. On a CPU the same is done in between the forward passes.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from moewh.ingest.capture.forward import BatchRunner, Rows
from moewh.ingest.capture.generation import GeneratedBatch, generated_size, plan_equal_batches, with_generated
from moewh.ingest.capture.hooks import PendingRouting
from moewh.ingest.capture.vectors import wanted_vectors
from moewh.ingest.identity import describe_run, identify, is_complete, require_same
from moewh.ingest.model.expected import top_k
from moewh.ingest.model.loading import LoadedModel, load_model
from moewh.ingest.options import STDIN, IngestOptions, Sampling
from moewh.ingest.processes import this_process
from moewh.ingest.prompts.batches import plan_batches
from moewh.ingest.prompts.chats import (
    CLOCK,
    GENERATION_PROMPT,
    ChatRenderer,
    ChatRules,
    chat_arguments,
    template_variables,
)
from moewh.ingest.prompts.readers import MESSAGES
from moewh.ingest.prompts.stream import Plan, PromptStream, SizeRule, estimated_rows, prompt_bytes
from moewh.ingest.prompts.template_time import fix_time, forget_time
from moewh.ingest.prompts.tokenise import TokenRules, TokenTexts, tokenise
from moewh.ingest.proof.measure import LayerFacts
from moewh.ingest.record import Identity
from moewh.ingest.routing import RoutingBuffer, TokenisedSegment, VectorBuffer
from moewh.ingest.write.run_files import write_run
from moewh.ingest.write.segment import Committed, write_segment
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout

_PROMPTS_LOOKED_AT = 64
"""Prompts that are tokenised at once before the run, to see that they give tokens."""
_BATCHES_AHEAD = 16
"""Batches whose routing may be on its way from the device at once."""


@dataclass
class Summary:
    """What a command did, for its closing line."""

    run_id: str
    segments: int
    """Segments of the whole run."""
    written: list[Committed] = field(default_factory=list)
    """Segments this command committed."""
    seconds: float = 0.0
    waiting: float = 0.0
    """Seconds the forward passes stood still for copying, assembling and writing."""
    peak_memory: int = 0
    """Most host memory this process has held so far, in bytes."""


@dataclass(frozen=True)
class Progress:
    """Told what happens; each field is called as it does."""

    started: Callable[[Identity, int], None] = lambda *_: None
    """(identity, segments still to write), before the first of them."""
    batch_done: Callable[[int], None] = lambda _: None
    """(tokens of the batch)"""
    segment_done: Callable[[int, int], None] = lambda *_: None
    """(segment number, segments planned)"""
    warn: Callable[[str], None] = lambda _: None
    note: Callable[[str], None] = lambda _: None


def ingest(options: IngestOptions, layout: Layout, progress: Progress | None = None) -> Summary:
    """Run the prompts through the model and commit every segment of this process's share that is not there yet.

    Raises UsageError or MoewhError; what was committed before stays, and nothing half-written is left.
    """
    process = this_process()
    if process.world > 1 and STDIN in options.prompts:
        raise UsageError("several processes cannot share standard input. Write the prompts to a file first.")
    chat_arguments(options.chat_arguments)  # refused before anything is loaded
    layout.require_one_disk(options.run_id if options.run_id and not is_complete(layout, options.run_id) else None)
    with PromptStream(options, layout) as prompts:
        if progress is not None and prompts.skipped:
            progress.note(_skipped(prompts.skipped))
        loaded = load_model(options, process)
        run = _Run(options, layout, prompts, loaded, progress or Progress())
        try:
            return run.execute()
        finally:
            run.leave()


def _skipped(files: Sequence[str]) -> str:
    named = ", ".join(files[:5]) + (f" and {len(files) - 5} more" if len(files) > 5 else "")
    return f"skipped what is not a prompts file: {named}"


class _Run:
    """One command's run: the loaded model, the rules, the plan and the identity."""

    def __init__(
        self, options: IngestOptions, layout: Layout, prompts: PromptStream, loaded: LoadedModel, progress: Progress
    ) -> None:
        self.layout, self.prompts, self.loaded, self.progress = layout, prompts, loaded, progress
        # A budget of one token puts every context into a batch of its own.
        alone = any(site.reader.one_context_a_batch for site in loaded.sites)
        self.batch_tokens = 1 if alone else options.batch_tokens
        self.rules = TokenRules(
            _max_length(options, loaded),
            options.on_overflow,
            options.special_tokens,
            vocabulary=loaded.vocabulary_rows,
        )
        self.size = SizeRule(
            rows_per_token=top_k(loaded.config) * len(loaded.sites),
            max_length=self.rules.max_length,
            chunked=options.on_overflow == "chunk",
            segment_rows=options.segment_rows,
            generate=options.generate,
        )
        self.sampling = options.sampling
        if options.generate:
            _check_start(loaded)
        self.plan: Plan = prompts.plan(self.size)
        self.wanted = wanted_vectors(options, loaded.sites, loaded.text_config.model_type)
        self.rules = replace(self.rules, chats=_chat_rules(options, loaded, self.plan))
        self.identity: Identity = identify(loaded, options, self.rules, self.plan)
        if self.plan.chats and CLOCK in template_variables(loaded.tokenizer):
            self._fix_time(options)
        self.recorded = require_same(layout, self.identity)
        self.missing = this_process().share(self._missing())
        if self.missing:
            layout.require_one_disk(self.identity.run_id)
        self.texts = TokenTexts(loaded.tokenizer)
        self.batches = BatchRunner(loaded, self.wanted, self._begin)
        self.summary = Summary(self.identity.run_id, self.plan.segments)

    def execute(self) -> Summary:
        """Commit every missing segment in order."""
        began = time.monotonic()
        if self.missing and not self.recorded:
            self._require_tokens()
        with _workers(in_background(self.loaded.model.device)) as (ahead, collector, writer):
            tokenised = [ahead.submit(self._tokenise, number) for number in self.missing[:1]]
            writing: list[Future[Committed]] = []
            for place, number in enumerate(self.missing):
                segment = tokenised.pop().result()
                tokenised = [ahead.submit(self._tokenise, later) for later in self.missing[place + 1 : place + 2]]
                if self.sampling is None:
                    routing, collected = self._observe(segment, collector)
                else:
                    segment, routing = self._generate(segment, self.sampling)
                    collected = []
                self._committed(writing)
                writing = [writer.submit(self._write, number, segment, routing, collected)]
            self._committed(writing)
            self.summary.waiting += sum(w.seconds for w in (collector, writer) if isinstance(w, _InBetween))
        if not self.recorded:
            self.batches.prove()  # the run's own files were lost, its segments not
        self.prompts.finished(complete=not self._missing())
        self.summary.seconds = time.monotonic() - began
        self.summary.peak_memory = _peak_memory()
        return self.summary

    def leave(self) -> None:
        """Let a run that did not begin start at another time; of several processes another may be about to begin it."""
        alone = this_process().world == 1
        if alone and self.rules.chats.now is not None and not self.layout.run(self.identity.run_id).is_dir():
            forget_time(self.layout, self.identity.run_id)

    def _missing(self) -> list[int]:
        segments = range(self.plan.segments)
        return [number for number in segments if not self.layout.segment(self.identity.run_id, number).is_dir()]

    def _tokenise(self, number: int) -> TokenisedSegment:
        start, stop = self.plan.bounds(number)
        table = self.prompts.read(start, stop)
        too_large = []
        if stop == start + 1 and estimated_rows(prompt_bytes(table), self.size)[0] > self.size.segment_rows:
            too_large = [0]
            self.progress.warn(
                f"prompt {start} alone has more rows than a segment ({self.size.segment_rows}); it is marked failed. "
                "Raise --segment-rows or lower --max-length."
            )
        segment = tokenise(table, start, self.loaded.tokenizer, self.rules, too_large, warn=self.progress.warn)
        if segment.without_tokens:
            more = f" and {len(segment.without_tokens) - 5} more" if len(segment.without_tokens) > 5 else ""
            self.progress.warn(
                f"prompts that are not empty give no tokens and are marked failed: "
                f"{', '.join(map(str, segment.without_tokens[:5]))}{more}."
            )
        return segment

    def _fix_time(self, options: IngestOptions) -> None:
        """Settle the time that the chat template sees; it is part of the run's identity."""
        identity = self.identity
        now = fix_time(self.layout, identity.run_id, identity.sha256, self._template_asks_for_time, not self._missing())
        if now is not None:
            self.rules = replace(self.rules, chats=replace(self.rules.chats, now=now))
            self.identity = identify(self.loaded, options, self.rules, self.plan)

    def _template_asks_for_time(self) -> bool:
        """Render chats until one makes the template ask for the time."""
        renderer = ChatRenderer(self.loaded.tokenizer, self.rules.chats)
        for first_prompt, table in self._tables():
            parts = zip(table.column("form").to_pylist(), table.column("text").to_pylist(), strict=True)
            for place, (form, payload) in enumerate(parts):
                if form == MESSAGES:
                    renderer.text(payload, f"prompt {first_prompt + place}")
                if renderer.saw_clock:
                    return True
        return False

    def _require_tokens(self) -> None:
        """Raise MoewhError if every prompt that is not empty gives no tokens: the tokenizer is not the model's."""
        without: list[int] = []
        for first_prompt, table in self._tables():
            part = tokenise(table, first_prompt, self.loaded.tokenizer, self.rules)
            without += part.without_tokens
            if len(part.without_tokens) + part.status_P.count("empty") < len(part.status_P):
                return
        if without:
            raise MoewhError(
                f"none of the {len(without):,} prompts that are not empty gives a token (first: prompt {without[0]}). "
                "Check the prompts, or name the model's tokenizer with --tokenizer."
            )

    def _tables(self) -> Iterator[tuple[int, Any]]:
        """Yield the prompts of the run a few at a time: (first prompt_id, canonical table)."""
        for number in range(self.plan.segments):
            start, stop = self.plan.bounds(number)
            table = self.prompts.read(start, stop)
            for offset in range(0, table.num_rows, _PROMPTS_LOOKED_AT):
                yield start + offset, table.slice(offset, _PROMPTS_LOOKED_AT)

    def _observe(self, segment: TokenisedSegment, collector: Executor) -> tuple[RoutingBuffer, list[Future[None]]]:
        """Launch every batch of a segment; the first of a command is proved right before anything is committed.

        The buffer is full once the futures are done.
        """
        routing = self._buffer(len(segment.vocab_id_T))
        collected: list[Future[None]] = []
        for contexts in plan_batches(segment.length_C, self.batch_tokens):
            for rows_T, pending in self.batches.run(
                segment, contexts, self._too_large(segment, routing.failed_prompts)
            ):
                collected.append(collector.submit(_collect, routing, rows_T, pending))
                self.progress.batch_done(len(rows_T))
                self._wait_for(collected[:-_BATCHES_AHEAD])
        self.batches.prove()
        return routing, collected

    def _generate(self, segment: TokenisedSegment, sampling: Sampling) -> tuple[TokenisedSegment, RoutingBuffer]:
        """Generate after every prompt of a segment; return the segment with what was said, and all routing."""
        failed: set[int] = set()
        done: list[GeneratedBatch] = []
        for contexts in plan_equal_batches(segment.length_C, self.batch_tokens, sampling.tokens):
            parts = self.batches.generate(segment, contexts, sampling, self._too_large(segment, failed))
            done += parts
            for part in parts:
                self.progress.batch_done(sum(part.prompt_length + len(tokens) for tokens in part.generated))
        self.batches.prove()
        routing = self._buffer(generated_size(segment, done))
        routing.failed_prompts |= failed
        return with_generated(segment, done, routing), routing

    def _buffer(self, tokens: int) -> RoutingBuffer:
        vectors = VectorBuffer(tokens, self.wanted.tables, self.layout.staging) if self.wanted.tables else None
        return RoutingBuffer(tokens, vectors)

    def _too_large(self, segment: TokenisedSegment, failed: set[int]) -> Callable[[int], None]:
        def tell(context: int) -> None:
            prompt = int(segment.prompt_T[segment.start_C[context]])
            failed.add(prompt)
            self.progress.warn(f"prompt {prompt} does not fit in the device's memory even alone; it is marked failed.")

        return tell

    def _write(
        self, number: int, segment: TokenisedSegment, routing: RoutingBuffer, collected: list[Future[None]]
    ) -> Committed:
        for part in collected:
            part.result()
        for layer, places in routing.invalid().items():
            prompts = ", ".join(str(prompt) for prompt in np.unique(segment.prompt_T[places])[:5])
            self.progress.warn(
                f"layer {layer}: {len(places)} tokens have weights that are not finite (prompts {prompts}); "
                "they have no rows there and their prompts are marked failed."
            )
        last = number == self.plan.segments - 1
        committed = write_segment(self.layout, self.identity, number, segment, routing, texts=self.texts, last=last)
        self.progress.segment_done(number, self.plan.segments)
        return committed

    def _committed(self, writing: list[Future[Committed]]) -> None:
        self._wait_for(writing)
        self.summary.written += [segment.result() for segment in writing]

    def _wait_for(self, futures: Sequence[Future[Any]]) -> None:
        """Wait, count the time as lost to the forward passes, and raise what went wrong there."""
        began = time.monotonic()
        for future in futures:
            future.result()
        self.summary.waiting += time.monotonic() - began

    def _begin(self, facts: dict[int, LayerFacts]) -> None:
        """Make the warehouse and the run's own files, now that the model has proved right."""
        self.layout.create()
        self.layout.sweep()
        if not self.recorded:
            write_run(self.layout, describe_run(self.loaded, self.identity, facts, self.plan))
        self.progress.started(self.identity, len(self.missing))
        if self.wanted.tables:
            size = self.wanted.bytes_per_token(self.loaded.sites, self.loaded.text_config.hidden_size)
            names = " and ".join(table.name for table in self.wanted.tables)
            self.progress.note(f"{names} take about {size:,} bytes a token before compression")


def _collect(routing: RoutingBuffer, rows_T: Rows, pending: PendingRouting) -> None:
    routing.add(rows_T, pending.wait())
    if routing.vectors is not None:
        routing.vectors.add(rows_T, pending.wait_for_vectors())


def in_background(device: torch.device) -> bool:
    """Tell whether threads beside the forward passes are of use.

    On a CPU these have every core already. A third thread makes torch's wait for each other at every operation, which
    cost 17 % on two cores where doing the same work in between cost a few.
    """
    return device.type != "cpu"


class _InBetween(Executor):
    """Does what it is given at once, in the caller's thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """What that took."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return what the work gave or raised, as a future that is done."""
        done: Future[Any] = Future()
        began = time.monotonic()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        self.seconds += time.monotonic() - began
        return done


@contextmanager
def _workers(background: bool) -> Iterator[tuple[Executor, Executor, Executor]]:
    """Yield a worker each for tokenising, collecting and writing; on an error what has not begun is dropped."""
    names = ("tokenise", "collect", "write")
    workers = tuple(ThreadPoolExecutor(1, f"moewh-{name}") if background else _InBetween() for name in names)
    try:
        yield workers[0], workers[1], workers[2]
    finally:
        for worker in workers:
            worker.shutdown(cancel_futures=True)


def _peak_memory() -> int:
    """Most resident memory of this process, in bytes; Linux counts it in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _chat_rules(options: IngestOptions, loaded: LoadedModel, plan: Plan) -> ChatRules:
    """Return how chats are rendered. Raises UsageError for options of chats that have no effect."""
    arguments = chat_arguments(options.chat_arguments)
    given = "--chat-argument" if arguments else "--chat-template" if options.chat_template else None
    if not plan.chats:
        if given:
            raise UsageError(f"{given} has no effect: no prompt is chat messages. Leave it out.")
        return ChatRules()
    used = template_variables(loaded.tokenizer)
    for name in arguments:
        if name not in used:
            raise UsageError(f"--chat-argument {name}: the chat template does not use {name}.")
    return ChatRules(arguments, bool(options.generate) and GENERATION_PROMPT in used)


def _check_start(loaded: LoadedModel) -> None:
    """Raise MoewhError if an encoder-decoder's decoder would start from a token that the model does not have."""
    start, rows = loaded.model.generation_config.decoder_start_token_id, loaded.vocabulary_rows
    if loaded.config.is_encoder_decoder and isinstance(start, int) and rows is not None and not 0 <= start < rows:
        raise MoewhError(
            f"decoder_start_token_id {start} is outside the model's vocabulary ({rows:,} rows). Correct "
            "generation_config.json."
        )


def _max_length(options: IngestOptions, loaded: LoadedModel) -> int:
    """Longest prompt in tokens: what the option says, else what the model takes less what is generated."""
    most = loaded.max_length - options.generate
    if (options.max_length or 1) > most:
        asked = options.max_length or f"with --generate {options.generate}"
        raise UsageError(f"--max-length {asked} is more than {loaded.source.title} takes: give at most {most}.")
    return options.max_length or most
