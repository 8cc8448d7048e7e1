"""Sequences while they are recorded, side by side in blocks; then a segment: blocks in, arrays out.

A block is B sequences that the model saw together. It grows to the right with each pass that continues a cache,
padding included, until it is closed; then its passes are joined, once. Shapes: B sequences, S positions, T tokens
without padding, K experts per token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.prompts.in_memory import plain_value
from moewh.ingest.prompts.records import INPUT_IDS
from moewh.ingest.recorder.arguments import checked_text
from moewh.ingest.routing import NO_ENTRY, NO_ROUTE, LayerRouting, RoutingBuffer, TokenisedSegment
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.schema import POSITION_BITS

Bools = npt.NDArray[np.bool_]
Decode = Callable[[list[list[int]]], Sequence[str]]
"""Gives the text of each of some sequences of token ids."""


@dataclass(frozen=True)
class Labels:
    """What a user states about a sequence."""

    domain: str | None = None
    source: str | None = None
    metadata: str | None = None
    """A JSON object; None for none."""

    @classmethod
    def of(cls, domain: Any, source: Any, metadata: Any) -> Labels:
        """Check labels. Raises UsageError for what is not text, or not JSON."""
        labels = checked_text("domain", domain), checked_text("source", source)
        if metadata is not None and not isinstance(metadata, Mapping):
            raise UsageError(f"metadata are a {type(metadata).__name__}. Give a dict.")
        try:
            packed = json.dumps(dict(metadata), allow_nan=False, default=plain_value) if metadata else None
            json.dumps(json.loads(packed or "{}"), ensure_ascii=False).encode()  # refuses halves of surrogate pairs
            return cls(*labels, packed)
        except (TypeError, ValueError) as error:
            raise UsageError(f"metadata cannot be kept as JSON: {error}. Give what json takes.") from None


@dataclass(frozen=True)
class Part:
    """One pass over a block: B sequences, S positions each."""

    ids_BS: npt.NDArray[np.int32]
    """NO_ENTRY where no token id is known."""
    mask_BS: Bools
    """False for padding."""
    generated: bool
    """The model itself generated these tokens."""
    routing: dict[int, LayerRouting]
    """By layer, [B*S, K]."""
    after_end_BS: npt.NDArray[np.int64] | None = None
    """How far a token lies behind the end of its sequence in `generate`, 0 for the end token; None where none ended."""


@dataclass
class Block:
    """Some sequences side by side, in order of appearance."""

    labels: Labels
    parts: list[Part] = field(default_factory=list)
    closed: bool = False
    """True once no pass can continue it."""
    refused: bool = False
    """True once a pass was refused, so that later ones would leave a gap."""
    text: str | None = None
    """Text of its only sequence, where it was given; else the ids are decoded."""


@dataclass(frozen=True)
class Joined:
    """A closed block: its tokens without padding, sequence after sequence."""

    labels: Labels
    text: str | None
    length_B: npt.NDArray[np.int64]
    """Of the sequences that have any token."""
    ids_T: npt.NDArray[np.int32]
    generated_T: Bools
    routing: dict[int, LayerRouting]

    @property
    def rows(self) -> int:
        """An upper bound of its routing rows."""
        return sum(layer.expert_ids_TK.size for layer in self.routing.values())


def join(block: Block) -> Joined:
    """Concatenate the passes of a closed block.

    What `generate` feeds to a finished sequence while others continue is padding; its end token has no rows, as in a
    batch that stops with it. Raises MoewhError for a mask with a gap.
    """
    ids_BS = np.concatenate([part.ids_BS for part in block.parts], 1)
    mask_BS = np.concatenate([part.mask_BS for part in block.parts], 1)
    generated_S = np.concatenate([np.full(part.ids_BS.shape[1], part.generated) for part in block.parts])
    after_end_BS = np.concatenate([_after_end(part) for part in block.parts], 1)
    require_whole(mask_BS)
    mask_BS = mask_BS & (after_end_BS <= 0)
    require_whole(mask_BS, "a finished sequence goes on in the cache of its batch, after padding from `generate`. ")
    real = np.flatnonzero(mask_BS)
    B = len(ids_BS)
    routing = {}
    for layer in block.parts[0].routing:
        routing[layer] = _side_by_side([part.routing[layer] for part in block.parts], B).take(real)
        routing[layer].expert_ids_TK[(after_end_BS == 0).ravel()[real]] = NO_ROUTE
    length_B = mask_BS.sum(1)
    generated_T = np.broadcast_to(generated_S, ids_BS.shape)[mask_BS]
    ids_T = ids_BS.ravel()[real]
    return Joined(block.labels, block.text, length_B[length_B > 0], ids_T, generated_T, routing)


_MASKED = "attention_mask masks positions between tokens. "


def require_whole(mask_BS: Bools, reason: str = _MASKED) -> None:
    """Raise MoewhError for a mask with a gap between tokens."""
    starts_BS = mask_BS[:, 1:] & ~mask_BS[:, :-1]
    if len(mask_BS) and (starts_BS.sum(1) + mask_BS[:, 0]).max(initial=0) > 1:
        raise MoewhError(f"{reason}Only padding before or after a sequence's tokens can be masked.")


def _side_by_side(parts: list[LayerRouting], B: int) -> LayerRouting:
    """Put passes over B sequences side by side: [B*S, K] each in, [B*(S+S'+…), K] out."""

    def together(arrays: list[Any]) -> Any:
        K = arrays[0].shape[1]
        return np.concatenate([array.reshape(B, -1, K) for array in arrays], 1).reshape(-1, K)

    weights = [part.weights_TK for part in parts if part.weights_TK is not None]
    return LayerRouting(
        together([part.expert_ids_TK for part in parts]), together(weights) if weights else None, parts[0].ordered
    )


def _after_end(part: Part) -> npt.NDArray[np.int64]:
    return np.full(part.ids_BS.shape, -1) if part.after_end_BS is None else part.after_end_BS


def assemble(
    blocks: Sequence[Joined], first_prompt: int, *, decode: Decode | None, special_ids: Collection[int] = ()
) -> tuple[TokenisedSegment, RoutingBuffer]:
    """Return the segment of some blocks, whose sequences become prompts from `first_prompt` on, and their routing.

    Without `decode`, only blocks with a given text have texts. Raises MoewhError for a sequence that is too long.
    """
    length_P = np.concatenate([block.length_B for block in blocks])
    if length_P.max(initial=0) > 1 << POSITION_BITS:
        raise MoewhError(f"a sequence has {length_P.max():,} tokens, and at most {1 << POSITION_BITS:,} are recorded.")
    ids_T = np.concatenate([block.ids_T for block in blocks])
    generated_T = np.concatenate([block.generated_T for block in blocks])
    start_P = np.cumsum(length_P) - length_P
    routing = RoutingBuffer(len(ids_T))
    row = 0
    for block in blocks:
        routing.add(np.arange(row, row + len(block.ids_T)), block.routing)
        row += len(block.ids_T)
    owner = [block for block in blocks for _ in block.length_B]
    spans = [slice(start, start + length) for start, length in zip(start_P, length_P, strict=True)]
    sequences = [ids_T[span].tolist() for span in spans]
    prompts = [ids_T[span][~generated_T[span]].tolist() for span in spans]
    texts: list[str | None] = [block.text for block in owner]
    if decode is not None:
        unread = [index for index, text in enumerate(texts) if text is None and NO_ENTRY not in prompts[index]]
        for index, text in zip(unread, decode([prompts[index] for index in unread]), strict=True):
            texts[index] = text
    segment = TokenisedSegment(
        prompts=_prompt_table(owner, sequences),
        text_P=texts,
        first_prompt=first_prompt,
        status_P=["ok"] * len(length_P),
        num_tokens_P=length_P,
        prompt_T=np.repeat(np.arange(first_prompt, first_prompt + len(length_P)), length_P),
        position_T=(np.arange(len(ids_T)) - np.repeat(start_P, length_P)).astype(np.int32),
        context_T=np.zeros(len(ids_T), np.int32),
        vocab_id_T=ids_T,
        special_T=np.isin(ids_T, list(special_ids)) & ~generated_T,
        start_C=start_P,
        length_C=length_P,
        generated_T=generated_T,
    )
    return segment, routing


def _prompt_table(owner: list[Joined], sequences: list[list[int]]) -> pa.Table:
    """The canonical columns: each sequence's ids as its text, with its labels."""
    columns = {
        "text": [json.dumps(ids, separators=(",", ":")) for ids in sequences],
        "form": [INPUT_IDS] * len(owner),
        **{name: [getattr(block.labels, name) for block in owner] for name in ("domain", "source", "metadata")},
    }
    return pa.table(columns, schema=CANONICAL)
