"""One run from end to end: prompts and a model in, committed segments out.

The unit is the segment: tokenise its prompts, run its batches, commit. A segment that is already there
is skipped, so that re-running a command resumes it and a finished one is left alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from ingest.batches import Batch, make_batches
from ingest.capture import LayerRouting, capture_routing, run_stack
from ingest.expected import top_k
from ingest.guards import observe_calls, verify_layers
from ingest.identity import Identity, identify, require_same, write_run
from ingest.measure import LayerFacts, measure_layers
from ingest.model import LoadedModel, load_model
from ingest.options import IngestOptions
from ingest.prompts import Plan, PromptStream, SizeRule, estimated_rows, prompt_bytes
from ingest.segment import Committed, RoutingBuffer, write_segment
from ingest.tokenise import TokenisedSegment, TokenRules, TokenTexts, tokenise
from warehouse.errors import UsageError
from warehouse.layout import Layout


@dataclass
class Summary:
    """What a command did, for its closing line."""

    run_id: str
    segments: int
    """Segments of the whole run."""
    written: list[Committed] = field(default_factory=list)
    """Segments this command committed."""
    seconds: float = 0.0


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


def ingest(options: IngestOptions, layout: Layout, progress: Progress | None = None) -> Summary:
    """Run the prompts through the model and commit every segment that is not there yet.

    Raises UsageError or MoewhError; what was committed before stays, and nothing half-written is left.
    """
    with PromptStream(options, layout) as prompts:
        loaded = load_model(options)
        run = _Run(options, layout, prompts, loaded, progress or Progress())
        return run.execute()


class _Run:
    """One command's run: the loaded model, the rules, the plan and the identity."""

    def __init__(
        self, options: IngestOptions, layout: Layout, prompts: PromptStream, loaded: LoadedModel, progress: Progress
    ) -> None:
        self.layout, self.prompts, self.loaded, self.progress = layout, prompts, loaded, progress
        # A budget of one token puts every context into a batch of its own.
        alone = any(site.reader.one_context_a_batch for site in loaded.sites)
        self.batch_tokens = 1 if alone else options.batch_tokens
        self.rules = TokenRules(_max_length(options, loaded), options.on_overflow, options.special_tokens)
        self.size = SizeRule(
            rows_per_token=top_k(loaded.config) * len(loaded.sites),
            max_length=self.rules.max_length,
            chunked=options.on_overflow == "chunk",
            segment_rows=options.segment_rows,
        )
        self.plan: Plan = prompts.plan(self.size)
        self.identity: Identity = identify(loaded, options, self.rules, self.plan)
        self.recorded = require_same(layout, self.identity)
        self.verified = False
        self.missing: list[int] = []
        self.texts = TokenTexts(loaded.tokenizer)

    def execute(self) -> Summary:
        """Commit every missing segment in order."""
        summary = Summary(self.identity.run_id, self.plan.segments)
        began = time.monotonic()
        segments = range(self.plan.segments)
        self.missing = [n for n in segments if not self.layout.segment(self.identity.run_id, n).is_dir()]
        for number in self.missing:
            summary.written.append(self._write(number))
            self.progress.segment_done(number, self.plan.segments)
        self.prompts.finished()
        summary.seconds = time.monotonic() - began
        return summary

    def _write(self, number: int) -> Committed:
        segment = self._tokenise(number)
        routing = self._observe(segment)
        for layer, places in routing.invalid().items():
            prompts = ", ".join(str(prompt) for prompt in np.unique(segment.prompt_T[places])[:5])
            self.progress.warn(
                f"layer {layer}: {len(places)} tokens have weights that are not finite (prompts {prompts}); "
                "they have no rows there and their prompts are marked failed."
            )
        target = self.layout.segment(self.identity.run_id, number)
        last = number == self.plan.segments - 1
        return write_segment(self.layout, target, segment, routing, texts=self.texts, last=last)

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
        return tokenise(table, start, self.loaded.tokenizer, self.rules, too_large)

    def _observe(self, segment: TokenisedSegment) -> RoutingBuffer:
        """Run every batch of a segment; the first of a command is proved right before anything is committed."""
        routing = RoutingBuffer(len(segment.vocab_id_T))
        for batch in make_batches(segment, self.batch_tokens, self.loaded.pad_id):
            routing.add(batch.rows_T, self._run_batch(batch))
            self.progress.batch_done(len(batch.rows_T))
        if not self.verified:
            self._run_batch(_PROBE)
        return routing

    def _run_batch(self, batch: Batch) -> dict[int, LayerRouting]:
        if self.verified:
            return run_batch(self.loaded, batch)
        routing, facts = run_verified_batch(self.loaded, batch)
        self._begin(facts)
        self.verified = True
        return routing

    def _begin(self, facts: dict[int, LayerFacts]) -> None:
        """Make the warehouse and the run's own files, now that the model has proved right."""
        self.layout.create()
        self.layout.sweep()
        if not self.recorded:
            write_run(self.layout, self.identity, self.loaded, facts, self.plan)
        self.progress.started(self.identity, len(self.missing))


_PROBE = Batch(np.arange(4)[None], np.ones((1, 4), np.int64), np.arange(4))
"""Stands in for the first batch where a segment has no tokens at all."""


@torch.inference_mode()
def run_batch(loaded: LoadedModel, batch: Batch) -> dict[int, LayerRouting]:
    """Run one batch through the model and return what each layer did with its real tokens."""
    input_ids_BS, attention_mask_BS = _on_device(loaded, batch)
    with capture_routing(loaded.found, attention_mask_BS) as capture:
        run_stack(loaded.model, input_ids_BS, attention_mask_BS)
    return capture.take()


@torch.inference_mode()
def run_verified_batch(loaded: LoadedModel, batch: Batch) -> tuple[dict[int, LayerRouting], dict[int, LayerFacts]]:
    """Run one batch, prove that every layer's output is what was captured, and measure the layers.

    Raises MoewhError naming the module that does something else.
    """
    input_ids_BS, attention_mask_BS = _on_device(loaded, batch)
    with (
        capture_routing(loaded.found, attention_mask_BS) as capture,
        observe_calls(loaded.sites, attention_mask_BS) as seen,
    ):
        run_stack(loaded.model, input_ids_BS, attention_mask_BS)
    routing = capture.take()
    verify_layers(loaded.sites, seen)
    return routing, measure_layers(loaded.sites, seen, loaded.config)


def _on_device(loaded: LoadedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    device = loaded.model.device
    return torch.from_numpy(batch.input_ids_BS).to(device), torch.from_numpy(batch.attention_mask_BS).to(device)


def _max_length(options: IngestOptions, loaded: LoadedModel) -> int:
    if options.max_length is not None and options.max_length > loaded.max_length:
        raise UsageError(
            f"--max-length {options.max_length} is more than {loaded.source.title} takes: "
            f"give at most {loaded.max_length}."
        )
    return options.max_length or loaded.max_length
