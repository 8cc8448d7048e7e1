"""The observed forward pass over one batch: launched here, waited for elsewhere.

A batch that does not fit in the device's memory is halved, and so are later batches of its size.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
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
"""Replaces the first batch if a segment has no tokens."""


@torch.inference_mode()
def run_batch(loaded: LoadedModel, batch: Batch, wanted: WantedVectors) -> PendingRouting:
    """Launch one batch; the result waits for each layer's routing of its real tokens."""
    with capture_routing(loaded.found, batch.attention_mask_BS, wanted) as capture:
        run_stack(loaded.model, *_on_device(loaded, batch))
    return capture.take()


@torch.inference_mode()
def run_verified_batch(
    loaded: LoadedModel, batch: Batch, wanted: WantedVectors
) -> tuple[PendingRouting, dict[int, LayerFacts]]:
    """Run one batch, prove that every layer's output follows from what was captured, and measure the layers.

    Raises MoewhError with the module that does something else.
    """
    input_ids_BS, attention_mask_BS = _on_device(loaded, batch)
    with (
        capture_routing(loaded.found, batch.attention_mask_BS, wanted) as capture,
        observe_calls(loaded.moe_layers, attention_mask_BS) as seen,
    ):
        run_decoder = any(moe.stack == "decoder" for moe in loaded.moe_layers)
        run_stack(loaded.model, input_ids_BS, attention_mask_BS, run_decoder=run_decoder)
    verify_layers(loaded.moe_layers, seen)
    return capture.take(), measure_layers(loaded.moe_layers, seen, loaded.config)


Batches = deque[Rows]
"""The contexts of each batch still to run, in order."""
TooLarge = Callable[[int], None]
"""Called with the index of a context that does not fit in the device's memory even alone."""


@dataclass(frozen=True)
class Proof:
    """The result of the first batch, after every layer's output was rebuilt from what was captured."""

    facts: dict[int, LayerFacts]
    first: tuple[Rows, PendingRouting] | None
    """That batch's rows in the segment and their routing; None if none of the segment's batches could be run."""


class BatchRunner:
    """Runs the batches of a command, halving those that are too large for the device."""

    def __init__(self, loaded: LoadedModel, wanted: WantedVectors) -> None:
        self._loaded = loaded
        self._wanted = wanted
        self._too_large: int | None = None
        """Padded tokens of the smallest batch that did not fit."""

    def prove(self, segment: TokenisedSegment, batches: Batches, too_large: TooLarge) -> Proof:
        """Run the first of the batches, and prove that every layer's output follows from what was captured.

        It is removed from `batches`. If none fits, a few made-up tokens are used instead. Raises MoewhError with the
        module that does something else.
        """

        def launch(part: Rows) -> Proof:
            batch = make_batch(segment, part, self._loaded.pad_id)
            pending, facts = self._verified(batch)
            return Proof(facts, (batch.rows_T, pending))

        return self._first(batches, partial(_padded_tokens, segment), launch, too_large) or self.prove_on_probe()

    def prove_on_probe(self) -> Proof:
        """Prove the capture on a few made-up tokens, for a command without a segment to run. Raises as `prove`."""
        return Proof(self._verified(PROBE)[1], None)

    def run(
        self, segment: TokenisedSegment, batches: Batches, too_large: TooLarge
    ) -> Iterator[tuple[Rows, PendingRouting]]:
        """Launch the batches one after another, split into smaller ones if memory is short; empties `batches`.

        Yields the rows in the segment that each one fills, and their routing.
        """

        def launch(part: Rows) -> tuple[Rows, PendingRouting]:
            batch = make_batch(segment, part, self._loaded.pad_id)
            return batch.rows_T, run_batch(self._loaded, batch, self._wanted)

        padded = partial(_padded_tokens, segment)
        while (done := self._first(batches, padded, launch, too_large)) is not None:
            yield done

    def generate(
        self, segment: TokenisedSegment, batches: Batches, sampling: Sampling, too_large: TooLarge
    ) -> Iterator[GeneratedBatch]:
        """Generate after the contexts of each batch, which are of equal length: see `run`."""

        def launch(part: Rows) -> GeneratedBatch:
            return generate_batch(self._loaded, segment, part, sampling, self._wanted)

        def padded(part: Rows) -> int:
            return len(part) * (int(segment.length_C[part[0]]) + sampling.tokens)

        while (done := self._first(batches, padded, launch, too_large)) is not None:
            yield done

    def _first(
        self, batches: Batches, padded: Callable[[Rows], int], launch: Callable[[Rows], Result], too_large: TooLarge
    ) -> Result | None:
        """Launch the first of `batches`, halved until it fits; None if nothing is left.

        The other halves go back to the front. A size that did not fit once is not tried again.
        """
        while batches:
            contexts = batches.popleft()
            size = padded(contexts)
            if self._too_large is None or size < self._too_large or len(contexts) == 1:
                with contextlib.suppress(torch.OutOfMemoryError):  # leaving this block frees the pass's memory
                    return launch(contexts)
                if torch.cuda.is_available():
                    torch.cuda.empty_cache()
                self._too_large = min(size, self._too_large or size)
                if len(contexts) == 1:
                    too_large(int(contexts[0]))
                    continue
            batches.extendleft(reversed(np.array_split(contexts, 2)))
        return None

    def _verified(self, batch: Batch) -> tuple[PendingRouting, dict[int, LayerFacts]]:
        with contextlib.nullcontext() if self._loaded.adapter is None else self._loaded.adapter.running():
            return run_verified_batch(self._loaded, batch, self._wanted)


def _padded_tokens(segment: TokenisedSegment, contexts: Rows) -> int:
    """Return the tokens of a batch of these contexts, padding included."""
    return len(contexts) * int(segment.length_C[contexts].max())


def _on_device(loaded: LoadedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    device = loaded.model.device
    return to_device(batch.input_ids_BS, device), to_device(batch.attention_mask_BS, device)
