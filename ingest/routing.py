"""A segment's rows as arrays: its prompts and tokens, and what each token chose at each layer.

Whoever observes routing (a forward pass, another program's trace) hands these to the writer. Nothing here depends on
torch, transformers or the command. Shapes: P prompts, T tokens, C contexts, K experts per token.
"""

from __future__ import annotations

import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moewh.warehouse.files.schema import POSITION_BITS, Table

KINDS = ("prompt", "special", "generated")
"""Values of tokens.kind."""
NO_ROUTE = -1
"""The expert of a token that no expert receives: dropped by capacity, or skipped by the router."""
NO_ENTRY = -1
"""The vocabulary entry of an unknown token: NULL in every table, and left out of counts by entry."""
VectorKey = tuple[Table, int]
"""(table, layer)"""
Texts = Callable[[npt.NDArray[np.int32]], pa.Array]
"""Maps T vocabulary entries to their texts, as an Arrow array of strings or a dictionary of them."""


class TokenTexts:
    """Looks up the texts of vocabulary entries in a vocabulary's [V] texts."""

    def __init__(self, vocabulary: pa.Array | None) -> None:
        """Without a vocabulary, every token's text is NULL."""
        self._vocabulary = vocabulary

    def __call__(self, vocab_id_T: npt.NDArray[np.int32]) -> pa.Array:
        """Return the text of each token, as an Arrow dictionary array of T strings."""
        if self._vocabulary is None:
            return pa.nulls(len(vocab_id_T), pa.string()).dictionary_encode()
        return pa.DictionaryArray.from_arrays(pa.array(vocab_id_T, pa.int32()), self._vocabulary)


@dataclass(frozen=True)
class TokenisedSegment:
    """The tokens of one segment's prompts: P prompts, T tokens, C contexts."""

    prompts: pa.Table
    """[P] with the canonical columns, as they were read."""
    text_P: Sequence[str | None]
    """As tokenised: messages after the chat template, token ids decoded. None where the text is unknown."""
    first_prompt: int
    status_P: list[str]
    num_tokens_P: npt.NDArray[np.int64]
    prompt_T: npt.NDArray[np.int64]
    """prompt_id of each token."""
    position_T: npt.NDArray[np.int32]
    context_T: npt.NDArray[np.int32]
    vocab_id_T: npt.NDArray[np.int32]
    """NO_ENTRY where a token's entry is unknown."""
    special_T: npt.NDArray[np.bool_]
    start_C: npt.NDArray[np.int64]
    """Where each context begins in the flat arrays."""
    length_C: npt.NDArray[np.int64]
    without_tokens: tuple[int, ...] = ()
    """prompt_id of the non-empty prompts that give no tokens."""
    generated_T: npt.NDArray[np.bool_] | None = None
    """Marks the tokens that the model generated; None if it generated nothing."""

    @property
    def kind_T(self) -> npt.NDArray[np.int8]:
        """Each token's kind, as an index into KINDS."""
        kind_T = self.special_T.astype(np.int8)
        if self.generated_T is not None:
            kind_T[self.generated_T] = KINDS.index("generated")
        return kind_T

    @property
    def entry_T(self) -> pa.Array:
        """vocab_id of each token, NULL where it is unknown."""
        return pa.array(self.vocab_id_T, mask=self.vocab_id_T == NO_ENTRY)

    def texts(self, texts: Texts) -> pa.Array:
        """Return the text of each token as Arrow strings, NULL where its entry is unknown."""
        known_T = self.vocab_id_T != NO_ENTRY
        if known_T.all():
            return texts(self.vocab_id_T).cast(pa.string())
        index_T = pa.array(np.cumsum(known_T) - 1, mask=~known_T)
        return texts(self.vocab_id_T[known_T]).cast(pa.string()).take(index_T)

    @property
    def token_id_T(self) -> npt.NDArray[np.int64]:
        """prompt_id * 2**24 + position."""
        return (self.prompt_T << POSITION_BITS) + self.position_T


@dataclass(frozen=True)
class LayerRouting:
    """One layer's routing of T tokens, in the slot order of the model's choice.

    A token without a route has NO_ROUTE for its experts.
    """

    expert_ids_TK: npt.NDArray[np.int32]
    weights_TK: npt.NDArray[np.float32] | None
    """None where no weights were recorded."""
    ordered: bool = True
    """For routing without weights: whether the slots are in rank order. If not, the ranks are unknown."""

    def take(self, rows: npt.NDArray[np.int64]) -> LayerRouting:
        """Return the routing of these tokens."""
        weights_TK = None if self.weights_TK is None else self.weights_TK[rows]
        return LayerRouting(self.expert_ids_TK[rows], weights_TK, self.ordered)


