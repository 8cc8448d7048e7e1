"""How long the canned views take as tokens grow, beside what one would write without rollups; and what rollups cost.

    python -m benchmarks.queries [--large] [--folder DIR] [--results FILE]

The default builds two small warehouses and takes about two minutes. `--large` builds 250 k, 2.5 M and 10 M tokens,
and 250 M by hard links: it needs 5 GB in DIR and most of an hour, and what is there already is used again.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import alternatives
from benchmarks.costs import costs
from benchmarks.simulated import (
    LAYERS,
    ROWS_PER_TOKEN,
    RUN,
    SEGMENT_TOKENS,
    build,
    repeat,
)
from benchmarks.timing import (
    best,
    column_bytes,
    file_bytes,
    in_connection,
    machine,
    moewh_process,
    shell_process,
    spent,
)
from moewh.warehouse.files import schema
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.trust.rollups import definition
from moewh.warehouse.views.base import open_warehouse
from moewh.warehouse.views.publishing import publish

MATRICES = ("co_routing", "layer_transitions", "expert_load", "load_balance", "domain_specialization")
TOP_TOKENS = """select vocab_id, token, tokens, lift from expert_token_affinity
where run_id = 'olmoe' and layer = 7 and expert = 3 and tokens >= 10 order by lift desc, vocab_id limit 20"""
STRONGEST = """select token_id, weight from routing
where run_id = 'olmoe' and layer = 7 and expert = 3 order by weight desc, token_id limit 20"""


@dataclass(frozen=True)
class Size:
    """One warehouse to measure."""

    tokens: int
    segments: int
    layout: Layout

    @property
    def title(self) -> str:
        """Such as 2.5 M."""
        return f"{self.tokens / 1e6:g} M" if self.tokens >= 1_000_000 else f"{self.tokens / 1e3:g} k"


def main() -> None:
    """Build the warehouses, measure, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", action="store_true", help="250 k, 2.5 M, 10 M and 250 M tokens")
    parser.add_argument("--domains", type=int, default=1, help="domains that take turns in every segment (default: 1)")
    parser.add_argument("--token-share", type=float, default=0.5, help="see benchmarks.simulated (default: 0.5)")
    parser.add_argument("--folder", type=Path, help="where to build (default: a temporary folder)")
    parser.add_argument("--results", type=Path, help="write the tables to this file too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="moewh-bench-") as scratch:
        report = list(measure(options.folder or Path(scratch), options))
    text = "\n".join(report) + "\n"
    if options.results is not None:
        options.results.write_text(text)


def measure(folder: Path, options: argparse.Namespace) -> Iterator[str]:
    """Yield the report line by line, and print it as it comes."""
    made = sizes(folder, options)
    for part in (_header, _views, _rows, _subsets, _naive, _disk, _cost):
        for line in part(made, options):
            print(line, flush=True)
            yield line


def sizes(folder: Path, options: argparse.Namespace) -> list[Size]:
    """Build what is missing; the largest size repeats the one before it by hard links."""
    shape = {"domains": options.domains, "token_share": options.token_share}
    plan = [250_000, 2_500_000, 10_000_000] if options.large else [25_000, 50_000]
    piece = SEGMENT_TOKENS if options.large else 12_500
    made = []
    for tokens in plan:
        layout = build(folder / f"{tokens}", tokens, segment_tokens=piece, progress=lambda _: None, **shape)
        made.append(Size(tokens, max(1, tokens // piece), layout))
    times = 25 if options.large else 10
    layout = repeat(made[-1].layout, folder / f"{plan[-1] * times}", made[-1].segments * times)
    made.append(Size(plan[-1] * times, made[-1].segments * times, layout))
    for size in made:
        publish(size.layout)
    return made


def _header(made: list[Size], options: argparse.Namespace) -> Iterator[str]:
    yield "# Queries and rollups"
    yield ""
    flags = " --large" if options.large else ""
    yield f"`python -m benchmarks.queries{flags}`: {machine()}."
    yield ""
    yield "Simulated routing of OLMoE's shape: 16 layers, 64 experts, top-8, a vocabulary of 50,000 with Zipf's"
    yield f"frequencies, prompts of 500 tokens, domains mixed in every segment: {options.domains}; one run. Seconds."
    yield ", ".join(f"{size.title}: {size.segments} segments" for size in made) + "."


def _views(made: list[Size], _: argparse.Namespace) -> Iterator[str]:
    yield from ("", "## Canned views as tokens grow", "")
    yield "In an open connection, warm, best of 7, all rows taken as Arrow. The exponent is of seconds against tokens,"
    yield f"from {made[-3].title} to {made[-1].title} (1: as fast as the tokens grow, 0: not at all)."
    yield ""
    yield _row("view", *(size.title for size in made), "growth", "exponent")
    yield _rule(len(made) + 3)
    for view in MATRICES:
        taken = [in_connection(size.layout, f"from {view}").wall for size in made]
        growth = taken[-1] / taken[-3]
        exponent = math.log(growth) / math.log(made[-1].tokens / made[-3].tokens)
        yield _row(f"`{view}`", *(f"{seconds:.3f}" for seconds in taken), f"{growth:.1f} x", f"{exponent:.2f}")
    largest, before = made[-1], made[-2]
    yield from ("", f"Whole processes at {before.title} and {largest.title}, median of 3, start-up included.")
    yield from ("Cold: the warehouse's files dropped from the page cache before.", "")
    heads = [f"{way} {size.title}" for size in (before, largest) for way in ("moewh", "moewh cold", "duckdb shell")]
    yield _row("view", *heads)
    yield _rule(len(heads) + 1)
    for view in MATRICES:
        cells = []
        for size in (before, largest):
            cells += [moewh_process(size.layout, view), moewh_process(size.layout, view, cold=True)]
            cells.append(shell_process(size.layout, f"from {view}"))
        yield _row(f"`{view}`", *(f"{seconds:.2f}" for seconds in cells))
    yield from _per_segment(before, largest)


def _per_segment(before: Size, largest: Size) -> Iterator[str]:
    yield from ("", "What a segment adds, from those two sizes:", "")
    for view in MATRICES:
        more = in_connection(largest.layout, f"from {view}").wall - in_connection(before.layout, f"from {view}").wall
        yield f"- `{view}`: {more / (largest.segments - before.segments) * 1e3:.2f} ms"


def _rows(made: list[Size], options: argparse.Namespace) -> Iterator[str]:
    size = made[-2]
    yield from ("", f"## Tokens of an expert, at {size.title} tokens", "")
    yield _row("question", "seconds")
    yield _rule(2)
    yield _row("`expert_token_affinity`, one expert, top 20", f"{in_connection(size.layout, TOP_TOKENS).wall:.3f}")
    yield _row("strongest tokens of one expert, over rows", f"{in_connection(size.layout, STRONGEST).wall:.3f}")
    whole = in_connection(size.layout, "select count(*) from expert_token_affinity", times=1 if options.large else 3)
    yield _row("`count(*)` over all of `expert_token_affinity`", f"{whole.wall:.1f}")


def _subsets(made: list[Size], _: argparse.Namespace) -> Iterator[str]:
    """Half of the prompts of the smallest warehouse: what no rollup answers."""
    size = made[0]
    prompts = list(range(0, size.tokens // 500, 2))
    rows = len(prompts) * 499 * ROWS_PER_TOKEN
    yield from ("", f"## Half of the prompts of {size.title} tokens, over rows ({rows / 1e6:.0f} M rows)", "")
    yield _row("", "`co_routing_where`", "`transitions_where`")
    yield _rule(3)
    where = alternatives.in_prompts(prompts)
    moewh = [_saved(size.layout, name, prompts) for name in ("co_routing_where", "transitions_where")]
    naive = [
        in_connection(size.layout, sql.format(where=where), times=2).wall
        for sql in (alternatives.PAIRS, alternatives.TRANSITIONS)
    ]
    polars = [
        best(lambda: alternatives.polars_pairs(size.layout, prompts, transitions), 2).wall  # noqa: B023
        for transitions in (False, True)
    ]
    yield _row("moewh", *(f"{seconds:.2f}" for seconds in moewh))
    for name, taken in (("self-join in DuckDB", naive), ("self-join in polars", polars)):
        factors = (f"{other:.2f} ({other / ours:.1f} x)" for other, ours in zip(taken, moewh, strict=True))
        yield _row(name, *factors)


def _saved(layout: Layout, name: str, prompts: list[int]) -> float:
    from moewh.warehouse.answer.query import find_query, prepare

    with open_warehouse(layout) as connection:
        answer = prepare(connection, find_query(name), {"prompt_ids": ",".join(map(str, prompts))}, unsafe=True)
        assert answer is not None
        return best(lambda: answer.relation().to_arrow_table(), 2).wall


def _naive(made: list[Size], _: argparse.Namespace) -> Iterator[str]:
    """The self-join over all rows, on two of the sixteen layers, times eight: it takes long and grows with them."""
    size = made[-2]
    yield from ("", f"## Without rollups, at {size.title} tokens", "")
    layers, share = (3, 11), LAYERS / 2
    ours = in_connection(size.layout, "from co_routing").wall
    where = f"where a.layer in {layers}"
    join = in_connection(size.layout, alternatives.PAIRS.format(where=where), times=1).wall * share
    small = made[0]
    polars = spent(lambda: alternatives.polars_pairs(small.layout, None)).wall * size.tokens / small.tokens
    ids_TK = alternatives.load_experts(small.layout, 3)
    one_hot = best(lambda: alternatives.one_hot_pairs(ids_TK), 3).wall * LAYERS * size.tokens / small.tokens
    yield _row("co-routing of every layer", "seconds", "against `co_routing`")
    yield _rule(3)
    yield _row("`co_routing`, from rollups", f"{ours:.3f}", "1")
    yield _row("self-join in DuckDB (two layers measured)", f"{join:.0f}", f"{join / ours:,.0f} x")
    yield _row(f"self-join in polars (measured at {small.title} tokens)", f"{polars:.0f}", f"{polars / ours:,.0f} x")
    limit = "one-hot products in numpy, rows in memory already: the limit"
    yield _row(f"{limit} (measured at {small.title})", f"{one_hot:.1f}", f"{one_hot / ours:,.0f} x")


def _disk(made: list[Size], _: argparse.Namespace) -> Iterator[str]:
    size = made[-2]
    folder = size.layout.segment(RUN, 0)
    held = file_bytes(folder)
    rows = pq.read_metadata(folder / schema.ROUTING.file).num_rows
    whole = sum(held.values())
    with tempfile.TemporaryDirectory() as scratch:
        plain = Path(scratch) / "plain.parquet"
        pq.write_table(pq.read_table(folder / schema.ROUTING.file, partitioning=None), plain)
        default = plain.stat().st_size
    yield from ("", f"## On disk: a segment of {rows / ROWS_PER_TOKEN:,.0f} tokens, {rows:,} rows", "")
    yield _row("", "bits a row", "against `routing.parquet`")
    yield _rule(3)
    ours = held["routing"]
    for name, size_bytes in (
        ("`routing.parquet`, all columns", ours),
        ("the same rows, pyarrow's default Parquet", default),
        ("int32 expert ids alone", rows * 4),
        ("all router logits in bf16", rows // 8 * 64 * 2),
        ("all rollups together", sum(held[table.name] for table in schema.ROLLUPS)),
    ):
        yield _row(name, f"{size_bytes * 8 / rows:.2f}", f"{size_bytes / ours:.2f} x")
    columns = column_bytes(folder / schema.ROUTING.file)
    bits = ", ".join(f"`{name}` {size_bytes * 8 / rows:.2f}" for name, size_bytes in columns.items())
    yield from ("", f"Bits a row by column: {bits}.", "")
    for table in schema.ROLLUPS:
        yield f"- `{table.name}`: {held[table.name] / whole:.2%} of the segment"
    yield f"- rollups together: {sum(held[table.name] for table in schema.ROLLUPS) / whole:.1%} of the segment"


def _cost(_: list[Size], options: argparse.Namespace) -> Iterator[str]:
    """Core-microseconds a token, beside the rollups in SQL."""
    yield from ("", "## What a token costs as a segment is written", "")
    yield _row("core-microseconds a token", "")
    yield _rule(2)
    for name, cost in costs(SEGMENT_TOKENS if options.large else 25_000, options.domains, options.token_share).items():
        yield _row(name, f"{cost:.1f}")
    yield _row("rollups by their SQL in DuckDB", f"{_sql_cost(options) * 1e6:.0f}")


def _sql_cost(options: argparse.Namespace) -> float:
    tokens = 50_000 if options.large else 12_500
    with tempfile.TemporaryDirectory() as scratch:
        shape = {"domains": options.domains, "token_share": options.token_share}
        layout = build(Path(scratch), tokens, progress=lambda _: None, **shape)
        with open_warehouse(layout) as connection:
            cores = time.process_time()
            for table in schema.ROLLUPS:
                connection.execute(f"create temp table x_{table.name} as {definition(table)}")
            return (time.process_time() - cores) / tokens


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _rule(columns: int) -> str:
    return f"|---|{'---:|' * (columns - 1)}"


if __name__ == "__main__":
    main()
