"""Rollups: the counts that a segment holds besides its rows, computed from its ranked arrays.

In: the segment's tokens and, layer by layer, its ranked routing. Out: one Parquet file per rollup table, sorted by all
its columns. `queries/rollups/` defines each; this computes the same about ten times faster, with one-hot products and
bincounts. Counts are exact integers; sums add in row order in one thread.

Tokens are grouped by kind and domain: G groups, sorted like the rows of the files. Further suffixes: V distinct
vocabulary entries, N rows of a file.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from threadpoolctl import ThreadpoolController

from moewh.ingest.routing import KINDS, NO_ENTRY, Ranked, Texts, TokenisedSegment
from moewh.warehouse.files import schema
from moewh.warehouse.files.schema import Table
from moewh.warehouse.files.tables import write_chunks

Ints = npt.NDArray[np.int64]
_ALWAYS = tuple(table for table in schema.ROLLUPS if not table.opt_in)
_COUNTED = ("prompt", "generated")
"""The kinds of tokens for which repetition is counted."""
_BLOCK = 4_096
"""Tokens per one-hot product: few enough for the cache, and for float32 to count exactly."""
_PRODUCT_WORK = 64
"""One-hot products are faster while E * E' is at most this many times K * K'; above it, counting each pair is."""
_DENSE = 4_096
"""Up to this many experts, each has a row and a column while pairs are counted."""


@dataclass(frozen=True)
class TokenGroups:
    """A segment's tokens ordered by group (kind and domain), in row order within each."""

    labels: list[tuple[str, str | None]]
    """(kind, domain) of each group, in the order of the files: by code point, NULL last."""
    order_T: Ints
    """Offsets of the tokens, group after group."""
    start_G: Ints
    """Where each group begins in `order_T`, with one more entry for the end."""

    @classmethod
    def of(cls, kind_T: npt.NDArray[np.str_], domain_T: Ints, domains: list[str | None]) -> TokenGroups:
        """Group tokens by kind and by domain, given as indices into `domains`, which is sorted."""
        kinds, kind_code_T = np.unique(kind_T, return_inverse=True)
        group_T = kind_code_T * len(domains) + domain_T
        groups, start_G = np.unique(np.sort(group_T), return_index=True)
        labels = [(str(kinds[group // len(domains)]), domains[group % len(domains)]) for group in groups]
        return cls(labels, np.argsort(group_T, kind="stable"), np.append(start_G, len(group_T)))

    def slices(self) -> Iterator[tuple[int, slice]]:
        """Yield each group with its tokens, as a slice of arrays ordered by `order_T`."""
        for group in range(len(self.labels)):
            yield group, slice(int(self.start_G[group]), int(self.start_G[group + 1]))

    def label(self, group: int) -> dict[str, str | None]:
        """Return the columns that identify the group."""
        kind, domain = self.labels[group]
        return {"kind": kind, "domain": domain}

    def kinds(self) -> Iterator[tuple[str, slice]]:
        """Yield each kind with its tokens, as a slice of arrays ordered by `order_T`."""
        names = [kind for kind, _ in self.labels]
        for kind in sorted(set(names)):
            first, count = names.index(kind), names.count(kind)
            yield kind, slice(int(self.start_G[first]), int(self.start_G[first + count]))


@dataclass(frozen=True)
class _Chosen:
    """One layer's choices, with tokens in group order; the rows of a token that is not routed are undefined."""

    layer: int
    expert_E: Ints
    """The experts that are counted, in order: all up to the greatest one chosen or, if those are very many, only the
    chosen ones."""
    ids_TK: Ints
    """Indices into the experts that are counted."""
    routed_T: npt.NDArray[np.bool_]
    ordered: bool
    """Whether the first of a token's experts is its first choice."""

    @classmethod
    def of(cls, layer: int, ids_TK: Ints, routed_T: npt.NDArray[np.bool_], *, ordered: bool) -> _Chosen:
        expert_E = np.arange(int(ids_TK.max(initial=-1)) + 1)
        if len(expert_E) > _DENSE:
            expert_E, index_N = np.unique(ids_TK, return_inverse=True)
            ids_TK = index_N.reshape(ids_TK.shape)
        return cls(layer, expert_E, ids_TK, routed_T, ordered)

    @property
    def experts(self) -> int:
        """E."""
        return len(self.expert_E)


@dataclass(frozen=True)
class _Vocabulary:
    """The V distinct vocabulary entries of some tokens, without unknown ones."""

    id_V: npt.NDArray[np.int32]
    text_V: pa.Array
    entry_T: Ints
    """Each token's index among them; -1 where its entry is unknown."""

    @classmethod
    def of(cls, vocab_id_T: npt.NDArray[np.int32], texts: Texts) -> _Vocabulary:
        id_V, entry_T = np.unique(vocab_id_T, return_inverse=True)
        unknown = int(id_V[:1].tolist() == [NO_ENTRY])
        return cls(id_V[unknown:], texts(id_V[unknown:]).cast(pa.string()), entry_T - unknown)


class RollupCounter:
    """Counts one segment: `add` every layer in order, then, once all are counted, `write`."""

    def __init__(self, segment: TokenisedSegment, texts: Texts) -> None:
        self._domains, domain_T = _domains(segment)
        kind_T = _kinds(segment)
        self.groups = TokenGroups.of(kind_T, domain_T, self._domains)
        self._domain_T = domain_T
        self._adjacent_T = _adjacent(segment, kind_T)
        vocab_id_T = segment.vocab_id_T[self.groups.order_T]
        self._vocabulary = {
            kind: _Vocabulary.of(vocab_id_T[group_slice], texts) for kind, group_slice in self.groups.kinds()
        }
        self._previous: _Chosen | None = None
        self._chunks: dict[Table, list[tuple[Any, dict[str, Any]]]] = {table: [] for table in _ALWAYS}

    def add(self, layer: int, ranked: Ranked, workers: Executor) -> Future[None]:
        """Count one layer in the workers, in ascending order of layers; the future is done when they are."""
        order_T = self.groups.order_T
        ids_TK = ranked.expert_ids_TK[order_T].astype(np.int64)
        chosen = _Chosen.of(layer, ids_TK, ranked.routed_T[order_T], ordered=ranked.ordered)
        previous, self._previous = self._previous, chosen
        return workers.submit(self._count, previous, chosen, ranked)

    def _count(self, previous: _Chosen | None, chosen: _Chosen, ranked: Ranked) -> None:
        weights_TK = None if ranked.weights_TK is None else ranked.weights_TK[self.groups.order_T]
        for group, group_slice in self.groups.slices():
            self._add_experts(group, chosen, group_slice, weights_TK)
            self._add_pairs(group, previous, chosen, group_slice)
        for kind, group_slice in self.groups.kinds():
            self._add_vocabulary(kind, chosen, group_slice)
        self._add_repetition(chosen.layer, ranked)

    def add_load(self, layer: int, tokens_E: Ints) -> None:
        """Add a layer's load as given: tokens per expert, in the first prompt's domain, without any rows."""
        expert = np.flatnonzero(tokens_E)
        self._keep(
            schema.EXPERT_COUNTS,
            (0, layer),
            kind=KINDS[0],
            domain=self._domains[0],
            layer=layer,
            expert=expert,
            tokens=tokens_E[expert],
            first_choice_tokens=None,
            weight_sum=None,
        )

    def write(self, folder: Path) -> None:
        """Write every rollup's file except the opt-in ones."""
        for table in _ALWAYS:
            chunks = sorted(self._chunks.pop(table), key=lambda chunk: chunk[0])
            write_chunks(folder / table.file, table, (to_arrow(table, columns) for _, columns in chunks))

    def _keep(self, table: Table, key: tuple[Any, ...], **columns: Any) -> None:
        """Keep rows until the file is written; `key` orders them, and a scalar column has one value in all rows."""
        self._chunks[table].append((key, columns))

    def _add_experts(
        self, group: int, chosen: _Chosen, group_slice: slice, weights_TK: npt.NDArray[np.float32] | None
    ) -> None:
        routed_T = chosen.routed_T[group_slice]
        ids_TK = chosen.ids_TK[group_slice][routed_T]
        tokens_E = np.bincount(ids_TK.ravel(), minlength=chosen.experts)
        expert = np.flatnonzero(tokens_E)
        first_E = np.bincount(ids_TK[:, 0], minlength=chosen.experts)[expert] if chosen.ordered else None
        sum_E = None
        if weights_TK is not None:
            weights = weights_TK[group_slice][routed_T].ravel()
            sum_E = np.bincount(ids_TK.ravel(), weights=weights, minlength=chosen.experts)[expert]
        self._keep(
            schema.EXPERT_COUNTS,
            (group, chosen.layer),
            **self.groups.label(group),
            layer=chosen.layer,
            expert=chosen.expert_E[expert],
            tokens=tokens_E[expert],
            first_choice_tokens=first_E,
            weight_sum=sum_E,
        )

    def _add_pairs(self, group: int, previous: _Chosen | None, chosen: _Chosen, group_slice: slice) -> None:
        pairs_EE, transitions_EE = count_pairs(previous, chosen, group_slice)
        expert_a, expert_b = np.nonzero(pairs_EE)
        tokens = pairs_EE[expert_a, expert_b]
        label = self.groups.label(group)
        found = {"expert_a": chosen.expert_E[expert_a], "expert_b": chosen.expert_E[expert_b], "tokens": tokens}
        self._keep(schema.PAIR_COUNTS, (group, chosen.layer), **label, layer=chosen.layer, **found)
        if previous is None:
            return
        expert, next_expert = np.nonzero(transitions_EE)
        first_choices = None
        if previous.ordered and chosen.ordered:
            first_choices = _count_first_choices(previous, chosen, group_slice)[expert, next_expert]
        self._keep(
            schema.TRANSITION_COUNTS,
            (group, previous.layer),
            **label,
            layer=previous.layer,
            next_layer=chosen.layer,
            expert=previous.expert_E[expert],
            next_expert=chosen.expert_E[next_expert],
            tokens=transitions_EE[expert, next_expert],
            first_choice_tokens=first_choices,
        )

    def _add_vocabulary(self, kind: str, chosen: _Chosen, group_slice: slice) -> None:
        vocabulary = self._vocabulary[kind]
        routed_T = chosen.routed_T[group_slice] & (vocabulary.entry_T >= 0)
        entry_T = vocabulary.entry_T[routed_T]
        V = len(vocabulary.id_V)
        flat, tokens = _distinct((chosen.ids_TK[group_slice][routed_T] * V + entry_T[:, None]).ravel())
        expert, entry = np.divmod(flat, V)
        self._keep(
            schema.AFFINITY_COUNTS,
            (kind, chosen.layer),
            kind=kind,
            layer=chosen.layer,
            expert=chosen.expert_E[expert].astype(np.int32),
            vocab_id=vocabulary.id_V[entry],
            tokens=tokens.astype(np.int32),
        )
        entry, tokens = _distinct(entry_T)
        self._keep(
            schema.VOCAB_COUNTS,
            (kind, chosen.layer),
            kind=kind,
            layer=chosen.layer,
            vocab_id=vocabulary.id_V[entry],
            token=vocabulary.text_V.take(pa.array(entry)),
            tokens=tokens,
        )

    def _add_repetition(self, layer: int, ranked: Ranked) -> None:
        """Count adjacent tokens in row order, by domain."""
        pair = np.flatnonzero(self._adjacent_T & ranked.routed_T[:-1] & ranked.routed_T[1:])
        ids_TK = ranked.expert_ids_TK
        domain = self._domain_T[pair]
        domains = len(self._domains)
        same_first = ids_TK[pair, 0] == ids_TK[pair + 1, 0]
        pairs_D = np.bincount(domain, minlength=domains)
        first_D = np.bincount(domain[same_first], minlength=domains)
        any_D = np.bincount(domain[_share_any(ids_TK, pair)], minlength=domains)
        for index in np.flatnonzero(pairs_D):
            self._keep(
                schema.REPETITION_COUNTS,
                (int(index), layer),
                domain=self._domains[index],
                layer=layer,
                pairs=pairs_D[[index]],
                first_choice_pairs=first_D[[index]] if ranked.ordered else None,
                any_choice_pairs=any_D[[index]],
            )


# ------------------------------------------------------------------------------------------ counting


def count_pairs(previous: _Chosen | None, chosen: _Chosen, group_slice: slice) -> tuple[Ints, Ints]:
    """Count, over the tokens of `group_slice`, those that share two experts.

    Returns [E, E] for expert_a < expert_b of the layer (zero elsewhere), and [E', E] for an expert of the
    previous layer and one of this (no rows without a previous layer).
    """
    pairs_EE = np.zeros((chosen.experts, chosen.experts), np.int64)
    before = previous.experts if previous is not None else 0
    transitions_EE = np.zeros((before, chosen.experts), np.int64)
    if not (_product_pays(chosen, chosen) and (previous is None or _product_pays(previous, chosen))):
        _scatter_pairs(chosen, group_slice, pairs_EE)
        if previous is not None:
            _scatter_transitions(previous, chosen, group_slice, transitions_EE)
        return pairs_EE, transitions_EE
    here, there = _scratch(chosen), None if previous is None else _scratch(previous)
    for block in _blocks(group_slice):
        one_hot_TE = _one_hot(chosen, block, here)
        pairs_EE += (one_hot_TE.T @ one_hot_TE).astype(np.int64)
        if previous is not None and there is not None:
            transitions_EE += (_one_hot(previous, block, there).T @ one_hot_TE).astype(np.int64)
    return np.triu(pairs_EE, 1), transitions_EE


class _OneThread:
    """Limits numpy's matrix products (not torch's) to one thread each; held by any number of blocks at a time."""

    def __init__(self) -> None:
        self._lock, self._holders = Lock(), 0
        self._blas: ThreadpoolController | None = None
        self._limit: Any = None

    def hold(self) -> None:
        """Set the limit, unless another block has."""
        with self._lock:
            if self._holders == 0:
                self._blas = self._blas or ThreadpoolController().select(internal_api="openblas")
                self._limit = self._blas.limit(limits=1)
            self._holders += 1

    def release(self) -> None:
        """Put back what was there before, unless another block holds the limit."""
        with self._lock:
            self._holders -= 1
            if self._holders == 0:
                self._limit.restore_original_limits()


_ONE_THREAD = _OneThread()


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Make numpy's matrix products (not torch's) single-threaded, in all threads of the process, within the block.

    With such small products, more threads would only wait for each other and take cores from the forward pass. Blocks
    may overlap: several segments are written at once.
    """
    _ONE_THREAD.hold()
    try:
        yield
    finally:
        _ONE_THREAD.release()


def _product_pays(a: _Chosen, b: _Chosen) -> bool:
    return a.experts * b.experts <= _PRODUCT_WORK * int(a.ids_TK.shape[1]) * int(b.ids_TK.shape[1])


def _scratch(chosen: _Chosen) -> npt.NDArray[np.float32]:
    return np.empty((_BLOCK, chosen.experts), np.float32)


def _one_hot(chosen: _Chosen, block: slice, scratch: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Return [block, E] of 0 and 1, all 0 where a token is not routed, in the memory of `scratch`."""
    ids_TK, routed_T = chosen.ids_TK[block], chosen.routed_T[block]
    one_hot_TE = scratch[: len(ids_TK)]
    one_hot_TE.fill(0)
    flat_TK = (np.arange(len(ids_TK)) * chosen.experts)[:, None] + ids_TK
    one_hot_TE.ravel()[flat_TK if routed_T.all() else flat_TK[routed_T]] = 1
    return one_hot_TE


def _scatter_pairs(chosen: _Chosen, group_slice: slice, pairs_EE: Ints) -> None:
    """Add every token's K * (K - 1) / 2 pairs one by one, the lower expert first."""
    first, second = np.triu_indices(chosen.ids_TK.shape[1], 1)
    for block in _blocks(group_slice):
        ids_TK = np.sort(chosen.ids_TK[block][chosen.routed_T[block]], axis=1)
        flat = ids_TK[:, first] * chosen.experts + ids_TK[:, second]
        pairs_EE += np.bincount(flat.ravel(), minlength=pairs_EE.size).reshape(pairs_EE.shape)


def _scatter_transitions(previous: _Chosen, chosen: _Chosen, group_slice: slice, transitions_EE: Ints) -> None:
    """Add every token's K' * K pairs one by one."""
    for block in _blocks(group_slice):
        both_T = previous.routed_T[block] & chosen.routed_T[block]
        before_TK, ids_TK = previous.ids_TK[block][both_T], chosen.ids_TK[block][both_T]
        flat = (before_TK * chosen.experts)[:, :, None] + ids_TK[:, None, :]
        transitions_EE += np.bincount(flat.ravel(), minlength=transitions_EE.size).reshape(transitions_EE.shape)


def _count_first_choices(previous: _Chosen, chosen: _Chosen, group_slice: slice) -> Ints:
    """Count [E', E]: first choice at the previous layer, first choice at this."""
    both_T = previous.routed_T[group_slice] & chosen.routed_T[group_slice]
    flat_T = previous.ids_TK[group_slice][both_T, 0] * chosen.experts + chosen.ids_TK[group_slice][both_T, 0]
    counts = np.bincount(flat_T, minlength=previous.experts * chosen.experts)
    return counts.reshape(previous.experts, chosen.experts)


def _share_any(ids_TK: npt.NDArray[np.int32], pair: Ints) -> npt.NDArray[np.bool_]:
    """Return, for each index in `pair`, whether that token and the next share an expert: sets as bits, 64 at a time."""
    shared = np.zeros(len(pair), np.bool_)
    one = np.uint64(1)
    for word in range(int(ids_TK.max(initial=0)) // 64 + 1):
        bit_TK = np.where(ids_TK >> 6 == word, one << (ids_TK & 63).astype(np.uint64), np.uint64(0))
        set_T = np.bitwise_or.reduce(bit_TK, axis=1)
        shared |= (set_T[pair] & set_T[pair + 1]) != 0
    return shared


def _distinct(values: Ints) -> tuple[Ints, Ints]:
    """Return the distinct values in order and their counts; by sorting where the values are few and far apart."""
    if values.max(initial=0) > 8 * len(values):
        return np.unique(values, return_counts=True)
    counts = np.bincount(values)
    distinct = np.flatnonzero(counts)
    return distinct, counts[distinct]


def _blocks(group_slice: slice) -> Iterator[slice]:
    for start in range(group_slice.start, group_slice.stop, _BLOCK):
        yield slice(start, min(start + _BLOCK, group_slice.stop))


# ------------------------------------------------------------------------------------------ tokens and files


def _domains(segment: TokenisedSegment) -> tuple[list[str | None], Ints]:
    """Return the segment's domains in order, NULL last, and each token's index into them."""
    domain_P = segment.prompts.column("domain").to_pylist()
    domains: list[str | None] = [*sorted({domain for domain in domain_P if domain is not None}), None]
    numbers = {domain: number for number, domain in enumerate(domains)}
    number_P = np.array([numbers[domain] for domain in domain_P], np.int64)
    return domains, number_P[segment.prompt_T - segment.first_prompt]


def _kinds(segment: TokenisedSegment) -> npt.NDArray[np.str_]:
    return np.array(KINDS)[segment.kind_T]


def _adjacent(segment: TokenisedSegment, kind_T: npt.NDArray[np.str_]) -> npt.NDArray[np.bool_]:
    """Return, for each token except the last, whether the next follows it in the same context and both are counted."""
    counted_T = np.isin(kind_T, _COUNTED)
    same = (segment.prompt_T[1:] == segment.prompt_T[:-1]) & (segment.context_T[1:] == segment.context_T[:-1])
    follows = segment.position_T[1:] == segment.position_T[:-1] + 1
    return np.asarray(same & follows & counted_T[1:] & counted_T[:-1])


def to_arrow(table: Table, columns: dict[str, Any]) -> pa.Table:
    """Make an Arrow table of N rows; a scalar column has the same value in all rows."""
    arrow_schema = table.arrow()
    rows = max(len(value) for value in columns.values() if not isinstance(value, str | int | None))
    arrays = []
    for field in arrow_schema:
        value = columns[field.name]
        if isinstance(value, str | int | None):
            arrays.append(pa.repeat(pa.scalar(value, field.type), rows))
        else:
            arrays.append(value.cast(field.type) if isinstance(value, pa.Array) else pa.array(value, field.type))
    return pa.Table.from_arrays(arrays, schema=arrow_schema)
