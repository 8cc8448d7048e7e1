"""The spool: checked sequences on disk, cut into segments, between reading a trace and writing a run.

A trace is read once. All of it is checked before anything is committed, so that a bad file leaves nothing behind. The
data read is kept in the warehouse's `.staging/`, with at most one segment in memory. Segments are cut as in `ingest`:
by rows, and never within a sequence.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from moewh.ingest.prompts.canonical import CANONICAL
from moewh.ingest.routing import NO_ENTRY, LayerRouting, RoutingBuffer, TokenisedSegment
from moewh.ingest.traces.check import Checked
from moewh.ingest.traces.trace import TraceModel
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.tables import read_rows

Ids = npt.NDArray[np.int32]
Decode = Callable[[Ids], str]
_INDEX = pa.schema(
    [
        *CANONICAL,
        pa.field("tokens", pa.int64()),
        pa.field("first", pa.int64()),
        pa.field("rows", pa.int64()),
        pa.field("generated_from", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Labels:
    """Facts about a trace's tokens that are not in the trace."""

    domain: str | None = None
    decode: Decode | None = None
    """Maps token ids to their text; None without a tokenizer."""
    special_ids: npt.NDArray[np.int32] | None = None


class Spool:
    """Stores checked sequences in order, in files in `folder`; afterwards returns each segment."""

    def __init__(
        self, folder: Path, model: TraceModel, segment_rows: int, labels: Labels, wanted: Callable[[int], bool]
    ) -> None:
        """`wanted` returns whether a segment, given its number, must still be written; others are not kept."""
        self.segments = 0
        """Segments so far."""
        self.weights: bool | None = None
        """Whether the trace has weights; None before the first sequence."""
        self.ordered = False
        self._served: str | None = None
        self._folder, self._model, self._labels, self._wanted = folder, model, labels, wanted
        self._most_tokens = segment_rows // (len(model.layers) * model.top_k)
        self._dtype = np.dtype(np.int16 if int(model.experts_L.max()) <= np.iinfo(np.int16).max else np.int32)
        self._index: list[dict[str, object]] = []
        self._first_prompts: list[int] = []
        self._prompts = 0
        self._tokens = 0
        self._open: ExitStack | None = None
        self._files: dict[str, IO[bytes]] = {}

    def add(self, checked: Checked) -> dict[str, object]:
        """Add the next sequence; return its row in `prompts`. Raises MoewhError if it is of another kind."""
        self._require_one_kind(checked)
        if self._open is None or self._tokens + checked.tokens > self._most_tokens:
            self._begin()
        self._tokens += checked.tokens
        self._prompts += 1
        row = self._row(checked)
        if self._wanted(self.segments - 1):
            self._index.append(row)
            self._write("ids", checked.expert_ids_RLK.astype(self._dtype))
            if checked.weights_RLK is not None:
                self._write("weights", checked.weights_RLK)
            vocab_id_T = checked.vocab_id_T
            self._write("vocab", np.full(checked.tokens, NO_ENTRY, np.int32) if vocab_id_T is None else vocab_id_T)
            context_T = checked.sequence.context_T
            self._write("context", np.zeros(checked.tokens, np.int32) if context_T is None else context_T)
        return row

    def close(self) -> None:
        """End the last segment."""
        if self._open is None:
            return
        self._open.close()
        if self._index:
            pq.write_table(pa.Table.from_pylist(self._index, _INDEX), self._path("index"))
        self._open, self._index, self._files = None, [], {}

    def segment(self, number: int) -> tuple[TokenisedSegment, RoutingBuffer]:
        """Return a segment's tokens and routing, and delete its files."""
        index = read_rows(self._path("index", number))
        arrays = {name: self._read(name, number, dtype) for name, dtype in self._dtypes().items()}
        segment = self._tokenised(index, self._first_prompts[number], arrays["vocab"], arrays["context"])
        buffer = self._routing(index, arrays["ids"], arrays.get("weights"))
        for name in (*arrays, "index"):
            self._path(name, number).unlink()
        return segment, buffer

    # -------------------------------------------------------------------------------------------- in

    def _begin(self) -> None:
        self.close()
        self.segments += 1
        self._first_prompts.append(self._prompts)
        self._tokens = 0
        self._open = ExitStack()
        if self._wanted(self.segments - 1):
            self._files = {name: self._open.enter_context(self._path(name).open("wb")) for name in self._dtypes()}

    def _require_one_kind(self, checked: Checked) -> None:
        weights, ordered = checked.weights_RLK is not None, checked.sequence.ordered
        if self.weights is None:
            self.weights, self.ordered = weights, ordered
        for what, here, before in (("weights", weights, self.weights), ("ordered experts", ordered, self.ordered)):
            if here != before:
                raise MoewhError(
                    f"{checked.sequence.where}: {'has' if here else 'lacks'} {what}, what came before "
                    f"{'has them' if before else 'does not'}. Import them as two runs."
                )
        served, self._served = checked.sequence.served, self._served or checked.sequence.served
        if served not in (None, self._served):
            raise MoewhError(
                f"{checked.sequence.where}: is an answer of {served}, what came before of {self._served}. Import them "
                "as two runs."
            )

    def _row(self, checked: Checked) -> dict[str, object]:
        sequence, labels = checked.sequence, self._labels
        text, ids = sequence.text, checked.vocab_id_T
        if text is None and labels.decode is not None and ids is not None and (ids != NO_ENTRY).all():
            text = labels.decode(ids)
        metadata = sequence.metadata
        return {
            "text": text,
            "form": "text",
            "domain": labels.domain if labels.domain is not None else sequence.domain,
            "source": sequence.source,
            "metadata": None if metadata is None else json.dumps(metadata, sort_keys=True),
            "tokens": checked.tokens,
            "first": sequence.first,
            "rows": len(checked.expert_ids_RLK),
            "generated_from": sequence.generated_from,
        }

    def _write(self, name: str, array: npt.NDArray[np.generic]) -> None:
        self._files[name].write(np.ascontiguousarray(array).data)

    # -------------------------------------------------------------------------------------------- out

    def _tokenised(self, index: pa.Table, first_prompt: int, vocab_id_T: Ids, context_T: Ids) -> TokenisedSegment:
        tokens_P = index["tokens"].to_numpy()
        start_P = np.cumsum(tokens_P) - tokens_P
        position_T = (np.arange(len(vocab_id_T)) - np.repeat(start_P, tokens_P)).astype(np.int32)
        generated_P = index["generated_from"].to_numpy(zero_copy_only=False).astype(np.float64)  # NaN: none
        special_ids = self._labels.special_ids
        starts_T = np.flatnonzero((position_T == 0) | np.insert(np.diff(context_T) != 0, 0, True))
        return TokenisedSegment(
            prompts=index.select(CANONICAL.names),
            text_P=index["text"].to_pylist(),
            first_prompt=first_prompt,
            status_P=["ok"] * len(index),
            num_tokens_P=tokens_P,
            prompt_T=np.repeat(np.arange(first_prompt, first_prompt + len(index)), tokens_P),
            position_T=position_T,
            context_T=context_T,
            vocab_id_T=vocab_id_T,
            special_T=np.zeros(len(vocab_id_T), np.bool_) if special_ids is None else np.isin(vocab_id_T, special_ids),
            start_C=starts_T,
            length_C=np.diff(starts_T, append=len(vocab_id_T)),
            generated_T=position_T >= np.repeat(generated_P, tokens_P),
        )

    def _routing(self, index: pa.Table, ids_N: Ids, weights_N: npt.NDArray[np.float32] | None) -> RoutingBuffer:
        """Fill a buffer with the rows of all sequences, N numbers in all, layer by layer.

        A layer without any rows is in it too: it separates the layers around it.
        """
        tokens_P, rows_P = index["tokens"].to_numpy(), index["rows"].to_numpy()
        begins_P = np.cumsum(tokens_P) - tokens_P + index["first"].to_numpy()
        rows_R = np.repeat(begins_P - (np.cumsum(rows_P) - rows_P), rows_P) + np.arange(rows_P.sum())
        shape = (-1, len(self._model.layers), self._model.top_k)
        ids_RLK = ids_N.reshape(shape)
        weights_RLK = None if weights_N is None else weights_N.reshape(shape)
        buffer = RoutingBuffer(int(tokens_P.sum()))
        for at, layer in enumerate(self._model.layers):
            weights_RK = None if weights_RLK is None else weights_RLK[:, at]
            ordered = self.ordered or weights_RK is not None or self._model.top_k == 1
            buffer.add(rows_R, {layer: LayerRouting(ids_RLK[:, at], weights_RK, ordered)})
        return buffer

    def _dtypes(self) -> dict[str, np.dtype[np.generic]]:
        """Return the arrays kept of a segment, with their dtypes."""
        weights = {"weights": np.dtype(np.float32)} if self.weights else {}
        return {"ids": self._dtype, **weights, "vocab": np.dtype(np.int32), "context": np.dtype(np.int32)}

    def _read(self, name: str, number: int, dtype: np.dtype[np.generic]) -> npt.NDArray[Any]:
        return np.fromfile(self._path(name, number), dtype)

    def _path(self, name: str, number: int | None = None) -> Path:
        return self._folder / f"{self.segments - 1 if number is None else number}.{name}"
