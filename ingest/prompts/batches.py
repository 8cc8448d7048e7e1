"""Batches: right-padded groups of contexts of similar length, within a budget of padded tokens.

A pure function of the segment's contexts and the budget, never of arrival order or earlier segments.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moewh.ingest.routing import TokenisedSegment


@dataclass(frozen=True)
class Batch:
    """One forward pass: B contexts padded on the right to S positions."""

    input_ids_BS: npt.NDArray[np.int64]
    attention_mask_BS: npt.NDArray[np.int64]
    rows_T: npt.NDArray[np.int64]
    """Offsets of the batch's real tokens, in row-major order, in the segment's flat arrays."""


def plan_batches(length_C: npt.NDArray[np.int64], batch_tokens: int) -> list[npt.NDArray[np.int64]]:
    """Group contexts, longest first, so that B * S ≤ batch_tokens. A context over the budget is a batch by itself.

    Longest first, so that running out of memory shows at once.
    """
    order_C = np.argsort(-length_C, kind="stable")
    batches, start = [], 0
    while start < len(order_C):
        size = max(1, batch_tokens // int(length_C[order_C[start]]))
        batches.append(order_C[start : start + size])
        start += size
    return batches


def make_batch(segment: TokenisedSegment, contexts: npt.NDArray[np.int64], pad_id: int) -> Batch:
    """Return the batch of these contexts, padded to the longest."""
    lengths = segment.length_C[contexts]
    positions = np.arange(lengths.max())
    mask_BS = positions < lengths[:, None]
    rows_T = (segment.start_C[contexts][:, None] + positions)[mask_BS]
    input_ids_BS = np.full(mask_BS.shape, pad_id, np.int64)
    input_ids_BS[mask_BS] = segment.vocab_id_T[rows_T]
    return Batch(input_ids_BS, mask_BS.astype(np.int64), rows_T)
