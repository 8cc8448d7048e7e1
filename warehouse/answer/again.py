"""Asking again: a query that met a run just as it was sealed, unsealed or deleted is asked once more.

The views notice most of it (see `moewh.warehouse.views.base`), and DuckDB that a file it had listed is gone. What
neither does shows when the folders are looked at before and after.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.views.base import ASK_AGAIN

if TYPE_CHECKING:
    from moewh.warehouse.files.layout import Layout

T = TypeVar("T")
_TIMES = 50
_PAUSE = 0.1
"""Seconds."""
_HELD = 1 << 20
"""Characters."""


class HeldBack:
    """A text stream that keeps what is written to it until `release`, so that it can be taken back.

    Of a long answer the beginning alone is kept: then it is passed on.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held: list[str] = []
        self._size = 0
        self.passed_on = False
        """True once something can no longer be taken back."""

    def write(self, text: str) -> int:
        """Keep a text, or pass it on with all before it."""
        self._held.append(text)
        self._size += len(text)
        if self.passed_on or self._size > _HELD:
            self.release()
        return len(text)

    def flush(self) -> None:
        """Do nothing: `release` flushes."""

    def forget(self) -> None:
        """Drop what is kept."""
        self._held, self._size = [], 0

    def release(self) -> None:
        """Pass on what is kept."""
        self.passed_on = True
        self._stream.write("".join(self._held))
        self._stream.flush()
        self.forget()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)


def until_settled(layout: Layout, work: Callable[[], T], printed: HeldBack | None = None) -> T:
    """Do work that reads a warehouse, and again if a run was sealed, unsealed, begun or deleted meanwhile.

    What the work prints is released in the end. Raises what the work raises if nothing of that kind happened, and
    MoewhError if it goes on happening or if what was printed can no longer be taken back.
    """
    import duckdb

    for _ in range(_TIMES):
        before = _state(layout)
        try:
            result = work()
        except (duckdb.Error, MoewhError) as error:
            if ASK_AGAIN not in str(error) and _state(layout) == before:
                raise
        else:
            if _state(layout) == before:
                if printed is not None:
                    printed.release()
                return result
        if printed is not None:
            if printed.passed_on:
                break
            printed.forget()
        time.sleep(_PAUSE)
    raise MoewhError(f"runs were sealed, begun or deleted in {layout.root} while it was read. {ASK_AGAIN}")


def _state(layout: Layout) -> list[tuple[str, int, int]]:
    """Return what changes when a run is begun, sealed, unsealed or deleted."""
    state = []
    for name in ("runs", "sealed", "unsealed"):
        folder = layout.root / name
        if folder.is_dir():
            with os.scandir(folder) as entries:
                state += [(f"{name}/{entry.name}", entry.inode(), 0) for entry in entries]
            state.append((name, folder.stat().st_ino, folder.stat().st_mtime_ns))
    return sorted(state)
