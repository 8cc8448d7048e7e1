"""Where the work alongside the forward passes is done: in separate threads, or in between the passes.

A few threads keep a GPU busy: one tokenises the next segment, one waits for copies from the device and stores their
rows, and some write, each its own segment (with a few more that rank and count for it).
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    import torch


def in_background(device: torch.device) -> bool:
    """Return whether threads alongside the forward passes help.

    On a CPU the passes use every core already. A third thread makes torch's threads wait for each other at every
    operation, which cost 17% on two cores, where doing the same work in between cost a few percent.
    """
    return device.type != "cpu"


Result = TypeVar("Result")

WRITERS = 3
"""Segments that may be written at once in the background: encoding a segment's rows keeps one core busy for longer than
a fast GPU takes to run its tokens."""


class InBetween(Executor):
    """Runs each task immediately, in the caller's thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Seconds that the tasks took."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run the work and return its result or exception as a finished future."""
        done: Future[Any] = Future()
        began = time.monotonic()
        try:
            done.set_result(work(*args, **kwargs))
        except Exception as error:
            done.set_exception(error)
        self.seconds += time.monotonic() - began
        return done


@contextmanager
def start_workers(background: bool) -> Iterator[tuple[Executor, Executor, Executor]]:
    """Yield a worker each for tokenising, collecting and writing; on an error, pending work is dropped."""
    threads = {"tokenise": 1, "collect": 1, "write": WRITERS}
    workers = tuple(
        ThreadPoolExecutor(count, f"moewh-{name}") if background else InBetween() for name, count in threads.items()
    )
    try:
        yield workers[0], workers[1], workers[2]
    finally:
        for worker in workers:
            worker.shutdown(cancel_futures=True)


def take_done(working: deque[Future[Result]], in_flight: int) -> list[Result]:
    """Remove the futures in front that are done, waiting until at most `in_flight` are left; return their results.

    Raises the error of the first future that failed. That future stays in front, so every later call raises it too:
    nothing may follow a missing result, even if the caller's own code continued after the first error.
    """
    results = []
    while working and (len(working) > in_flight or working[0].done()):
        results.append(working[0].result())
        working.popleft()
    return results
