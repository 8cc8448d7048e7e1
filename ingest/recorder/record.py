"""`moewh.record`: a `with` block that records every forward pass of a model, exactly as the experts ran it.

In: whatever the user's code does with the model. Out: a run, whose prompts are the sequences in order of appearance.
The model is proved at the start, as in every ingest; each pass is copied as it runs, and assembled elsewhere.
"""

from __future__ import annotations

from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import replace
from datetime import UTC, datetime
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from moewh.ingest.capture.forward import run_verified_batch
from moewh.ingest.capture.hooks import text_base
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.identity import describe_run, in_memory_identity
from moewh.ingest.model.in_memory import RECORDED, borrowed, model_in_memory, unwrapped_model
from moewh.ingest.model.loading import LoadedModel, config_sha256
from moewh.ingest.options import SEGMENT_ROWS
from moewh.ingest.prompts.batches import Batch
from moewh.ingest.prompts.stream import PromptPlan
from moewh.ingest.prompts.tokenise import tokenizer_sha256
from moewh.ingest.prompts.vocabulary import vocabulary_texts
from moewh.ingest.record import Identity, RunRecord, default_run_id
from moewh.ingest.recorder.arguments import as_arguments, described, whole
from moewh.ingest.recorder.open_run import OpenRun, require_new
from moewh.ingest.recorder.passes import Pass, PassObserver
from moewh.ingest.recorder.sequences import Block, Labels, Part, require_whole
from moewh.ingest.recorder.writer import decoder
from moewh.ingest.workers import in_background, start_workers
from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import check_run_id

_PASSES_AHEAD = 16
"""Passes whose routing may be in flight from the device at once."""
_PROBED_TEXT = "The quick brown fox jumps over the lazy dog; 7 + 5 = 12, and def f(x): return x."
_PROBED_TOKENS = 32


