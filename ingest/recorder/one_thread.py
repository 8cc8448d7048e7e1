"""One thread at a time runs a recorded model: passes of two threads at once could not be told apart."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moewh.warehouse.errors import MoewhError

_LOOK_AGAIN = 0.1
"""Seconds after which a waiting thread looks whether the other one has died."""


class OneThread:
    """The thread that runs a model, from the start to the end of a pass, or of a call of `generate` with its passes."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._running: threading.Thread | None = None
        self._depth = 0
        """Calls in progress: a pass is one within `generate`."""

    def enter(self) -> None:
        """Begin a call. Raises MoewhError while another thread is in one."""
        with self._changed:
            if self._is_another():
                raise MoewhError(
                    "two threads run the model at once, and moewh cannot tell their passes apart. Let one finish first."
                )
            self._depth = self._depth + 1 if self._running is threading.current_thread() else 1
            self._running = threading.current_thread()

    def leave(self) -> None:
        """End a call that `enter` began; without effect in a thread that is in none."""
        with self._changed:
            if self._running is not threading.current_thread():
                return
            self._depth -= 1
            if self._depth == 0:
                self._running = None
                self._changed.notify_all()

    @contextmanager
    def call(self) -> Iterator[None]:
        """Run a call of `generate`. Raises as `enter` does."""
        self.enter()
        depth = self._depth
        try:
            yield
        finally:
            with self._changed:
                if self._running is threading.current_thread():
                    self._depth = depth  # a pass that was interrupted did not leave
            self.leave()

    def wait_for_others(self) -> None:
        """Wait until no other thread is in a call."""
        with self._changed:
            while self._is_another():
                self._changed.wait(_LOOK_AGAIN)

    def _is_another(self) -> bool:
        running = self._running
        return running is not None and running is not threading.current_thread() and running.is_alive()
