"""`moewh shell`: the `duckdb` program, read-only, on the published file."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from warehouse.errors import MoewhError
from warehouse.layout import Layout, glob_literal
from warehouse.views import sql_string


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
    """Become the DuckDB shell. It is told where the warehouse is now, in case it has moved.

    Read-only, since a shell that may write locks every other one out. Raises MoewhError.
    """
    if not layout.database.is_file():
        raise MoewhError(f"there is no {layout.database}. Run `moewh refresh` to write it.")
    program = find_duckdb()
    here = f"set variable moewh_root = {sql_string(glob_literal(layout.root))}"
    sys.stdout.flush()
    os.execv(program, [program, "-readonly", "-cmd", here, str(layout.database), *arguments])
