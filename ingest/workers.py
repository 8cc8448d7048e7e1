"""Where the work beside the forward passes is done: in threads of its own, or in between them.

Three threads keep a GPU busy: one tokenises the next segment, one waits for copies from the device and puts rows
in their place, one writes (a few more rank and count for it).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def in_background(device: torch.device) -> bool:
    """Tell whether threads beside the forward passes are of use.

    On a CPU these have every core already. A third thread makes torch's wait for each other at every operation, which
    cost 17 % on two cores where doing the same work in between cost a few.
    """
    return device.type != "cpu"


class InBetween(Executor):
    """Does what it is given at once, in the caller's thread."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """What that took."""

    def submit(self, work: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Return what the work gave or raised, as a future that is done."""
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
    """Yield a worker each for tokenising, collecting and writing; on an error what has not begun is dropped."""
    names = ("tokenise", "collect", "write")
    workers = tuple(ThreadPoolExecutor(1, f"moewh-{name}") if background else InBetween() for name in names)
    try:
        yield workers[0], workers[1], workers[2]
    finally:
        for worker in workers:
            worker.shutdown(cancel_futures=True)
