"""Checks: a sequence as in its file in, its arrays as moewh stores them out, or a one-line error.

This handles the three traps of every trace for all formats: the order within a row means nothing unless the format
promises it, a row that was not captured is not a route to expert 0, and weights are either recorded or absent. Shapes
as in `moewh.ingest.traces.trace`; here L are the MoE layers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moewh.ingest.routing import NO_ENTRY, NO_ROUTE
from moewh.ingest.traces.trace import Array, Counts, Sequence, TraceModel
from moewh.warehouse.errors import MoewhError, short_message
from moewh.warehouse.files.schema import POSITION_BITS

_WORD = 64
"""Experts per word in a bit set of a row's experts."""
_MOST_CHOICES = 1 << 53
"""Most choices that the counts of one file may add up to: all whole numbers up to it are exact as a float64."""


@dataclass(frozen=True)
class Checked:
    """A sequence that passed the checks."""

    sequence: Sequence
    tokens: int
    expert_ids_RLK: npt.NDArray[np.int32]
    """NO_ROUTE for a token that has no rows at a layer."""
    weights_RLK: npt.NDArray[np.float32] | None
    vocab_id_T: npt.NDArray[np.int32] | None


def check_sequence(sequence: Sequence, model: TraceModel, segment_rows: int) -> Checked:
    """Return a sequence's arrays. Raises MoewhError, with file and position, for invalid ones."""
    where, ids_RLK = sequence.where, sequence.expert_ids_RLK
    _require_labels(sequence)
    if ids_RLK.dtype.kind not in "iu" or ids_RLK.ndim != 3:
        raise MoewhError(
            f"{where}: its experts are {ids_RLK.dtype} of shape {ids_RLK.shape}, not whole numbers of shape "
            "[tokens, layers, experts per token]."
        )
    if ids_RLK.shape[2] != model.top_k:
        raise MoewhError(
            f"{where}: has {ids_RLK.shape[2]} experts per token, but {model.name} has {model.top_k}. Check --model."
        )
    weights_RLK = sequence.weights_RLK
    if weights_RLK is not None and (weights_RLK.dtype.kind != "f" or weights_RLK.shape != ids_RLK.shape):
        raise MoewhError(
            f"{where}: its weights are {weights_RLK.dtype} of shape {weights_RLK.shape}, its experts of shape "
            f"{ids_RLK.shape}."
        )
    indices = model.indices(ids_RLK.shape[1], where)
    tokens = _tokens(sequence, model, segment_rows)
    checked_RLK = _expert_ids(sequence, indices, model)
    taken_RLK = _weights(sequence, indices, model, checked_RLK)
    return Checked(sequence, tokens, checked_RLK, taken_RLK, _vocab_ids(sequence, tokens, model))


def check_counts(counts: Counts, model: TraceModel) -> dict[int, npt.NDArray[np.int64]]:
    """Return the tokens of each MoE layer's experts. Raises MoewhError for counts that are not of this model."""
    where, tokens_LE = counts.where, counts.tokens_LE
    if tokens_LE.ndim != 2 or (width := tokens_LE.shape[1]) != model.experts_L.max():
        raise MoewhError(
            f"{where}: its counts have shape {tokens_LE.shape}, but {model.name} has {model.experts_L.max()} experts "
            "per layer. Check --model."
        )
    if not np.isfinite(tokens_LE).all() or (tokens_LE < 0).any() or (tokens_LE != np.floor(tokens_LE)).any():
        raise MoewhError(f"{where}: its counts are not whole numbers from 0.")
    if tokens_LE.sum(dtype=np.float64) > _MOST_CHOICES:
        raise MoewhError(f"{where}: its counts add up to more than {_MOST_CHOICES:,}. The file is damaged.")
    indices = model.indices(tokens_LE.shape[0], where)
    dense = np.delete(np.arange(len(tokens_LE)), indices)
    if tokens_LE[dense].any():
        layer = int(dense[tokens_LE[dense].any(1)][0])
        raise MoewhError(f"{where}: has counts at layer {layer}, where {model.name} has no experts. Check --model.")
    if not tokens_LE.any():
        raise MoewhError(f"{where}: every count is 0: nothing was recorded.")
    beyond = [
        width > experts and tokens_LE[index, experts:].any()
        for index, experts in zip(indices, model.experts_L, strict=True)
    ]
    if any(beyond):
        raise MoewhError(f"{where}: has counts of experts that {model.name} does not have. Check --model.")
    return {
        layer: tokens_LE[index, :experts].astype(np.int64)
        for layer, index, experts in zip(model.layers, indices, model.experts_L, strict=True)
    }


