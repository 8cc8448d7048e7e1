"""Failures: an exception in, one line and an exit code out. A bug in moewh keeps its traceback."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import click

from moewh.warehouse.errors import MoewhError, lacking
from moewh.warehouse.files import schema
from moewh.warehouse.files.names import own_paths

_OURS = r"MoewhError: (.+)"
"""DuckDB's form, with a traceback, of an exception raised while a query reads a remote file."""
_OTHER_COLUMNS = r'Failed to read file "(.+)/[^/"]+": schema mismatch in glob: column "(\w+)"'
"""DuckDB's message for a file whose columns differ from those that the view expects."""
_STORED = r"/(segments|sealed|runs|geometry)/run_id=[^'\"]+\.parquet"
"""A file of a warehouse, in a message."""


def explain(error: Exception) -> tuple[str, int] | None:
    """Return the line and the exit code for a failure that a user can cause; None for a bug in moewh."""
    duckdb = sys.modules.get("duckdb")
    match error:
        case MoewhError():
            explained = (str(error), error.exit_code)
        case click.UsageError():
            explained = (_wrong_use(error), 2)
        case click.ClickException():
            explained = (error.format_message(), error.exit_code)
        case click.Abort():
            explained = ("stopped before it was done.", 1)
        case FileNotFoundError() if error.filename is None and not _has_folder():
            explained = ("the current directory no longer exists. Change to another.", 1)
        case UnicodeEncodeError() if "surrogates" in error.reason:
            explained = (f"{error.object[:60]!a} is not UTF-8 text. Use a UTF-8 locale (LC_ALL=C.UTF-8).", 2)
        case ImportError() | AttributeError() if unusable := _unusable_package(error):
            explained = (unusable, 1)
        case _ if lack := lacking(error):
            explained = (lack, 1)
        case OSError():
            explained = (_os_error(error), 1)
        case _ if duckdb is not None and isinstance(error, getattr(duckdb, "Error", ())):
            explained = (_duckdb_error(str(error)), 1)
        case UnicodeDecodeError() if b" Error: " in error.object:  # DuckDB's message, which quotes damaged bytes
            explained = (_duckdb_error(error.object.decode(errors="backslashreplace")), 1)
        case _:
            return None
    return explained


def _wrong_use(error: click.UsageError) -> str:
    """Return the line for a command that was used wrongly, with its help.

    For an option that does not exist, one that is spelled much alike, or how a query's parameters are given.
    """
    import difflib

    message, hint = error.format_message(), f"Try `{error.ctx.command_path if error.ctx else 'moewh'} --help`."
    if isinstance(error, click.NoSuchOption) and error.ctx is not None:
        params = error.ctx.command.params
        known = [name for parameter in params if isinstance(parameter, click.Option) for name in parameter.opts]
        places = {parameter.name: parameter for parameter in params if isinstance(parameter, click.Argument)}
        message = f"No such option {error.option_name!r}."
        if near := difflib.get_close_matches(error.option_name, known, 1, cutoff=0.75):
            hint = f"Did you mean {near[0]}?"
        elif place := places.get(error.option_name.lstrip("-")):
            pieces = " ".join(error.ctx.command.collect_usage_pieces(error.ctx))
            hint = f"Give {place.make_metavar(error.ctx)} by itself: `{error.ctx.command_path} {pieces}`."
        elif "-p" in known:
            hint = f"A query's parameter is given as -p {error.option_name.lstrip('-')}=VALUE."
    return f"{message}{'' if message.endswith(('.', '?', '?)')) else '.'} {hint}"


def _has_folder() -> bool:
    """Return whether the current directory exists."""
    try:
        Path.cwd()
    except FileNotFoundError:
        return False
    return True


def _unusable_package(error: ImportError | AttributeError) -> str | None:
    """Return the line for a package that is missing, too old, or hidden by a file of its name; None for our own."""
    if isinstance(error, ImportError):
        name, file = error.name or "", error.path
    elif isinstance(error.obj, ModuleType):
        name, file = error.obj.__name__, getattr(error.obj, "__file__", None)
    else:
        return None
    package = name.partition(".")[0]
    if package in ("", "moewh") or (isinstance(error, AttributeError) and package in sys.stdlib_module_names):
        return None
    if isinstance(error, ModuleNotFoundError):
        return f"the package {package} is not installed, or only in part ({error}). Run `pip install moewh` again."
    return (
        f"the package {package} cannot be used: {error}. If {file or package} is a file of yours, rename it; otherwise "
        "install a version that moewh supports: `pip install -U moewh`."
    )


def _stored_columns() -> set[str]:
    return {column.name for table in schema.TABLES for column in table.stored}


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _duckdb_error(text: str) -> str:
    """Return DuckDB's message and line number, without the excerpt of the SQL below it."""
    if raised := re.search(_OURS, text):
        return raised[1]
    text = own_paths(text)
    if other := re.search(_OTHER_COLUMNS, text):
        return (
            f"{other[1]} was written by another version of moewh: it lacks the column {other[2]}. `moewh verify` says "
            "which, and `moewh verify --repair` takes it out."
        )
    message, _, position = text.partition("\n\nLINE ")
    if position:
        message += f" (line {position.partition(':')[0]})"
    if (lost := re.search(r'Referenced column "(\w+)" not found', text)) and lost[1] in _stored_columns():
        # if the first file lacks it, DuckDB names no file
        message += (
            ". If that column is one of the view's, a segment was written by another version of moewh: "
            "`moewh verify` says which."
        )
    if "disabled by configuration" in message or "has been locked" in message:
        message += ". A query may read the warehouse only; --unsafe lifts that."
    elif re.search(_STORED, message):
        message += ". `moewh verify` says which files are damaged."
    if "No files found that match the pattern" in message:
        message = message.removesuffix(".") + ". Run `moewh refresh` to write the files that are missing."
    return message
