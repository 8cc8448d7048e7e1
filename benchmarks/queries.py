"""Query time as segments and runs grow, compared with hand-written alternatives, and the cost of rollups.

    python -m benchmarks.queries [--large] [--folder DIR] [--results FILE]

The default builds small warehouses and takes about two minutes. `--large` builds 40 segments of 250 k tokens, and
repeats them with hard links up to 500 M tokens and 200 runs: it needs 8 GB in DIR and most of an hour. Existing
warehouses are reused.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import alternatives
from benchmarks.adhoc import beside_wide
from benchmarks.costs import costs
from benchmarks.growth import LARGE, MATRICES, SMALL, TOP_TOKENS, Scale, Warehouses, by_runs, by_segments, warehouses
from benchmarks.simulated import LAYERS, ROWS_PER_TOKEN, RUN, SEGMENT_TOKENS, build
from benchmarks.timing import (
    best,
    column_bytes,
    file_bytes,
    in_connection,
    machine,
    moewh_process,
    row,
    rule,
    shell_process,
    spent,
    timed,
)
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.rollups import definition
from moewh.warehouse.views.opening import open_warehouse
from moewh.warehouse.views.publishing import publish

STRONGEST = """select token_id, weight from routing
where run_id = 'olmoe' and layer = 7 and expert = 3 order by weight desc, token_id limit 20"""


@dataclass(frozen=True)
class Bench:
    """The inputs shared by the parts of the report."""

    made: Warehouses
    scale: Scale
    folder: Path
    domains: int
    token_share: float

    @property
    def one_title(self) -> str:
        """The tokens of one segment, such as 250 k."""
        return f"{self.scale.segment_tokens / 1e3:g} k"

    @property
    def base_tokens(self) -> int:
        """The tokens of all distinct segments."""
        return self.scale.distinct * self.scale.segment_tokens

    @property
    def base_title(self) -> str:
        """The tokens of all distinct segments as text, such as 10 M."""
        return f"{self.base_tokens / 1e6:g} M"


def main() -> None:
    """Build the warehouses, measure, and print the tables."""
    parts: dict[str, Callable[[Bench], Iterator[str]]] = {
        "segments": lambda bench: by_segments(bench.made, bench.folder, bench.scale),
        "runs": lambda bench: by_runs(bench.made, bench.folder, bench.scale),
        "adhoc": lambda bench: beside_wide(bench.made.one, bench.folder, bench.scale.segment_tokens, bench.scale.times),
        "processes": _processes,
        "affinity": _affinity,
        "subsets": _subsets,
        "naive": _naive,
        "disk": _disk,
        "cost": _cost,
    }
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="up to 500 M tokens in 2,000 segments, and 200 runs")
    parser.add_argument("--domains", type=int, default=4, help="domains alternating in every segment (default: 4)")
    parser.add_argument("--token-share", type=float, default=0.5, help="see benchmarks.simulated (default: 0.5)")
    parser.add_argument("--parts", default=",".join(parts), help="parts of the report (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where to build (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="also write the tables to this file")
    options = parser.parse_args()
    scale = LARGE if options.large else SMALL
    with tempfile.TemporaryDirectory(prefix="moewh-bench-") as scratch:
        folder = options.folder or Path(scratch)
        made = warehouses(folder, scale, options.domains, options.token_share)
        bench = Bench(made, scale, folder, options.domains, options.token_share)
        report = []
        for part in (_header, *(parts[name] for name in options.parts.split(","))):
            for line in part(bench):
                print(line, flush=True)
                report.append(line)
    if options.results is not None:
        options.results.write_text("\n".join(report) + "\n")


def _header(bench: Bench) -> Iterator[str]:
    yield "# Queries and rollups"
    yield ""
    flags = " --large" if bench.scale is LARGE else ""
    yield f"`python -m benchmarks.queries{flags}`: {machine()}."
    yield ""
    yield "Simulated routing of OLMoE's shape: 16 layers, 64 experts, top-8, a vocabulary of 50,000 with Zipf's"
    yield f"frequencies, prompts of 500 tokens; domains mixed in every segment: {bench.domains}; segments of"
    yield f"{bench.one_title} tokens."
    if bench.made.sealing is not None:
        cost = bench.made.sealing.cores / bench.base_tokens * 1e6
        yield ""
        yield f"Sealing {bench.scale.distinct} segments: {cost:.2f} core-microseconds per token."


def _processes(bench: Bench) -> Iterator[str]:
    layout = bench.made.base_sealed
    publish(layout)
    yield from ("", f"## Whole processes at {bench.base_title} tokens, sealed", "")
    yield from ("Median of 3, including start-up. Cold: the files were first dropped from the page cache.", "")
    yield row("view", "moewh", "moewh cold", "duckdb shell")
    yield rule(4)
    for view in MATRICES:
        cells = [moewh_process(layout, "query", view), moewh_process(layout, "query", view, cold=True)]
        cells.append(shell_process(layout, f"from {view}"))
        yield row(f"`{view}`", *(f"{seconds:.2f}" for seconds in cells))


def _affinity(bench: Bench) -> Iterator[str]:
    layout = bench.made.base_sealed
    yield from ("", f"## Tokens of an expert, at {bench.base_title} tokens, sealed", "")
    yield row("question", "seconds", "core-seconds")
    yield rule(3)
    with open_warehouse(layout) as connection:
        for name, sql in {
            "`expert_token_affinity`, one expert, top 20": TOP_TOKENS,
            "strongest tokens of one expert, over rows": STRONGEST,
            "`count(*)` over all of `expert_token_affinity`": "select count(*) from expert_token_affinity",
        }.items():
            taken = timed(lambda sql=sql: connection.sql(sql).to_arrow_table(), 5)  # type: ignore[misc]
            yield row(name, f"{taken.wall:.3f}", f"{taken.cores:.3f}")


def _subsets(bench: Bench) -> Iterator[str]:
    """Yield the table for half of the prompts of the smallest warehouse, which no rollup can answer."""
    layout, tokens = bench.made.one, bench.scale.segment_tokens
    prompts = list(range(0, tokens // 500, 2))
    rows = len(prompts) * 499 * ROWS_PER_TOKEN
    yield from ("", f"## Half of the prompts of {bench.one_title} tokens, over rows ({rows / 1e6:.0f} M rows)", "")
    yield row("", "`co_routing_where`", "`transitions_where`")
    yield rule(3)
    where = alternatives.in_prompts(prompts)
    moewh = [_saved(layout, name, prompts) for name in ("co_routing_where", "transitions_where")]
    naive = [
        in_connection(layout, sql.format(where=where), times=2).wall
        for sql in (alternatives.PAIRS, alternatives.TRANSITIONS)
    ]
    polars = [
        best(lambda: alternatives.polars_pairs(layout, prompts, transitions), 2).wall  # noqa: B023
        for transitions in (False, True)
    ]
    yield row("moewh", *(f"{seconds:.2f}" for seconds in moewh))
    for name, taken in (("self-join in DuckDB", naive), ("self-join in polars", polars)):
        factors = (f"{other:.2f} ({other / ours:.1f} x)" for other, ours in zip(taken, moewh, strict=True))
        yield row(name, *factors)


def _saved(layout: Layout, name: str, prompts: list[int]) -> float:
    from moewh.warehouse.answer.query import find_query, prepare

    with open_warehouse(layout) as connection:
        answer = prepare(connection, find_query(name), {"prompt_ids": ",".join(map(str, prompts))}, unsafe=True)
        assert answer is not None
        return best(lambda: answer.relation().to_arrow_table(), 2).wall


def _naive(bench: Bench) -> Iterator[str]:
    """Yield the table for the self-join over all rows, which is slow: measured on two of 16 layers, times eight."""
    yield from ("", f"## Without rollups, at {bench.one_title} tokens", "")
    layers, share, layout = (3, 11), LAYERS / 2, bench.made.one
    ours = in_connection(bench.made.one_sealed, "from co_routing").wall
    where = f"where a.layer in {layers}"
    join = in_connection(layout, alternatives.PAIRS.format(where=where), times=1).wall * share
    polars = spent(lambda: alternatives.polars_pairs(layout, None)).wall
    ids_TK = alternatives.load_experts(layout, 3)
    one_hot = best(lambda: alternatives.one_hot_pairs(ids_TK), 3).wall * LAYERS
    yield row("co-routing of every layer", "seconds", "relative to `co_routing`")
    yield rule(3)
    yield row("`co_routing`, sealed", f"{ours:.3f}", "1")
    yield row("self-join in DuckDB (two layers measured)", f"{join:.0f}", f"{join / ours:,.0f} x")
    yield row("self-join in polars", f"{polars:.0f}", f"{polars / ours:,.0f} x")
    limit = "one-hot products in numpy, rows already in memory: the limit"
    yield row(limit, f"{one_hot:.1f}", f"{one_hot / ours:,.0f} x")


def _disk(bench: Bench) -> Iterator[str]:
    layout = bench.made.base_sealed
    folder = layout.segment(RUN, 0)
    held = file_bytes(folder)
    rows = pq.read_metadata(folder / schema.ROUTING.file).num_rows
    whole = sum(held.values())
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.parquet"
        pq.write_table(pq.read_table(folder / schema.ROUTING.file, partitioning=None), plain)
        default = plain.stat().st_size
    yield from ("", f"## On disk: a segment of {rows / ROWS_PER_TOKEN:,.0f} tokens, {rows:,} rows", "")
    yield row("", "bits per row", "relative to `routing.parquet`")
    yield rule(3)
    ours, rollups = held["routing"], [table for table in schema.ROLLUPS if table.name in held]
    for name, size_bytes in (
        ("`routing.parquet`, all columns", ours),
        ("the same rows, pyarrow's default Parquet", default),
        ("int32 expert ids alone", rows * 4),
        ("all router logits in bf16", rows // 8 * 64 * 2),
        ("all rollups together", sum(held[table.name] for table in rollups)),
    ):
        yield row(name, f"{size_bytes * 8 / rows:.2f}", f"{size_bytes / ours:.2f} x")
    columns = column_bytes(folder / schema.ROUTING.file)
    bits = ", ".join(f"`{name}` {size_bytes * 8 / rows:.2f}" for name, size_bytes in columns.items())
    yield from ("", f"Bits per row by column: {bits}.", "")
    for table in rollups:
        yield f"- `{table.name}`: {held[table.name] / whole:.2%} of the segment"
    yield f"- rollups together: {sum(held[table.name] for table in rollups) / whole:.1%} of the segment"
    run = sum(sum(file_bytes(segment).values()) for segment in layout.segments(RUN).iterdir())
    sealed = sum(file_bytes(layout.sealed(RUN)).values())
    yield f"- the sealed set of {bench.base_title} tokens: {sealed / (run + sealed):.1%} of the run with it"


def _cost(bench: Bench) -> Iterator[str]:
    """Yield the table of core-microseconds per token, including the rollups in SQL."""
    yield from ("", "## The cost of a token in writing a segment", "")
    yield row("core-microseconds per token", "")
    yield rule(2)
    for name, cost in costs(
        SEGMENT_TOKENS if bench.scale is LARGE else 25_000, bench.domains, bench.token_share
    ).items():
        yield row(name, f"{cost:.1f}")
    yield row("rollups by their SQL in DuckDB", f"{_sql_cost(bench) * 1e6:.0f}")


def _sql_cost(bench: Bench) -> float:
    tokens = 50_000 if bench.scale is LARGE else 12_500
    with tempfile.TemporaryDirectory() as scratch:
        layout = build(
            Path(scratch), tokens, domains=bench.domains, token_share=bench.token_share, progress=lambda _: None
        )
        with open_warehouse(layout) as connection:
            cores = time.process_time()
            for table in schema.ROLLUPS:
                connection.execute(f"create temp table x_{table.name} as {definition(table)}")
            return (time.process_time() - cores) / tokens


if __name__ == "__main__":
    main()
