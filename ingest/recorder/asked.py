"""Convert the arguments of a Python call to the options and inputs of a run.

In: the arguments of `moewh.ingest` and `moewh.TrainerCallback`. Out: `IngestOptions`, and the paths of prompts.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from typing import Any

from moewh.ingest.options import RECORDS, IngestOptions
from moewh.warehouse.errors import UsageError

_OF_FILES = ("revision", "device", "dtype", "trust_remote_code", "allow_pickle", "chat_template")
"""Options that control how files are loaded."""


def prompt_paths(prompts: Any) -> tuple[str, ...]:
    """Return the paths of prompts; empty if they are records. Raises UsageError for anything else."""
    if isinstance(prompts, str | os.PathLike):
        return (os.fspath(prompts),)
    if prompts is None:
        return ()
    if isinstance(prompts, Mapping) or hasattr(prompts, "to_records") or not isinstance(prompts, Iterable):
        raise UsageError(
            f"prompts are a {type(prompts).__name__}. Give a path, or a list of records: dicts or texts "
            "(of a data frame, its to_dict('records'))."
        )
    listed = (
        isinstance(prompts, list | tuple) and bool(prompts) and all(isinstance(one, os.PathLike) for one in prompts)
    )
    return tuple(os.fspath(one) for one in prompts) if listed else ()


def ingest_options(
    model: str, paths: tuple[str, ...], run_id: str | None, options: dict[str, Any], *, in_files: bool
) -> IngestOptions:
    """Return the options of a run. Raises UsageError for an unknown option."""
    known = {one.name for one in fields(IngestOptions)} - {"model", "prompts", "run_id", "tokenizer"}
    if unknown := sorted(options.keys() - known):
        raise UsageError(f"ingest has no option {unknown[0]!r}. They are {', '.join(sorted(known))}.")
    return IngestOptions(model=model, prompts=paths if paths or in_files else (RECORDS,), run_id=run_id, **options)


def require_recordable(options: dict[str, Any]) -> None:
    """Raise UsageError for options that `moewh.record` does not support, such as those of the opt-in tables."""
    known = ("pad_token_id", "series", "train_step", "train_tokens", "segment_rows")
    for name in sorted(options.keys() - set(known)):
        elsewhere = " (moewh.ingest has)" if name in {one.name for one in fields(IngestOptions)} else ""
        raise UsageError(f"moewh.record has no option {name!r}{elsewhere}. Its options are {', '.join(known)}.")


def with_tokenizer(options: IngestOptions, tokenizer: Any) -> IngestOptions:
    """Return the options with the tokenizer of a model loaded from files. Raises UsageError unless it is a name."""
    if not isinstance(tokenizer, str | os.PathLike):
        raise UsageError("a model loaded from files needs the name of a tokenizer. Give its hub id or folder.")
    return replace(options, tokenizer=os.fspath(tokenizer))


def refuse_of_files(options: dict[str, Any]) -> None:
    """Raise UsageError for options that control how files are loaded, because the model is in memory."""
    if wrong := [name for name in _OF_FILES if name in options]:
        raise UsageError(f"{wrong[0]} is for a model loaded from files, and this one is in memory. Leave it out.")
