"""`moewh.TrainerCallback`: ingest the same prompts at every N-th step of a training run, as runs of one series.

In: transformers' Trainer, as it trains. Out: one run per recorded step, with its train_step. Training is not affected:
see `moewh.ingest.model.in_memory.borrowed`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers
from transformers import TrainerControl, TrainerState, TrainingArguments

from moewh.ingest.model.in_memory import borrowed, model_in_memory
from moewh.ingest.options import IngestOptions
from moewh.ingest.prompts.in_memory import in_memory
from moewh.ingest.recorder.arguments import (
    argument_names,
    as_arguments,
    ingest_options,
    prompt_paths,
    refuse_file_options,
    whole,
)
from moewh.ingest.run import Progress, ingest
from moewh.warehouse.errors import MoewhError, with_arguments
from moewh.warehouse.files.names import check_run_id
from moewh.warehouse.remote.published import writable
from moewh.warehouse.runs import run_ids


class TrainerCallback(transformers.TrainerCallback):
    """Ingests fixed prompts when training begins, at every N-th step, and when it ends.

    Runs are named RUN_ID-stepN, in the series RUN_ID. If a run of a later step already exists, training does not begin;
    later failures (a full disk) give a warning, and training continues.
    """

    @as_arguments()
    def __init__(
        self,
        prompts: str | os.PathLike[str] | Iterable[Any] | None,
        every: int,
        warehouse: str | os.PathLike[str] = "wh",
        run_id: str | None = None,
        *,
        tokenizer: Any = None,
        **options: Any,
    ) -> None:
        """Prepare; `prompts` and `options` are those of `moewh.ingest`.

        `run_id` defaults to the name of the Trainer's output folder, `tokenizer` to the Trainer's processing_class.
        Raises UsageError.
        """
        every = whole("every", every, 1)
        paths = prompt_paths(prompts)
        self._records = list(prompts) if not paths and isinstance(prompts, Iterable) else None
        refuse_file_options(options)
        self._options = ingest_options("model", paths, run_id, options, in_files=prompts is None)
        self._every, self._tokenizer = every, tokenizer
        self._layout = writable(warehouse)

    @as_arguments()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the initial model. Raises MoewhError for anything that would fail at every step."""
        del control
        if not state.is_world_process_zero:
            return
        name = self._options.run_id or Path(args.output_dir or "training").absolute().name
        self._options = replace(self._options, run_id=check_run_id(name), series=self._options.series or name)
        self._refuse_later(state.global_step)
        self._ingest(state.global_step, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Record the model at every N-th step."""
        del args, control
        if state.is_world_process_zero and state.global_step % self._every == 0:
            self._try(state.global_step, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Record the final model, unless the last step was recorded."""
        del args, control
        if state.is_world_process_zero and state.global_step % self._every:
            self._try(state.global_step, kwargs)

    def _refuse_later(self, step: int) -> None:
        """Raise MoewhError if runs of later steps exist, from another training run with this name."""
        prefix = f"{self._options.run_id}-step"
        found = (run.removeprefix(prefix) for run in run_ids(self._layout) if run.startswith(prefix))
        later = sorted(int(number) for number in found if number.isdecimal() and int(number) > step)
        if later:
            raise MoewhError(
                f"run {prefix}{later[0]} is in {self._layout.root} already, and this training is at step {step}. "
                f"Choose another run_id, or delete it with `moewh runs --delete {prefix}{later[0]} "
                f"{self._layout.option}`."
            )

    def _try(self, step: int, given: dict[str, Any]) -> None:
        try:
            self._ingest(step, given)
        except MoewhError as error:
            warnings.warn(f"moewh did not record step {step}: {error}", stacklevel=2)

    @as_arguments()
    def _ingest(self, step: int, given: dict[str, Any]) -> None:
        tokenizer = self._tokenizer or given.get("processing_class")
        options = self._options_at(step)
        described: dict[str, Any] = {"series": options.series, "train_step": step, "train_tokens": options.train_tokens}
        loaded = model_in_memory(given["model"], tokenizer, **described, generates=bool(options.generate))
        records = None if self._records is None else in_memory(self._records)
        with borrowed(loaded.model):
            progress = Progress(
                warn=lambda text: warnings.warn(f"step {step}: {with_arguments(text, argument_names())}", stacklevel=2)
            )
            ingest(options, self._layout, progress, model=loaded, records=records)

    def _options_at(self, step: int) -> IngestOptions:
        return replace(self._options, run_id=f"{self._options.run_id}-step{step}", train_step=step)
