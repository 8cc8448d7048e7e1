"""Stopping: Ctrl-C and SIGTERM become one exception, so that everything is cleaned up on the way out."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from moewh.warehouse.errors import MoewhError

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_caught: list[list[int]] = []
"""The signals that came within each `stoppable` that is open, the outermost first."""


def told_to_stop() -> bool:
    """Tell whether a signal came, even at a moment when no exception could be raised for it."""
    return any(_caught)


class StoppedError(MoewhError):
    """A signal asked to stop. Exit code 128 + its number, as a shell gives it: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def stoppable(advice: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Raise StoppedError with what `advice` says if a signal comes within; whatever cleans up does so first.

    Yields a function to call now and then: it raises if a signal came at a moment when Python could not
    (in a destructor, in a library that swallowed it). Outside the main thread, where Python gets no signals,
    nothing is changed; nor for a signal that whoever started the process wants ignored.
    """
    caught: list[int] = []
    _caught.append(caught)

    def stop(number: int, _frame: FrameType | None) -> None:
        caught.append(number)
        raise KeyboardInterrupt

    def check() -> None:
        if caught:
            raise KeyboardInterrupt

    main = threading.current_thread() is threading.main_thread()
    handled = [number for number in _SIGNALS if main and signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in handled}
    try:
        yield check
    except BaseException as error:
        if caught:
            raise StoppedError(advice(), caught[0]) from error
        raise
    finally:
        _caught.pop()
        for number, handler in before.items():
            signal.signal(number, handler)