def _tokens(sequence: Sequence, model: TraceModel, segment_rows: int) -> int:
    """Return T. Raises MoewhError for a sequence that is empty, too long, or has rows for tokens it lacks."""
    where, rows, vocab_ids_T = sequence.where, len(sequence.expert_ids_RLK), sequence.vocab_ids_T
    tokens = sequence.first + rows if sequence.tokens is None else sequence.tokens
    if vocab_ids_T is not None:
        if vocab_ids_T.ndim != 1 or vocab_ids_T.dtype.kind not in "iu":
            raise MoewhError(
                f"{where}: its token ids are {vocab_ids_T.dtype} of shape {vocab_ids_T.shape}, not a list."
            )
        if sequence.tokens is not None and len(vocab_ids_T) != tokens:
            raise MoewhError(f"{where}: has {len(vocab_ids_T):,} token ids for {tokens:,} tokens.")
        tokens = len(vocab_ids_T)
    if not rows:
        raise MoewhError(f"{where}: has no row of routing. Leave it out.")
    if sequence.first < 0 or sequence.first + rows > tokens:
        raise MoewhError(
            f"{where}: has routing for {rows:,} tokens from position {sequence.first}, but {tokens:,} tokens."
        )
    most = min(1 << POSITION_BITS, segment_rows // (len(model.layers) * model.top_k))
    if tokens > most:
        raise MoewhError(
            f"{where}: has {tokens:,} tokens, and a segment takes {most:,} of this model. Raise --segment-rows."
        )
    if sequence.generated_from is not None and not 0 <= sequence.generated_from <= tokens:
        raise MoewhError(f"{where}: its answer begins at token {sequence.generated_from:,}, and it has {tokens:,}.")
    return tokens


def _require_labels(sequence: Sequence) -> None:
    """Raise MoewhError for labels that cannot be stored as text, or metadata that is not strict JSON."""
    try:
        metadata = json.dumps(sequence.metadata, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):
        raise MoewhError(f"{sequence.where}: its metadata hold what JSON does not have, such as NaN.") from None
    except RecursionError:
        raise MoewhError(f"{sequence.where}: its metadata are nested too deeply.") from None
    labels = {"text": sequence.text, "domain": sequence.domain, "source": sequence.source, "metadata": metadata}
    for name, label in labels.items():
        try:
            (label or "").encode()
        except UnicodeEncodeError:
            raise MoewhError(
                f"{sequence.where}: its {name} holds half of a surrogate pair, which is not a character."
            ) from None


def _expert_ids(sequence: Sequence, indices: list[int], model: TraceModel) -> npt.NDArray[np.int32]:
    """Return the experts at the MoE layers, NO_ROUTE where nothing was captured."""
    given = sequence.expert_ids_RLK
    taken_RLK = given if indices == list(range(given.shape[1])) else given[:, indices]
    _require_dense(sequence, indices, model)
    least, most = int(taken_RLK.min()), int(taken_RLK.max())
    if least < NO_ROUTE or most >= model.experts_L.min():
        outside = np.argwhere((taken_RLK < NO_ROUTE) | (taken_RLK >= model.experts_L[:, None]))
        if len(outside):
            row, index, slot = outside[0]
            raise MoewhError(
                f"{_at(sequence, row, model.layers[index])}: expert {taken_RLK[row, index, slot]} is none of the "
                f"layer's {model.experts_L[index]} experts. Check --model."
            )
    ids_RLK = taken_RLK.astype(np.int32)
    if model.top_k > 1:  # with one expert per token, a row of zeros is a route to expert 0
        empty_RL = ~ids_RLK.any(2)
        if (weights_RLK := sequence.weights_RLK) is not None:  # with a weight, it names expert 0 twice
            empty_RL &= ~(np.nan_to_num(weights_RLK[:, indices]) != 0).any(2)
        ids_RLK[empty_RL] = NO_ROUTE
    _require_whole_rows(sequence, ids_RLK, model, least)
    return ids_RLK


def _require_dense(sequence: Sequence, indices: list[int], model: TraceModel) -> None:
    """Raise MoewhError for routing at a layer that has no experts in the configuration."""
    given = sequence.expert_ids_RLK
    dense = np.setdiff1d(np.arange(given.shape[1]), indices)
    if len(dense) and (routed := np.argwhere(given[:, dense] > 0)).size:
        row, index, _ = routed[0]
        raise MoewhError(
            f"{_at(sequence, row, dense[index])}: has routing, and {model.name} has no experts there. Check --model."
        )


def _require_whole_rows(sequence: Sequence, ids_RLK: npt.NDArray[np.int32], model: TraceModel, least: int) -> None:
    """Raise MoewhError for a row that has an expert twice, or was captured only in part."""
    if least < 0:
        missing = (ids_RLK == NO_ROUTE).sum(2)
        partly = np.argwhere((missing > 0) & (missing < model.top_k))
        if len(partly):
            row, index = partly[0]
            raise MoewhError(
                f"{_at(sequence, row, model.layers[index])}: has {model.top_k - missing[row, index]} of "
                f"{model.top_k} experts. moewh stores a token's experts whole or not at all."
            )
    twice_RL = np.zeros(ids_RLK.shape[:2], np.bool_)
    one, none = np.uint64(1), np.uint64(0)
    for word in range(int(model.experts_L.max() - 1) // _WORD + 1):
        bits_RL = np.zeros(ids_RLK.shape[:2], np.uint64)
        for slot in range(model.top_k):
            ids_RL = ids_RLK[:, :, slot]
            bit_RL = one << (ids_RL & (_WORD - 1)).astype(np.uint64)
            bit_RL = np.where(ids_RL >> 6 == word, bit_RL, none)
            twice_RL |= (bits_RL & bit_RL) != none
            bits_RL |= bit_RL
    twice = np.argwhere(twice_RL)
    if len(twice):
        row, index = twice[0]
        raise MoewhError(f"{_at(sequence, row, model.layers[index])}: names an expert twice. The file is damaged.")


def _weights(
    sequence: Sequence, indices: list[int], model: TraceModel, ids_RLK: npt.NDArray[np.int32]
) -> npt.NDArray[np.float32] | None:
    weights_RLK = sequence.weights_RLK
    if weights_RLK is None:
        return None
    with np.errstate(over="ignore"):  # it becomes infinite, and is refused
        taken_RLK = weights_RLK[:, indices].astype(np.float32)
    if not taken_RLK.any() and (sequence.expert_ids_RLK[:, indices] > 0).any():  # else nothing was captured
        raise MoewhError(f"{sequence.where}: every weight is 0. Leave out weights that were not recorded.")
    bad = np.argwhere(~np.isfinite(taken_RLK) & (ids_RLK != NO_ROUTE))
    if len(bad):
        row, index, _ = bad[0]
        raise MoewhError(f"{_at(sequence, row, model.layers[index])}: has a weight that is not a finite number.")
    return taken_RLK


def _vocab_ids(sequence: Sequence, tokens: int, model: TraceModel) -> npt.NDArray[np.int32] | None:
    given = sequence.vocab_ids_T
    if given is None:
        return None
    most = model.vocabulary or np.iinfo(np.int32).max
    if tokens and (int(given.max()) >= most or int(given.min()) < NO_ENTRY):
        position = int(np.argmax((given >= most) | (given < NO_ENTRY)))
        raise MoewhError(
            f"{sequence.where}, token {position}: token id {given[position]} is outside the model's vocabulary "
            f"({most:,} entries). Check --model."
        )
    return given.astype(np.int32)


def _at(sequence: Sequence, row: int, layer: int) -> str:
    return f"{sequence.where}, token {sequence.first + row}, layer {layer}"


def as_ids(values: object, where: str, what: str = "token ids") -> Array:
    """Return a list of token ids, or of other whole numbers, [T] as an array. Raises MoewhError for anything else."""
    if hasattr(values, "detach"):
        try:
            values = values.detach().numpy()
        except (TypeError, RuntimeError) as error:  # no dtype of numpy's, or no plain numbers
            raise MoewhError(f"{where}: its {what} are not whole numbers: {short_message(error)}.") from None
    if isinstance(values, np.ndarray) and values.ndim == 1 and (values.dtype.kind in "iu" or not len(values)):
        return values if len(values) else values.astype(np.int64)  # numpy makes an empty list one of floats
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise MoewhError(f"{where}: its {what} are not a list of whole numbers.")
    try:
        return np.array(values, np.int64)
    except OverflowError:
        raise MoewhError(f"{where}: its {what} hold a number beyond 64 bits.") from None
