"""Stopping: Ctrl-C, SIGTERM and a closed terminal (SIGHUP) raise one exception, so that everything is cleaned up."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from moewh.warehouse.errors import MoewhError

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_caught: list[list[int]] = []
"""The signals received within each open `stoppable`, outermost first."""


def stop_requested() -> bool:
    """Return whether a signal was received, even at a moment when no exception could be raised for it."""
    return any(_caught)


class StoppedError(MoewhError):
    """A signal stopped the work. The exit code is 128 + its number, as in a shell: 130 for Ctrl-C, 143 for SIGTERM."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


@contextmanager
def stoppable(advice: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Raise StoppedError with the text of `advice` if a signal arrives in the block, after all cleanup has run.

    Yields a function to call now and then: it raises if a signal arrived when Python could not raise
    (in a destructor, in a library that swallowed the exception). Does nothing outside the main thread, where Python
    receives no signals, and for signals that the parent process set to be ignored.
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
