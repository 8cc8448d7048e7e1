"""`moewh shell`: the `duckdb` program, with every view of a warehouse made in its memory.

It does not open `warehouse.duckdb`: whoever holds that file read-write locks everyone else out, and its paths may be
those of the place the warehouse was copied from. No variable stays set, so that other warehouses can be attached.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.views.base import view_statements

if TYPE_CHECKING:
    from moewh.warehouse.files.layout import Layout

_LONGEST = 25_000
"""Characters of one command, of at most four bytes each."""


def find_duckdb() -> str:
    """Return the path of the `duckdb` program: on the PATH, or beside this Python. Raises MoewhError."""
    beside = Path(sys.executable).parent
    found = shutil.which("duckdb") or shutil.which("duckdb", path=str(beside))
    if found is None:
        raise MoewhError(
            "there is no duckdb program on the PATH. Get it with `pip install duckdb-cli` or from "
            "https://duckdb.org/install, or ask with `moewh query -c SQL`."
        )
    return found


def open_shell(layout: Layout, arguments: tuple[str, ...]) -> None:
    """Become the DuckDB shell, on the warehouse as it is now. Raises MoewhError."""
    layout.require().linked_folders()
    program = find_duckdb()
    commands = [part for command in _commands(layout) for part in ("-cmd", command)]
    sys.stdout.flush()
    os.execv(program, [program, *commands, ":memory:", *arguments])


def _commands(layout: Layout) -> Iterator[str]:
    """Yield the statements that make the views, several to a command: Linux takes no argument above 128 KiB."""
    command = ""
    for statement in view_statements(layout, comments=True):
        if len(command) + len(statement) > _LONGEST:
            yield command
            command = ""
        command += f"{statement};\n"
    yield command
