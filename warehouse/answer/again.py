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
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.base import ASK_AGAIN

if TYPE_CHECKING:
    from moewh.warehouse.remote.published import Readable

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


def until_settled(warehouse: Readable, work: Callable[[], T], printed: HeldBack | None = None) -> T:
    """Do work that reads a warehouse, and again if a run was sealed, unsealed, begun or deleted meanwhile.

    Of a published one: if a run was published again with other files, or withdrawn.

    What the work prints is released in the end. Raises what the work raises if nothing of that kind happened, and
    MoewhError if it goes on happening or if what was printed can no longer be taken back.
    """
    import duckdb

    for _ in range(_TIMES):
        before = _state(warehouse)
        try:
            result = work()
        except (duckdb.Error, MoewhError) as error:
            if ASK_AGAIN not in str(error) and _settled(warehouse, before):
                raise
        else:
            if _settled(warehouse, before):
                if printed is not None:
                    printed.release()
                return result
        if printed is not None:
            if printed.passed_on:
                break
            printed.forget()
        time.sleep(_PAUSE)
    raise MoewhError(f"runs were sealed, begun or deleted in {warehouse.root} while it was read. {ASK_AGAIN}")


def _settled(warehouse: Readable, before: list[tuple[str, int, int]]) -> bool:
    """Tell whether what was read is of one state.

    The views of a published warehouse name its files, so more files change nothing; those that they name must be there
    and the same.
    """
    if isinstance(warehouse, Layout):
        return _state(warehouse) == before
    return warehouse.bound is None or warehouse.read_again().files.items() >= warehouse.bound.files.items()


def _state(warehouse: Readable) -> list[tuple[str, int, int]]:
    """Return what changes when a run is begun, sealed, unsealed or deleted; nothing for a published warehouse."""
    state: list[tuple[str, int, int]] = []
    if not isinstance(warehouse, Layout):
        return state
    for name in ("runs", "sealed", "unsealed"):
        folder = warehouse.root / name
        if folder.is_dir():
            with os.scandir(folder) as entries:
                state += [(f"{name}/{entry.name}", entry.inode(), 0) for entry in entries]
            state.append((name, folder.stat().st_ino, folder.stat().st_mtime_ns))
    return sorted(state)
