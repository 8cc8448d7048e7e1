"""Progress of `moewh ingest` on stderr: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from moewh.ingest.record import Identity


class Reporter:
    """Shows one run's progress; a context manager.

    With several processes, the first draws the bar, and each logs its own lines.
    """

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self._console = Console(stderr=True)
        self._name = "moewh" if world == 1 else f"moewh[{rank}]"
        self._draws = self._console.is_terminal and rank == 0
        self._logs = not self._console.is_terminal or world > 1
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("segments · {task.fields[speed]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._draws,
        )
        self._task = self._bar.add_task("loading the model", total=None, speed="")
        self._loading = True
        self._tokens = 0
        self._began = time.monotonic()

    def __enter__(self) -> Reporter:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._loading:
            self._bar.remove_task(self._task)  # nothing to do, or refused
        self._bar.stop()

    def started(self, identity: Identity, segments: int) -> None:
        """Show how much there is to do."""
        self._began = time.monotonic()
        self._loading = False
        self._bar.update(self._task, description=identity.run_id, total=segments)
        self._line(f"run {identity.run_id}: {segments} segment{'s'[: segments != 1]} to write")

    def batch_done(self, tokens: int) -> None:
        """Count a batch's tokens."""
        self._tokens += tokens
        self._bar.update(self._task, speed=self._speed())

    def segment_done(self, number: int, planned: int) -> None:
        """Count a committed segment."""
        self._bar.advance(self._task)
        self._line(f"segment {number + 1} of {planned} committed; {self._speed()}")

    def note(self, message: str) -> None:
        """Print information about what is about to happen."""
        self._console.print(f"{self._name}: {message}", highlight=False, markup=False, soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning, without stopping."""
        self.note(f"warning: {message}")

    def _speed(self) -> str:
        seconds = max(time.monotonic() - self._began, 1e-9)
        return f"{self._tokens:,} tokens, {self._tokens / seconds:,.0f} tokens/s"

    def _line(self, message: str) -> None:
        if self._logs:
            self.note(message)
