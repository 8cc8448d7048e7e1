"""Retrying: a query that ran while a run was being sealed, unsealed or deleted is run again.

The views detect most such changes (see `moewh.warehouse.views.merged`), and DuckDB detects that a file it listed is
gone. Comparing the folders before and after the query detects the rest.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.merged import ASK_AGAIN

if TYPE_CHECKING:
    from moewh.warehouse.remote.published import Readable

T = TypeVar("T")
_TIMES = 50
_PAUSE = 0.1
"""Seconds."""
_HELD = 1 << 20
"""Characters."""


class HeldBack:
    """A text stream that holds its text until `release`, so that it can still be dropped.

    Once the text exceeds a limit, it is passed on, and so is everything after it.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._held: list[str] = []
        self._size = 0
        self.passed_on = False
        """True once some text was passed on and can no longer be dropped."""

    def write(self, text: str) -> int:
        """Hold a text, or pass it on with all held text before it."""
        self._held.append(text)
        self._size += len(text)
        if self.passed_on or self._size > _HELD:
            self.release()
        return len(text)

    def flush(self) -> None:
        """Do nothing: `release` flushes."""

    def forget(self) -> None:
        """Drop the held text."""
        self._held, self._size = [], 0

    def release(self) -> None:
        """Pass on the held text."""
        self.passed_on = True
        self._stream.write("".join(self._held))
        self._stream.flush()
        self.forget()

    def __getattr__(self, name: str) -> Any:
        """Return any other attribute of the stream."""
        return getattr(self._stream, name)


def until_settled(warehouse: Readable, work: Callable[[], T], printed: HeldBack | None = None) -> T:
    """Do work that reads a warehouse; repeat it if a run was sealed, unsealed, begun or deleted meanwhile.

    For a published warehouse, repeat it if a run was published again with other files, or withdrawn.

    The printed text is released at the end. Raises what the work raises if there was no such change, and MoewhError if
    changes keep happening or if printed text can no longer be dropped.
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
    """Return whether everything that was read belongs to one state of the warehouse.

    The views of a published warehouse list its files, so added files change nothing; the listed files must still exist
    unchanged.
    """
    if isinstance(warehouse, Layout):
        return _state(warehouse) == before
    return warehouse.bound is None or warehouse.read_again().files.items() >= warehouse.bound.files.items()


def _state(warehouse: Readable) -> list[tuple[str, int, int]]:
    """Return values that change when a run is begun, sealed, unsealed or deleted; none for a published warehouse."""
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
