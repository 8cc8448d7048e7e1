"""Ad-hoc queries on `routes`, compared with DuckDB and polars over one hand-made wide table of the same rows.

The wide table is what one would write without a warehouse: one Parquet file in the order of `routing`, with the token's
text, kind, position, prompt and domain as columns, compressed with zstd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import duckdb
import polars as pl

from benchmarks.simulated import ROWS_PER_TOKEN
from benchmarks.timing import interleaved, row, rule, shown
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.sql import sql_string

QUESTIONS: dict[str, tuple[str, Callable[[pl.LazyFrame], pl.LazyFrame]]] = {
    "five rows": ("from {table} limit 5", lambda wide: wide.head(5)),
    "one prompt": (
        "select layer, position, token, rank, expert, weight from {table} where prompt_id = 17 and layer < 4",
        lambda wide: wide.filter((pl.col("prompt_id") == 17) & (pl.col("layer") < 4)).select(
            "layer", "position", "token", "rank", "expert", "weight"
        ),
    ),
    "one expert's strongest tokens": (
        "select token, position, weight from {table} where layer = 7 and expert = 3 order by weight desc limit 20",
        lambda wide: (
            wide.filter((pl.col("layer") == 7) & (pl.col("expert") == 3))
            .select("token", "position", "weight")
            .top_k(20, by="weight")
        ),
    ),
    "a domain's experts": (
        "select layer, expert, count(*) as n from {table} where domain = 'domain 1' group by all",
        lambda wide: wide.filter(pl.col("domain") == "domain 1").group_by("layer", "expert").len(),
    ),
    "count by domain": (
        "select domain, count(*) as n from {table} group by all",
        lambda wide: wide.group_by("domain").len(),
    ),
    "load by position at a layer": (
        "select position // 50 as stretch, expert, count(*) as n from {table} where layer = 7 group by all",
        lambda wide: (
            wide.filter(pl.col("layer") == 7)
            .group_by((pl.col("position") // 50).alias("stretch"), "expert")
            .agg(pl.len())
        ),
    ),
}
"""Question → its SQL, over `routes` or the wide table, and the same in polars."""


def write_wide(layout: Layout, path: Path) -> None:
    """Write the wide table of a warehouse's rows, unless it exists."""
    if path.is_file():
        return
    columns = "token_id, layer, rank, expert, weight, token, kind, position, prompt_id, domain"
    with open_warehouse(layout) as connection:
        connection.execute("set preserve_insertion_order = true")
        connection.execute(
            f"copy (select {columns} from routes order by layer, token_id, rank) "
            f"to {sql_string(str(path))} (format parquet, compression zstd)"
        )


def beside_wide(layout: Layout, folder: Path, tokens: int, times: int) -> Iterator[str]:
    """Yield the table of questions, each run on the three in turn, `times` times."""
    path = folder / "wide.parquet"
    write_wide(layout, path)
    rows = tokens * ROWS_PER_TOKEN
    routing = sum(file.stat().st_size for file in layout.root.glob("segments/run_id=*/segment=*/routing.parquet"))
    yield from ("", f"## Ad-hoc queries on `routes`, {rows / 1e6:.0f} M rows in one segment", "")
    yield f"Compared with one wide Parquet table of the same rows ({path.stat().st_size * 8 / rows:.1f} bits per row;"
    yield f"`routing.parquet`: {routing * 8 / rows:.1f}). Median seconds (least core-seconds), in turn, {times} x."
    yield ""
    yield row("question", "`routes`", "DuckDB, wide", "polars, wide", "`routes` / DuckDB", "cores")
    yield rule(6)
    with open_warehouse(layout) as connection, duckdb.connect() as plain:
        plain.execute(f"create view wide as from read_parquet({sql_string(str(path))})")
        for name, (sql, lazy) in QUESTIONS.items():
            taken = interleaved(
                {
                    "routes": lambda sql=sql: connection.sql(sql.format(table="routes")).to_arrow_table(),  # type: ignore[misc]
                    "wide": lambda sql=sql: plain.sql(sql.format(table="wide")).to_arrow_table(),  # type: ignore[misc]
                    "polars": lambda lazy=lazy: lazy(pl.scan_parquet(path)).collect(engine="streaming"),  # type: ignore[misc]
                },
                times,
            )
            ours, wide = taken["routes"], taken["wide"]
            ratios = (f"{ours.wall / wide.wall:.2f} x", f"{ours.cores / wide.cores:.2f} x")
            yield row(name, *map(shown, taken.values()), *ratios)