class VectorBuffer:
    """A segment's opt-in vectors, filled batch by batch in any order: per table and layer [T, width]."""

    def __init__(self, tokens: int, tables: list[Table], folder: Path) -> None:
        """Keep the vectors in unnamed files in `folder`, which disappear whatever happens."""
        self.tables = tables
        """The opt-in tables of the run."""
        self._tokens = tokens
        self._folder = folder
        self._arrays: dict[VectorKey, npt.NDArray[np.float32]] = {}
        self._filled: dict[VectorKey, npt.NDArray[np.bool_]] = {}

    def add(self, rows_T: npt.NDArray[np.int64], vectors: dict[VectorKey, npt.NDArray[np.float32]]) -> None:
        """Store the vectors of one batch's tokens at those tokens' offsets in the segment."""
        for key, part in vectors.items():
            if key not in self._arrays:
                with tempfile.TemporaryFile(dir=self._folder) as file:
                    self._arrays[key] = np.memmap(file, np.float32, "w+", shape=(self._tokens, part.shape[1]))
                self._filled[key] = np.zeros(self._tokens, np.bool_)
            self._arrays[key][rows_T] = part
            self._filled[key][rows_T] = True

    def of(self, table: Table) -> Iterator[tuple[int, npt.NDArray[np.float32], npt.NDArray[np.int64]]]:
        """Yield (layer, vectors [T, width], offsets of the tokens that have one) of a table, by layer."""
        for key in sorted((key for key in self._arrays if key[0] is table), key=lambda key: key[1]):
            yield key[1], self._arrays[key], np.flatnonzero(self._filled[key])


@dataclass(frozen=True)
class Ranked:
    """One layer's rows in rank order: [T, K], and which of the T tokens have rows there."""

    expert_ids_TK: npt.NDArray[np.int32]
    weights_TK: npt.NDArray[np.float32] | None
    routed_T: npt.NDArray[np.bool_]
    ordered: bool = True
    """False where the ranks are unknown; a token's experts are then in ascending order."""


class RoutingBuffer:
    """A segment's routing, filled batch by batch in any order: per layer [T, K]."""

    def __init__(self, tokens: int, vectors: VectorBuffer | None = None) -> None:
        self._tokens = tokens
        self.vectors = vectors
        """The opt-in vectors of the same tokens."""
        self._layers: dict[int, LayerRouting] = {}
        self._invalid: dict[int, list[npt.NDArray[np.int64]]] = {}
        self.failed_prompts: set[int] = set()
        """prompt_id of prompts that could not be run."""
        self.counts: dict[int, npt.NDArray[np.int64]] = {}
        """Layer → tokens of each expert [E], for a trace that holds only counts: they become load, not rows."""

    def add(self, rows_T: npt.NDArray[np.int64], routing: dict[int, LayerRouting]) -> None:
        """Store the routing of one batch's tokens at those tokens' offsets in the segment."""
        for layer, part in routing.items():
            if layer not in self._layers:
                shape = (self._tokens, part.expert_ids_TK.shape[1])
                weights_TK = None if part.weights_TK is None else np.full(shape, np.nan, np.float32)
                self._layers[layer] = LayerRouting(np.full(shape, NO_ROUTE, np.int32), weights_TK, part.ordered)
            whole = self._layers[layer]
            assert (whole.weights_TK is None) == (part.weights_TK is None), "weights of some tokens only would be lost"
            whole.expert_ids_TK[rows_T] = part.expert_ids_TK
            if whole.weights_TK is not None and part.weights_TK is not None:  # both or neither
                whole.weights_TK[rows_T] = part.weights_TK
                invalid_TK = (part.expert_ids_TK != NO_ROUTE) & ~np.isfinite(part.weights_TK)
                if invalid_TK.any():
                    self._invalid.setdefault(layer, []).append(rows_T[invalid_TK.any(1)])

    def chosen(self, layer: int) -> npt.NDArray[np.int32]:
        """Return a layer's experts [T, K] in the slot order of the model's choice."""
        return self._layers[layer].expert_ids_TK

    def layers(self, workers: Executor) -> Iterator[tuple[int, Ranked]]:
        """Yield each layer's rows in rank order, ranked ahead by the workers.

        A token with invalid numbers or no route has no rows.
        """
        ahead: deque[tuple[int, Future[Ranked]]] = deque()
        for layer in sorted(self._layers):
            ahead.append((layer, workers.submit(rank, self._layers[layer])))
            if len(ahead) > 1:
                first, ranked = ahead.popleft()
                yield first, ranked.result()
        for layer, ranked in ahead:
            yield layer, ranked.result()

    def invalid(self) -> dict[int, npt.NDArray[np.int64]]:
        """Return, by layer, the offsets of the tokens that have routes with weights that are not finite."""
        return {layer: np.sort(np.concatenate(parts)) for layer, parts in sorted(self._invalid.items())}


def rank(routing: LayerRouting) -> Ranked:
    """Order each token's experts by descending weight, ties by expert index.

    Weight and expert are packed into one integer per row, so that one in-place sort does both: the bits of a
    float, read as an integer, have the float's order once those of negative numbers are flipped.
    """
    if routing.weights_TK is None:
        ids_TK = routing.expert_ids_TK if routing.ordered else np.sort(routing.expert_ids_TK, axis=1)
        return Ranked(ids_TK, None, np.asarray((ids_TK != NO_ROUTE).all(1)), routing.ordered)
    bits_TK = (routing.weights_TK + 0.0).view(np.int32)  # + 0.0 makes -0.0 equal to 0.0 in bits too
    keys_TK = ~_flip_negative(bits_TK).astype(np.int64) << 32 | routing.expert_ids_TK
    keys_TK.sort(axis=1)
    return Ranked(
        (keys_TK & 0xFFFF_FFFF).astype(np.int32),
        _flip_negative((~(keys_TK >> 32)).astype(np.int32)).view(np.float32),
        np.asarray((np.isfinite(routing.weights_TK) & (routing.expert_ids_TK != NO_ROUTE)).all(1)),
    )


def _flip_negative(bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Convert float bits to integers of the same order, and back."""
    return np.where(bits < 0, bits ^ 0x7FFF_FFFF, bits).astype(np.int32)
