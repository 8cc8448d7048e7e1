"""`moewh.Writer`: write routing from any source, one sequence at a time, to a run of a warehouse.

In: per sequence its token ids, its experts [T, L, K] and their weights, with labels. Out: committed segments, cut by
rows, so that memory does not grow with the run. Every array is checked before it is used.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from moewh.ingest.options import SEGMENT_ROWS
from moewh.ingest.record import Identity, RunRecord
from moewh.ingest.recorder.arguments import as_arguments, checked_text, described, flag, whole
from moewh.ingest.recorder.declared import Declared, from_model, from_numbers
from moewh.ingest.recorder.open_run import OpenRun, require_new
from moewh.ingest.recorder.sequences import Block, Labels, Part
from moewh.ingest.routing import NO_ENTRY, NO_ROUTE, LayerRouting
from moewh.ingest.workers import InBetween
from moewh.warehouse.errors import MoewhError, UsageError, short_message
from moewh.warehouse.files.names import check_run_id
from moewh.warehouse.remote.published import writable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Array = Any
"""Anything that numpy can convert to an array: an array, a tensor on the host, or nested lists."""


class Writer:
    """A context manager that writes a run of routing recorded elsewhere.

    The run is `running` until the writer is closed. After an exception, it stays `running`, with what was written.
    """

    @as_arguments()
    def __init__(
        self,
        warehouse: str | os.PathLike[str],
        run_id: str,
        model: Any = None,
        *,
        layers: Collection[int] | None = None,
        num_experts: int | None = None,
        top_k: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        ordered: bool = False,
        series: str | None = None,
        train_step: int | None = None,
        train_tokens: int | None = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
        segment_rows: int = SEGMENT_ROWS,
    ) -> None:
        """Begin a run.

        `model` is a hub id, a folder or a configuration, which determines the layers and experts; or only a name, with
        `layers`, `num_experts` (E) and `top_k` (K). `tokenizer` gives tokens their text. `ordered` means that experts
        without weights are in rank order. Raises UsageError or MoewhError, also for a run that exists.
        """
        self.layout = writable(warehouse)
        self.run_id = check_run_id(run_id)
        self._declared = _declared(
            model,
            layers,
            num_experts,
            top_k,
            revision=revision,
            trust_remote_code=flag("trust_remote_code", trust_remote_code),
        )
        self._ordered, self._tokenizer = flag("ordered", ordered), tokenizer
        self._weighted: bool | None = None
        """Whether sequences have weights; None before the first one."""
        segment_rows = whole("segment_rows", segment_rows, 1)
        require_new(self.layout, run_id)
        shaping: dict[str, Any] = {
            **self._declared.shaping,
            "segment_rows": segment_rows,
            "recorded_at": datetime.now(UTC).isoformat(),
        }
        vocabulary, decode = None, None
        if tokenizer is not None:
            from moewh.ingest.model.in_memory import require_tokenizer
            from moewh.ingest.prompts.tokenise import tokenizer_sha256
            from moewh.ingest.prompts.vocabulary import vocabulary_texts

            require_tokenizer(tokenizer)
            shaping["tokenizer_sha256"] = tokenizer_sha256(tokenizer)
            vocabulary, decode = vocabulary_texts(tokenizer), decoder(tokenizer)
        given = described(series, train_step, train_tokens)
        run = {
            **self._declared.run,
            **{name: value for name, value in given.items() if value is not None},
            **{"origin": "imported", "origin_format": "writer", "tokens_key": None, "segments_planned": None},
        }
        declared = self._declared
        record = RunRecord(Identity(shaping, run_id), run, declared.layers, declared.experts, vocabulary)
        special_ids = () if tokenizer is None else tokenizer.all_special_ids
        self._run = OpenRun(self.layout, record, segment_rows, InBetween(), decode=decode, special_ids=special_ids)
        self._written = 0
        self._open = True
        self._one_thread = threading.Lock()
        """Held while a sequence is written: threads that collect answers may share a writer."""

    @as_arguments()
    def write(
        self,
        token_ids: Array | None,
        expert_ids: Array,
        weights: Array | None = None,
        *,
        text: str | None = None,
        generated: int = 0,
        domain: str | None = None,
        source: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> int:
        """Write one sequence and return its prompt_id.

        `token_ids` [T], or None if unknown; `expert_ids` [T, L, K] (or [T, L] for K = 1), in layer order, with -1 in
        all K slots of a token that has no route there; `weights` of the same shape, or None. The model generated the
        last `generated` tokens. Raises UsageError, without writing anything, for invalid arrays, and for weights where
        other sequences have none.
        """
        with self._one_thread:
            if not self._open:
                raise UsageError("the writer is closed. Begin another run.")
            name = f"sequence {self._written}"
            labels, text = Labels.of(domain, source, metadata), checked_text("text", text)
            generated = whole("generated", generated)
            weighted = weights is not None
            if self._weighted not in (None, weighted):
                here, before = ("has", "lack") if weighted else ("lacks", "have")
                raise UsageError(f"{name} {here} weights, which those before it {before}. Write them as two runs.")
            routing = self._checked(name, expert_ids, weights)
            T = len(next(iter(routing.values())).expert_ids_TK)
            ids_T = _token_ids(name, token_ids, T, self._tokenizer)
            if generated > T:
                raise UsageError(f"{name}: generated is {generated} of {T} tokens. Give 0 to {T}.")
            pieces = [(0, T - generated, False), (T - generated, T, True)]
            parts = [
                Part(
                    ids_T[None, first:end],
                    np.ones((1, end - first), np.bool_),
                    by_model,
                    {layer: part.take(np.arange(first, end)) for layer, part in routing.items()},
                )
                for first, end, by_model in pieces
                if end > first
            ]
            self._run.add(Block(labels, parts, closed=True, text=text))
            self._weighted = weighted
            self._written += 1  # before the long part, which may be interrupted
            self._run.commit_full()
            return self._written - 1

    @as_arguments()
    def close(self) -> None:
        """Write the rest and complete the run. Raises MoewhError if nothing was written."""
        with self._one_thread:
            if not self._open:
                return
            self._open = False
            if not self._written:
                raise MoewhError(f"run {self.run_id!r} has no sequence, so nothing was written.")
            self._run.close(whole=True)

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            with self._one_thread:
                if self._open:
                    self._open = False
                    self._run.close(whole=False)

    def _checked(self, name: str, expert_ids: Array, weights: Array | None) -> dict[int, LayerRouting]:
        """Return the routing by layer. Raises UsageError for invalid shapes, types or values."""
        shapes = self._declared.shapes
        L, K = len(shapes), max(k for _, k in shapes.values())
        ids_TLK = _array(name, "expert_ids", expert_ids, "iu")
        if ids_TLK.ndim == 2 and K == 1:
            ids_TLK = ids_TLK[..., None]
        if ids_TLK.ndim != 3 or ids_TLK.shape[1:] != (L, K) or not len(ids_TLK):
            raise UsageError(f"{name}: expert_ids are {list(ids_TLK.shape)}. Give [tokens, {L} layers, {K} experts].")
        weights_TLK = None if weights is None else _array(name, "weights", weights, "f")
        if weights_TLK is not None and weights_TLK.ndim == 2 and K == 1:
            weights_TLK = weights_TLK[..., None]
        if weights_TLK is not None and weights_TLK.shape != ids_TLK.shape:
            raise UsageError(f"{name}: weights are {list(weights_TLK.shape)}, and expert_ids {list(ids_TLK.shape)}.")
        if weights_TLK is not None and not weights_TLK.any() and (ids_TLK != NO_ROUTE).any():
            raise UsageError(f"{name}: every weight is 0. Give None for weights that are not known.")
        routing = {}
        for index, (layer, (E, _)) in enumerate(shapes.items()):
            ids_TK = ids_TLK[:, index].astype(np.int32)
            _check_ids(f"{name}, layer {layer}", ids_TLK[:, index], E)
            weights_TK = None
            if weights_TLK is not None:
                with np.errstate(over="ignore"):  # it becomes infinite, and is refused
                    weights_TK = weights_TLK[:, index].astype(np.float32)
                _check_weights(f"{name}, layer {layer}", weights_TK, ids_TK)
            routing[layer] = LayerRouting(ids_TK, weights_TK, ordered=weights_TK is not None or self._ordered or K == 1)
        return routing


def decoder(tokenizer: Any) -> Callable[[list[list[int]]], list[str]]:
    """Return a function that decodes sequences, special tokens included."""

    def decode(sequences: list[list[int]]) -> list[str]:
        return [str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)) for ids in sequences]

    return decode


def _declared(
    model: Any,
    layers: Collection[int] | None,
    num_experts: int | None,
    top_k: int | None,
    *,
    revision: str | None,
    trust_remote_code: bool,
) -> Declared:
    numbers = (layers, num_experts, top_k)
    if layers is not None and num_experts is not None and top_k is not None:
        return from_numbers(model, layers, num_experts, top_k)
    if any(number is not None for number in numbers):
        raise UsageError("layers, num_experts and top_k go together. Give all three, or a model's configuration.")
    if model is None:
        raise UsageError("the MoE layers are unknown. Give model, or layers, num_experts and top_k.")
    return from_model(model, revision, trust_remote_code)


def _on_host(given: Array) -> Array:
    """Return a tensor in a form that numpy knows, with the same values; anything else as it is."""
    if not hasattr(given, "detach"):
        return given
    tensor = given.detach()
    return tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor


def _is_masked(given: Array) -> bool:
    """Return whether an array is masked in part, also as an item of nested lists."""
    if isinstance(given, list | tuple):
        return any(_is_masked(item) for item in given)
    return isinstance(given, np.ma.MaskedArray) and bool(np.ma.is_masked(given))


def _array(name: str, what: str, given: Array, kinds: str) -> npt.NDArray[Any]:
    """Convert to an array of numbers of the given kinds. Raises UsageError for anything else."""
    if _is_masked(given):
        raise UsageError(f"{name}: {what} are masked in part. Give whole arrays; -1 in expert_ids means no route.")
    try:
        array = np.asarray(_on_host(given))
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(f"{name}: {what} are not an array: {short_message(error)}.") from None
    if array.dtype.kind not in kinds and array.size:
        wanted = "floating-point numbers" if kinds == "f" else "whole numbers"
        raise UsageError(f"{name}: {what} are of type {array.dtype}. Give {wanted}.")
    return array


def _token_ids(name: str, given: Array | None, T: int, tokenizer: Any) -> npt.NDArray[np.int32]:
    if given is None:
        return np.full(T, NO_ENTRY, np.int32)
    ids_T = _array(name, "token_ids", given, "iu")
    if ids_T.shape != (T,):
        raise UsageError(f"{name}: token_ids are {list(ids_T.shape)}, and expert_ids have {T} tokens.")
    most = np.iinfo(np.int32).max + 1 if tokenizer is None else len(tokenizer)
    wrong_T = (ids_T < 0) | (ids_T >= most)
    if wrong_T.any():
        raise UsageError(f"{name}: {ids_T[wrong_T][0]} among its token_ids is not a token id (0 to {most - 1}).")
    return ids_T.astype(np.int32)


def _check_ids(name: str, ids_TK: npt.NDArray[Any], E: int) -> None:
    """Raise UsageError unless each token has distinct experts of the layer, or NO_ROUTE in all slots."""
    none_TK = ids_TK == NO_ROUTE
    wrong_T = ((ids_TK < 0) & ~none_TK).any(1) | (ids_TK >= E).any(1)
    if wrong_T.any():
        token = int(np.flatnonzero(wrong_T)[0])
        raise UsageError(f"{name}: token {token} has experts {ids_TK[token].tolist()}, and there are 0 to {E - 1}.")
    if (mixed_T := none_TK.any(1) & ~none_TK.all(1)).any():
        token = int(np.flatnonzero(mixed_T)[0])
        raise UsageError(f"{name}: token {token} has experts {ids_TK[token].tolist()}. Give all of them, or -1 only.")
    sorted_TK = np.sort(ids_TK, axis=1)
    twice_T = ((sorted_TK[:, 1:] == sorted_TK[:, :-1]) & (sorted_TK[:, 1:] != NO_ROUTE)).any(1)
    if twice_T.any():
        token = int(np.flatnonzero(twice_T)[0])
        raise UsageError(f"{name}: token {token} has an expert twice: {ids_TK[token].tolist()}.")


def _check_weights(name: str, weights_TK: npt.NDArray[np.float32], ids_TK: npt.NDArray[np.int32]) -> None:
    wrong_T = (~np.isfinite(weights_TK) & (ids_TK != NO_ROUTE)).any(1)
    if wrong_T.any():
        token = int(np.flatnonzero(wrong_T)[0])
        raise UsageError(f"{name}: token {token} has weights {weights_TK[token].tolist()}, which are not finite.")
