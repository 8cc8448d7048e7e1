"""Merging for sealing: the counts of many segments, added up by key, in key order.

In: the folders of a run's segments. Out: one Parquet file per table of counts, one with the rows of `segments`, and the
totals of the merged counts (`moewh.warehouse.sealing.totals`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from itertools import pairwise, takewhile
from pathlib import Path
from threading import Event
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.errors import MoewhError
from moewh.warehouse.files import schema
from moewh.warehouse.files.names import SEGMENT_FOLDER, glob_literal
from moewh.warehouse.files.schema import split_columns
from moewh.warehouse.files.tables import read_rows, write_chunks
from moewh.warehouse.sealing.affinity import fits, merged_affinity
from moewh.warehouse.sealing.totals import write_totals

_BATCH = 1 << 17


def write_sealed(run: Path, segments: list[Path], folder: Path) -> None:
    """Write every table of a sealed run to `folder`, from its own folder and those of its segments, given in order.

    Raises MoewhError for a segment without its counts.
    """
    _write_merged(segments, folder)
    write_totals(folder, run / schema.LAYERS.file)


def _write_merged(segments: list[Path], folder: Path) -> None:
    """Write the merged tables of segments; opt-in counts only if the segments have them."""
    present = (table for table in schema.MERGED if _is_counted(table, segments))
    files = {table: [segment / table.file for segment in segments] for table in present}
    for file in (file for of_table in files.values() for file in of_table):
        if not file.is_file():
            raise MoewhError(f"segment {file.parent} lacks {file.name}. See `moewh verify`.")
    if len(segments) == 1:
        for table, (file,) in files.items():
            _take_over(table, file, folder / table.file)
        return
    spill = folder.with_name(f"duckdb.{os.getpid()}")
    with duckdb.connect(config={"temp_directory": str(spill)}) as connection:
        _write_in_parallel(connection, files, folder)


def _write_in_parallel(
    connection: duckdb.DuckDBPyConnection, files: dict[schema.Table, list[Path]], folder: Path
) -> None:
    """Merge the tables in as many threads as the process may use; when one fails or is interrupted, the others stop."""
    cursors = {table: connection.cursor() for table in files}
    stopped = Event()

    def write(table: schema.Table) -> None:
        dense = table is schema.AFFINITY_COUNTS and fits(files[table])
        rows = merged_affinity(files[table]) if dense else _merged(cursors[table], table, files[table])
        write_chunks(folder / table.file, schema.sealed(table), takewhile(lambda _: not stopped.is_set(), rows))

    largest_first = sorted(files, key=lambda table: -sum(file.stat().st_size for file in files[table]))
    with ThreadPoolExecutor(min(len(files), usable_cpus())) as threads:
        try:
            written = [threads.submit(write, table) for table in largest_first]
            for ended in wait(written, return_when=FIRST_EXCEPTION).done:
                ended.result()
        except BaseException:
            stopped.set()
            for cursor in cursors.values():
                cursor.interrupt()
            threads.shutdown(cancel_futures=True)
            raise


def _is_counted(table: schema.Table, segments: list[Path]) -> bool:
    """Return whether segments have the counts of a table: opt-in counts require the rows that they count."""
    return table.counted is None or any((segment / table.counted).is_file() for segment in segments)


def _take_over(table: schema.Table, file: Path, target: Path) -> None:
    """Write the counts of a run's only segment: its file is in key order, and there is nothing to add up."""
    wanted = schema.sealed(table).arrow()
    if pq.read_schema(file).equals(wanted):
        shutil.copyfile(file, target)
        return
    rows = read_rows(file)
    if table is schema.SEGMENTS:
        number = int(file.parent.name.removeprefix(SEGMENT_FOLDER))
        rows = rows.add_column(0, "segment", pa.array([number] * len(rows), pa.int32()))
    write_chunks(target, schema.sealed(table), [rows.select(wanted.names).cast(wanted)])


def _merged(connection: duckdb.DuckDBPyConnection, table: schema.Table, files: list[Path]) -> Iterator[pa.Table]:
    """Yield a table's rows over all its files, summed by key, in key order and grouped by kind."""
    given = {"files": [glob_literal(file) for file in files]}
    read = "read_parquet($files, hive_partitioning = false, filename = true)"
    if table is schema.SEGMENTS:
        number = f"regexp_extract(filename, '/{SEGMENT_FOLDER}([0-9]+)/[^/]*$', 1)::integer"
        columns = ", ".join(column.name for column in table.stored)
        yield from _batches(connection, table, f"select {number} as segment, {columns} from {read} order by 1", given)
        return
    keys, counts = split_columns(table)
    sums = ", ".join(f"{_merge(column)} as {column.name}" for column in table.columns if column.name in counts)
    listed = ", ".join(keys)
    sql = f"select {listed}, {sums} from {read} group by {listed} order by {listed}"
    for batch in _batches(connection, table, sql, given):
        yield from _of_one_kind(batch) if "kind" in keys else (batch,)


def _of_one_kind(rows: pa.Table) -> Iterator[pa.Table]:
    """Split rows that are sorted by kind where the kind changes."""
    ends = pc.run_end_encode(rows["kind"].combine_chunks()).run_ends.to_pylist()
    for start, end in pairwise([0, *ends]):
        yield rows.slice(start, end - start)


def _merge(column: schema.Column) -> str:
    """Return SQL that merges a column; doubles add in segment order, which gives the same sum on every machine."""
    order = " order by len(filename), filename" if column.type == "DOUBLE" else ""
    return f"{schema.merge_function(column)}({column.name}{order})::{column.type}"


def _batches(
    connection: duckdb.DuckDBPyConnection, table: schema.Table, sql: str, values: dict[str, Any]
) -> Iterator[pa.Table]:
    wanted = schema.sealed(table).arrow()
    for batch in connection.sql(sql, params=values).to_arrow_reader(_BATCH):
        yield pa.Table.from_batches([batch]).select(wanted.names).cast(wanted)
