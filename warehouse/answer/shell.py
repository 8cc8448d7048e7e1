"""`moewh shell`: the `duckdb` program, with every view of a warehouse created in its memory.

It does not open `warehouse.duckdb`: a process that opens that file read-write locks all others out, and the file may
contain the paths of another copy of the warehouse. No variable stays set, so that other warehouses can be attached.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from moewh.warehouse.errors import MoewhError, UsageError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.files.names import DATABASE
from moewh.warehouse.remote.place import Remote
from moewh.warehouse.remote.published import Published, Readable
from moewh.warehouse.views.statements import bound_to, view_statements, zero_rows_of

_LONGEST = 25_000
"""Characters of one command, of at most four bytes each."""


def find_duckdb() -> str:
    """Return the path of the `duckdb` program, on the PATH or beside this Python. Raises MoewhError."""
    beside = Path(sys.executable).parent
    found = shutil.which("duckdb") or shutil.which("duckdb", path=str(beside))
    if found is None:
        raise MoewhError(
            "there is no duckdb program on the PATH. Install it with `pip install duckdb-cli` or from "
            "https://duckdb.org/install, or use `moewh query -c SQL`."
        )
    return found


def open_shell(warehouse: Readable, arguments: tuple[str, ...]) -> None:
    """Replace this process by a DuckDB shell on the warehouse. Raises MoewhError, and UsageError for a URL."""
    if isinstance(warehouse, Published) and isinstance(warehouse.place, Remote):
        raise UsageError(
            f"`moewh shell` opens a warehouse on this machine. In a DuckDB shell, type: "
            f"LOAD httpfs; ATTACH '{warehouse.root}/{DATABASE}' (READ_ONLY);"
        )
    warehouse.require()
    if isinstance(warehouse, Layout):
        warehouse.linked_folders()
        warehouse.require_whole()
    program = find_duckdb()
    commands = [part for command in _commands(warehouse) for part in ("-cmd", command)]
    sys.stdout.flush()
    try:
        os.execv(program, [program, *commands, ":memory:", *arguments])
    except OSError as error:
        reason = error.strerror or error
        raise MoewhError(f"{program} cannot be run: {reason}. Replace it: `pip install duckdb-cli`.") from error


def _commands(warehouse: Readable) -> Iterator[str]:
    """Yield commands of several statements that create the views: Linux limits an argument to 128 KiB."""
    command = ""
    zero_rows = zero_rows_of(warehouse) if isinstance(warehouse, Layout) else None
    for statement in bound_to(zero_rows, view_statements(warehouse, comments=True)):
        if len(command) + len(statement) > _LONGEST:
            yield command
            command = ""
        command += f"{statement};\n"
    yield command
