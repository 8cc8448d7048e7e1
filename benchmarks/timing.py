"""Timing helpers: cold and warm, whole processes and open connections; and a description of the machine."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from moewh.warehouse.answer.shell import find_duckdb
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse

_SLOW = 4.0
"""Work that takes longer than this, in seconds, is timed once."""


@dataclass(frozen=True)
class Spent:
    """Wall seconds, and seconds summed over all cores."""

    wall: float
    cores: float


def spent(work: Callable[[], object]) -> Spent:
    """Time work once."""
    wall, cores = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cores)


def best(work: Callable[[], object], times: int) -> Spent:
    """Time work several times; return the minimum of each measure, which other programs disturb least."""
    runs = [spent(work) for _ in range(times)]
    return Spent(min(run.wall for run in runs), min(run.cores for run in runs))


def interleaved(works: Mapping[str, Callable[[], object]], times: int) -> dict[str, Spent]:
    """Time several kinds of work in turn, repeatedly, so that other load on the machine affects all alike.

    Returns the median seconds of each and its least core-seconds, which other programs disturb least. Each is first run
    once untimed.
    """
    for work in works.values():
        work()
    rounds = [{name: spent(work) for name, work in works.items()} for _ in range(times)]
    return {
        name: Spent(median(done[name].wall for done in rounds), min(done[name].cores for done in rounds))
        for name in works
    }


def timed(work: Callable[[], object], times: int) -> Spent:
    """Return the median seconds and least core-seconds of repeated work, warm; slow work is timed once."""
    first = spent(work)
    return first if first.wall > _SLOW else interleaved({"": work}, times)[""]


def shown(taken: Spent) -> str:
    """Return seconds, with core-seconds in brackets, as a table cell."""
    return f"{taken.wall:.3f} ({taken.cores:.3f})"


def row(*cells: str) -> str:
    """Return a row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def rule(columns: int) -> str:
    """Return the line below a table's header."""
    return f"|---|{'---:|' * (columns - 1)}"


def in_connection(layout: Layout, sql: str, times: int = 7) -> Spent:
    """Return the best time of a query in an open connection, warm, with its result fetched as Arrow."""
    with open_warehouse(layout) as connection:
        return best(lambda: connection.sql(sql).to_arrow_table(), times)


def moewh_process(layout: Layout, *arguments: str, cold: bool = False, times: int = 3) -> float:
    """Return the median wall time of a whole `moewh query` or `moewh runs`, with its result in a Parquet file."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "answer.parquet"
        command = [sys.executable, "-c", "from moewh.cli.main import main; main()", *arguments]
        command += ["--warehouse", str(layout.root), "-o", str(output)]
        return _processes(layout, command, cold, times)


def shell_process(layout: Layout, sql: str, *, cold: bool = False, times: int = 3) -> float:
    """Return the median wall time of the plain DuckDB program on the published file, with the rows discarded."""
    command = [find_duckdb(), "-readonly", str(layout.database), "-c", f"create temp table answer as {sql}"]
    return _processes(layout, command, cold, times)


def _processes(layout: Layout, command: list[str], cold: bool, times: int) -> float:
    taken = []
    for _ in range(times):
        if cold:
            forget(layout)
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        taken.append(time.perf_counter() - began)
    return median(taken)


def forget(layout: Layout) -> None:
    """Ask the kernel to drop a warehouse's files from its cache, so that the next read comes from disk."""
    for path in {path.stat().st_ino: path for path in layout.root.glob("*/*/*/*.parquet")}.values():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def machine() -> str:
    """Return the machine and the installed versions, in one line."""
    memory = math.ceil(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    names = [name for name in ("duckdb", "pyarrow", "numpy", "polars") if find_spec(name)]
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{os.cpu_count()} cores, {memory} GiB; Python {platform.python_version()}, {packages}"


def file_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of each Parquet file in a folder."""
    return {path.stem: path.stat().st_size for path in sorted(folder.glob("*.parquet"))}


def column_bytes(path: Path) -> dict[str, int]:
    """Return the compressed bytes of each column of a Parquet file."""
    metadata = pq.read_metadata(path)
    sizes: dict[str, int] = {}
    for group in range(metadata.num_row_groups):
        for number in range(metadata.num_columns):
            column = metadata.row_group(group).column(number)
            sizes[column.path_in_schema] = sizes.get(column.path_in_schema, 0) + column.total_compressed_size
    return sizes