class Recorder:
    """A context manager that records every forward pass of a model within its block.

    The run is `running` until the block ends. After an exception, it stays `running`, with all passes before it.
    """

    @as_arguments()
    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        layout: Layout,
        run_id: str | None = None,
        *,
        pad_token_id: int | None = None,
        series: str | None = None,
        train_step: int | None = None,
        train_tokens: int | None = None,
        segment_rows: int = SEGMENT_ROWS,
    ) -> None:
        """Prepare a recording; nothing is checked before the block is entered.

        `pad_token_id` marks padding on the right of rows that come without an attention_mask. Without it, such
        tokens are recorded as tokens, as the model treats them.
        """
        self._model, self._tokenizer, self._layout = model, tokenizer, layout
        self._given_id = None if run_id is None else check_run_id(run_id)
        self._described = described(series, train_step, train_tokens)
        self._pad_token_id = None if pad_token_id is None else whole("pad_token_id", pad_token_id)
        self._segment_rows = whole("segment_rows", segment_rows, 1)
        self._labels = Labels()
        self._futures: list[Future[None]] = []
        self._stack = ExitStack()
        self._ended = False

    def label(self, *, domain: str | None = None, source: str | None = None, **metadata: Any) -> None:
        """Label the sequences that begin from here on; labels left out are NULL. Raises UsageError after the block."""
        if self._ended:
            raise UsageError("the recording has ended, so there is nothing to label. Call label within the block.")
        self._labels = Labels.of(domain, source, metadata)

    @property
    def run_id(self) -> str:
        """The run's id. Raises UsageError before the block is entered, unless it was given."""
        if not hasattr(self, "_run"):
            if self._given_id is None:
                raise UsageError("the run has no id before its block is entered. Give it a run_id.")
            return self._given_id
        return self._run.record.run_id

    @as_arguments()
    def __enter__(self) -> Recorder:
        inner = unwrapped_model(self._model)
        if inner.config.is_encoder_decoder:
            raise MoewhError(f"{type(inner).__name__} is an encoder-decoder, which only `moewh.ingest` records.")
        if self._given_id is not None:
            require_new(self._layout, self._given_id)
        loaded = model_in_memory(self._model, self._tokenizer, **self._described)
        with borrowed(inner):
            record = self._describe(loaded)
        with ExitStack() as stack:
            workers = start_workers(in_background(inner.device))
            _, self._collector, writer = stack.enter_context(workers)
            self._run = OpenRun(
                self._layout,
                record,
                self._segment_rows,
                writer,
                decode=decoder(loaded.tokenizer),
                special_ids=loaded.tokenizer.all_special_ids,
            )
            self._run.prepare()
            self._observer = PassObserver(loaded, lambda: self._labels, self._done)
            self._observer.attach()
            observed = {text_base(inner), *(moe.experts for moe in loaded.moe_layers)}
            RECORDED.update(observed)
            stack.callback(RECORDED.difference_update, observed)
            self._stack = stack.pop_all()
        return self

    @as_arguments()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended = True
        with self._stack:
            try:
                if kind is None:
                    self._observer.wait_for_others()
            except BaseException:
                self._close(whole=False)
                raise
            self._close(whole=kind is None)

    def _close(self, *, whole: bool) -> None:
        """Let go of the model and commit what was recorded, as a complete run if it is `whole`."""
        missing = self._observer.removed() if whole else None
        self._observer.detach()
        if whole and missing is None:
            self._wait_for(len(self._futures))
            if not self._run.begun:
                raise MoewhError(
                    f"run {self.run_id!r}: no forward pass of the model was seen, so nothing was recorded. Record the "
                    "model that your code calls."
                )
        self._collector.submit(self._run.close, whole=whole and missing is None).result()
        if missing is not None:
            raise missing

    def _describe(self, loaded: LoadedModel) -> RunRecord:
        """Prove the model on a fixed text, and describe the run."""
        _, facts = run_verified_batch(loaded, _probe(loaded), WantedVectors())
        identity = self._identify(loaded)
        record = describe_run(loaded, identity, facts, PromptPlan(0, "", ()))
        open_ended = dict.fromkeys(("prompts_sha256", "segments_planned", "tokens_key", "max_length"))
        vocabulary = vocabulary_texts(loaded.tokenizer, loaded.vocabulary_rows)
        self._entries = len(vocabulary)
        self._top_k = {row["layer"]: row["top_k"] for row in record.layers}
        return replace(record, run={**record.run, **open_ended, "origin": "recorded"}, vocabulary=vocabulary)

    def _identify(self, loaded: LoadedModel) -> Identity:
        config = loaded.config
        shaping = {
            "model": loaded.source.name,
            "config_sha256": config_sha256(config),
            "weights_sha256": loaded.weights_sha256,
            "attn_implementation": getattr(config, "_attn_implementation", None),
            "experts_implementation": getattr(config, "_experts_implementation", None),
            "tokenizer_sha256": tokenizer_sha256(loaded.tokenizer),
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "max_length": None,
            "segment_rows": self._segment_rows,
            "recorded_at": datetime.now(UTC).isoformat(),
            **in_memory_identity(loaded),
        }
        return Identity(shaping, self._given_id or default_run_id(loaded.source.name, shaping))

    # ------------------------------------------------------------------------------------ passes as they arrive

    @as_arguments()
    def _done(self, made: Pass, closed: list[Block]) -> None:
        self._futures.append(self._collector.submit(self._collect, made, closed))
        while self._futures and (self._futures[0].done() or len(self._futures) > _PASSES_AHEAD):
            self._wait_for(1)

    def _wait_for(self, count: int) -> None:
        """Wait for the oldest submitted work, and re-raise its errors."""
        for _ in range(count):
            wait(self._futures[:1])  # may be interrupted, and then its error is raised later
            self._futures.pop(0).result()

    def _collect(self, made: Pass, closed: list[Block]) -> None:
        """Append a pass to its block, and commit full segments."""
        if made.block.refused:
            raise MoewhError("an earlier pass of these sequences was refused, so they cannot be continued.")
        try:
            made.block.parts.append(self._part(made))
        except BaseException:
            made.block.refused = True
            raise
        if made.first:
            self._run.add(made.block)
        for block in closed:
            block.closed = True
        self._run.commit_full()

    def _part(self, made: Pass) -> Part:
        routing = made.routing.wait()  # the ids were copied before the routing
        for layer, chosen in routing.items():
            if (K := chosen.expert_ids_TK.shape[1]) != self._top_k[layer]:
                raise MoewhError(
                    f"top-k is {K} at layer {layer}, and was {self._top_k[layer]} when the block was entered. "
                    "Use one block for each top-k."
                )
        ids_BS = made.ids_BS.numpy().astype(np.int32)
        if ids_BS.max(initial=-1) >= self._entries:
            raise MoewhError(
                f"token id {ids_BS.max()} is outside the vocabulary of the recording ({self._entries:,} entries). "
                "Resize the embeddings or add tokens before the block."
            )
        if made.mask_BS is not None:
            if bool(((made.mask_BS != 0) & (made.mask_BS != 1)).any()):
                raise MoewhError(
                    "attention_mask holds values other than 0 and 1, such as numbers of packed sequences or what is "
                    "added to scores. Give 1 for each token and 0 for padding."
                )
            mask_BS = (made.mask_BS != 0).numpy()
            require_whole(mask_BS)
        else:
            mask_BS = np.ones(ids_BS.shape, np.bool_)
            if made.first and self._pad_token_id is not None:
                mask_BS = ~np.logical_and.accumulate(ids_BS[:, ::-1] == self._pad_token_id, axis=1)[:, ::-1]
        if made.positions_BS is not None:
            _require_one_sequence_per_row(made.positions_BS, None if made.mask_BS is None else mask_BS)
        after_end_BS = None if made.after_end_BS is None else made.after_end_BS.numpy()
        return Part(ids_BS, mask_BS, made.generated, routing, after_end_BS)


def _probe(loaded: LoadedModel) -> Batch:
    """Return a batch for the proof that any language model can run."""
    ids = loaded.tokenizer(_PROBED_TEXT, add_special_tokens=False)["input_ids"]
    known = [token for token in ids if token < (loaded.vocabulary_rows or token + 1)]
    known = known[: min(_PROBED_TOKENS, loaded.max_length)] or [0, 1, 2, 3]
    return Batch(np.array([known]), np.ones((1, len(known)), np.int64), np.arange(len(known)))


def _require_one_sequence_per_row(positions: torch.Tensor, mask_BS: npt.NDArray[np.bool_] | None) -> None:
    """Raise MoewhError if positions restart within a row, which are separate sequences.

    Without a mask, models take any step but 1 for a restart; with one, they may have gaps.
    """
    if positions.dim() > 2:
        return
    steps = np.diff(positions.numpy(), axis=-1)
    restarts = steps != 1 if mask_BS is None else (steps <= 0) & mask_BS[:, 1:] & mask_BS[:, :-1]
    if restarts.any():
        raise MoewhError(
            "position_ids restart within a row: sequences are packed, and moewh cannot tell them apart. Give each a "
            "row, with an attention_mask."
        )
