"""The forward pass over one batch, observed: launched here, waited for elsewhere.

A batch that does not fit in the device's memory is halved, and so are later ones of its size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from moewh.ingest.capture.generation import GeneratedBatch, generate_batch
from moewh.ingest.capture.hooks import PendingRouting, capture_routing, run_stack, to_device
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.model.loading import LoadedModel
from moewh.ingest.options import Sampling
from moewh.ingest.prompts.batches import Batch, make_batch
from moewh.ingest.proof.measure import LayerFacts, measure_layers
from moewh.ingest.proof.rebuild import observe_calls, verify_layers
from moewh.ingest.routing import TokenisedSegment

Rows = npt.NDArray[np.int64]
Result = TypeVar("Result")

PROBE = Batch(np.arange(4)[None], np.ones((1, 4), np.int64), np.arange(4))
"""Stands in for the first batch where a segment has no tokens at all."""


@torch.inference_mode()
def run_batch(loaded: LoadedModel, batch: Batch, wanted: WantedVectors) -> PendingRouting:
    """Launch one batch; what each layer does with its real tokens can be waited for."""
    with capture_routing(loaded.found, batch.attention_mask_BS, wanted) as capture:
        run_stack(loaded.model, *_on_device(loaded, batch))
    return capture.take()


@torch.inference_mode()
def run_verified_batch(
    loaded: LoadedModel, batch: Batch, wanted: WantedVectors
) -> tuple[PendingRouting, dict[int, LayerFacts]]:
    """Run one batch, prove that every layer's output is what was captured, and measure the layers.

    Raises MoewhError naming the module that does something else.
    """
    input_ids_BS, attention_mask_BS = _on_device(loaded, batch)
    with (
        capture_routing(loaded.found, batch.attention_mask_BS, wanted) as capture,
        observe_calls(loaded.sites, attention_mask_BS) as seen,
    ):
        speaking = any(site.stack == "decoder" for site in loaded.sites)
        run_stack(loaded.model, input_ids_BS, attention_mask_BS, speaking=speaking)
    verify_layers(loaded.sites, seen)
    return capture.take(), measure_layers(loaded.sites, seen, loaded.config)


class BatchRunner:
    """Runs the batches of a command, halving those that are too large for the device."""

    def __init__(
        self, loaded: LoadedModel, wanted: WantedVectors, first_batch: Callable[[dict[int, LayerFacts]], None]
    ) -> None:
        """`first_batch` is told what the first batch showed of each layer, once it has proved right."""
        self._loaded = loaded
        self._wanted = wanted
        self._first_batch = first_batch
        self._verified = False
        self._too_large: int | None = None
        """Padded tokens of the smallest batch that did not fit."""

    def run(
        self, segment: TokenisedSegment, contexts: Rows, too_large: Callable[[int], None]
    ) -> list[tuple[Rows, PendingRouting]]:
        """Launch these contexts as one batch, or as several smaller ones if memory is short.

        Returns the rows of the segment that each one fills. `too_large` is told the place of a context that does
        not fit even alone.
        """

        def launch(part: Rows) -> tuple[Rows, PendingRouting]:
            batch = make_batch(segment, part, self._loaded.pad_id)
            return batch.rows_T, self._launch(batch)

        return self._in_parts(contexts, int(segment.length_C[contexts].max()), launch, too_large)

    def generate(
        self, segment: TokenisedSegment, contexts: Rows, sampling: Sampling, too_large: Callable[[int], None]
    ) -> list[GeneratedBatch]:
        """Generate after contexts of equal length, as one batch or in smaller ones: see `run`."""
        if not self._verified:
            self._launch(make_batch(segment, contexts[:1], self._loaded.pad_id))

        def launch(part: Rows) -> GeneratedBatch:
            return generate_batch(self._loaded, segment, part, sampling, self._wanted)

        longest = int(segment.length_C[contexts[0]]) + sampling.tokens
        return self._in_parts(contexts, longest, launch, too_large)

    def prove(self) -> None:
        """Make sure that a batch has proved right, even if the prompts have no tokens."""
        if not self._verified:
            self._launch(PROBE)

    def _in_parts(
        self, contexts: Rows, longest: int, launch: Callable[[Rows], Result], too_large: Callable[[int], None]
    ) -> list[Result]:
        """Launch contexts together, or halved until they fit; sizes that did not fit once are not tried again."""
        padded = len(contexts) * longest
        if self._too_large is None or padded < self._too_large or len(contexts) == 1:
            with contextlib.suppress(torch.OutOfMemoryError):  # leaving it frees what the pass held
                return [launch(contexts)]
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._too_large = min(padded, self._too_large or padded)
            if len(contexts) == 1:
                too_large(int(contexts[0]))
                return []
        halves = np.array_split(contexts, 2)
        return [done for half in halves for done in self._in_parts(half, longest, launch, too_large)]

    def _launch(self, batch: Batch) -> PendingRouting:
        if self._verified:
            return run_batch(self._loaded, batch, self._wanted)
        with contextlib.nullcontext() if self._loaded.adapter is None else self._loaded.adapter.running():
            pending, facts = run_verified_batch(self._loaded, batch, self._wanted)
        self._first_batch(facts)
        self._verified = True
        return pending


def _on_device(loaded: LoadedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    device = loaded.model.device
    return to_device(batch.input_ids_BS, device), to_device(batch.attention_mask_BS, device)
