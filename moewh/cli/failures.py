"""Failures: an exception in, one line and an exit code out. A bug of ours keeps its traceback."""

from __future__ import annotations

import sys

import click

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import own_paths


def explain(error: Exception) -> tuple[str, int] | None:
    """Return the line and the exit code for a failure that a user can cause; None for a bug of ours."""
    duckdb = sys.modules.get("duckdb")
    match error:
        case MoewhError():
            explained = (str(error), error.exit_code)
        case click.UsageError():
            command = error.ctx.command_path if error.ctx else "moewh"
            explained = (f"{error.format_message()} Try `{command} --help`.", 2)
        case click.ClickException():
            explained = (error.format_message(), error.exit_code)
        case click.Abort():
            explained = ("stopped before it was done.", 1)
        case OSError():
            explained = (_os_error(error), 1)
        case _ if duckdb is not None and isinstance(error, duckdb.Error):
            explained = (_duckdb_error(str(error)), 1)
        case UnicodeDecodeError() if b" Error: " in error.object:  # DuckDB's message, which quotes damaged bytes
            explained = (_duckdb_error(error.object.decode(errors="backslashreplace")), 1)
        case _:
            return None
    return explained


def one_line(message: str) -> str:
    """Join a message's lines; spaces within a line stay, since they may be those of a token."""
    return " ".join(line for line in map(str.strip, message.splitlines()) if line)


def _os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}."


def _duckdb_error(text: str) -> str:
    """Keep DuckDB's message and the line it names, without the drawing of the place below it."""
    message, _, place = own_paths(text).partition("\n\nLINE ")
    if place:
        message += f" (line {place.partition(':')[0]})"
    if "disabled by configuration" in message or "has been locked" in message:
        message += ". A query may read the warehouse only; --unsafe lifts that."
    if "No files found that match the pattern" in message:
        message += ". Run `moewh refresh` to write the files that are missing."
    return message
