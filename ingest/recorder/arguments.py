"""Check the arguments of the Python API, and convert them to the options and inputs of a run.

In: the arguments of `moewh.ingest`, `moewh.record`, `moewh.Writer` and `moewh.TrainerCallback`. Out: `IngestOptions`,
the paths of prompts, and values of the right types; or a UsageError that names the argument. Errors from further in
name options of the command: `as_arguments` has them name arguments.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import fields, replace
from functools import cache
from numbers import Real
from operator import index
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moewh.ingest.options import RECORDS, IngestOptions, option_of
from moewh.warehouse.errors import UsageError, brief, naming_arguments

_OF_FILES = ("revision", "device", "dtype", "trust_remote_code", "allow_pickle", "chat_template")
"""Options that control how files are loaded."""


@contextmanager
def as_arguments() -> Iterator[None]:
    """Have errors raised within name arguments where they name options: max_length for --max-length."""
    with naming_arguments(argument_names()):
        yield


@cache
def argument_names() -> dict[str, str]:
    """Return how Python gives each option of an ingest, also where a message shows it with its value."""
    names = {"--warehouse": "warehouse"}
    for one in fields(IngestOptions):
        option = option_of(one)
        name = f"{one.name}={not one.default}" if isinstance(one.default, bool) else one.name
        names |= {option.flag: name, f"{option.flag} {option.metavar}": name}
    return names


def prompt_paths(prompts: Any) -> tuple[str, ...]:
    """Return the paths of prompts; empty if they are records. Raises UsageError for anything else."""
    if isinstance(prompts, str | os.PathLike):
        return (os.fspath(prompts),)
    if prompts is None:
        return ()
    frames = ("to_records", "to_dicts", "to_pylist", "to_dict")
    is_frame = any(hasattr(prompts, name) for name in frames) and not hasattr(prompts, "to_list")
    if hasattr(prompts, "read"):
        raise UsageError("prompts are an open file, whose lines would be the texts. Give its path, or a list of texts.")
    if isinstance(prompts, Mapping | bytes) or is_frame or not isinstance(prompts, Iterable):
        raise UsageError(
            f"prompts are a {type(prompts).__name__}. Give a path, or a list of records: dicts or texts "
            "(of a data frame, its to_dict('records') or to_dicts())."
        )
    if isinstance(prompts, Set):
        raise UsageError("prompts are a set, which has no order. Give a list, such as sorted(prompts).")
    if isinstance(prompts, list | tuple) and prompts and all(map(_is_file, prompts)):
        raise UsageError("prompts are names of files that exist. Give each as a pathlib.Path, to read it.")
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
    hints = get_type_hints(IngestOptions)
    options = {name: _of_type(name, value, hints[name]) for name, value in options.items()}
    return IngestOptions(model=model, prompts=paths if paths or in_files else (RECORDS,), run_id=run_id, **options)


def whole(name: str, value: Any, least: int = 0, most: int = 2**63 - 1) -> int:
    """Return a whole number, whatever its class. Raises UsageError for anything else, and outside the limits."""
    try:
        number = None if isinstance(value, bool) else index(value)
    except TypeError:
        number = None
    if number is None and least < 0:
        raise UsageError(f"{name} is {brief(value)}. Give a whole number.")
    if number is None or not least <= number <= most:
        limit = f"at most {most:,}" if number is not None and number > most else f"at least {least:,}"
        raise UsageError(f"{name} is {brief(value)}. Give a whole number of {limit}.")
    return number


def flag(name: str, value: Any) -> bool:
    """Return True or False. Raises UsageError for anything else, such as a text."""
    if type(value).__name__ not in ("bool", "bool_"):  # numpy has a bool of its own
        raise UsageError(f"{name} is {brief(value)}. Give True or False.")
    return bool(value)


def checked_text(name: str, value: Any) -> str | None:
    """Return a text, or None. Raises UsageError for anything else, and for what is not Unicode."""
    if value is None or (isinstance(value, str) and value.encode(errors="replace").decode() == value):
        return None if value is None else str(value)
    raise UsageError(f"{name} is {brief(value)}, which is not text. Give a string or None.")


def described(series: Any, train_step: Any, train_tokens: Any) -> dict[str, Any]:
    """Return what a user states about a recorded run. Raises UsageError for values of other types."""
    if series == "":
        raise UsageError("series is empty. Give a name, or None.")
    numbers = {"train_step": train_step, "train_tokens": train_tokens}
    return {
        "series": checked_text("series", series),
        **{name: None if value is None else whole(name, value) for name, value in numbers.items()},
    }


def _is_file(prompt: Any) -> bool:
    try:
        return isinstance(prompt, str) and os.path.isfile(prompt)  # noqa: PTH113 - any text, as one that holds a NUL
    except ValueError:
        return False


def _of_type(name: str, value: Any, hint: Any) -> Any:
    """Return an option's value in its field's type. Raises UsageError for one that is not of it."""
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    if value is None:
        if type(None) not in kinds:
            raise UsageError(f"{name} is None. Give a value, or leave it out.")
        return None
    if name == "hidden_states" and not isinstance(value, str):
        listed = value if isinstance(value, list | tuple | range) else [value]
        return ",".join(str(whole(name, layer)) for layer in listed)
    if get_origin(kinds[0]) is Literal:
        return value  # `IngestOptions` checks choices
    if get_origin(kinds[0]) is tuple:
        if not isinstance(value, list | tuple):
            raise UsageError(f"{name} is {brief(value)}. Give a list of texts.")
        return tuple(checked_text(name, item) for item in value)
    if str in kinds:
        return checked_text(name, os.fspath(value) if isinstance(value, os.PathLike) else value)
    return _number(name, value, kinds)


def _number(name: str, value: Any, kinds: tuple[Any, ...]) -> bool | int | float:
    if bool in kinds:
        return flag(name, value)
    if int in kinds:
        return whole(name, value, -(2**63))
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is {brief(value)}. Give a number.")
    return float(value)


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


def refuse_file_options(options: dict[str, Any]) -> None:
    """Raise UsageError for options that control how files are loaded, because the model is in memory."""
    if wrong := [name for name in _OF_FILES if name in options]:
        raise UsageError(f"{wrong[0]} is for a model loaded from files, and this one is in memory. Leave it out.")
