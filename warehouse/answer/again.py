"""Asking again: a query that met a run just as it was sealed, unsealed or deleted is asked once more.

The views notice it (see `moewh.warehouse.views.base`), or DuckDB finds that a file it had listed is gone.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.views.base import ASK_AGAIN

if TYPE_CHECKING:
    from moewh.warehouse.files.layout import Layout

T = TypeVar("T")
_TIMES = 20
_PAUSE = 0.05
"""Seconds."""


class Watched:
    """A text stream that knows whether anything was written to it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.written = False

    def write(self, text: str) -> int:
        """Write as the stream itself does."""
        self.written = True
        return int(self._stream.write(text))

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


def until_settled(layout: Layout, work: Callable[[], T], spoilt: Callable[[], bool] = lambda: False) -> T:
    """Do work that reads a warehouse, and do it again if a run was sealed, unsealed or deleted meanwhile.

    Raises what the work raises if nothing of that kind happened, if it goes on happening, or if `spoilt` says that the
    work left something that cannot be taken back.
    """
    import duckdb

    for _ in range(_TIMES):
        before = _state(layout)
        try:
            return work()
        except (duckdb.Error, MoewhError) as error:
            told = ASK_AGAIN in str(error)
            vanished = "No such file" in str(error) or "No files found" in str(error)
            if spoilt() or not (told or (vanished and _state(layout) != before)):
                raise
            time.sleep(_PAUSE)
    return work()


def _state(layout: Layout) -> list[tuple[str, int, int]]:
    """Return what says which runs there are, and which are sealed."""
    folders = (layout.root / name for name in ("runs", "sealed", "unsealed"))
    return sorted(
        (str(path), path.stat().st_ino, path.stat().st_mtime_ns)
        for folder in folders
        if folder.is_dir()
        for path in (folder, *folder.iterdir())
        if path.exists()
    )
