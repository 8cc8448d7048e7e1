"""The cost of queries as segments and runs grow, sealed and unsealed, in an open connection."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import duckdb

from benchmarks.simulated import RUN, build, repeat, seal_linked, seal_repeated
from benchmarks.timing import Spent, best, moewh_process, row, rule, shown, timed
from moewh.warehouse.files.layout import Layout
from moewh.warehouse.sealing.seal import seal
from moewh.warehouse.views.opening import open_warehouse

MATRICES = ("co_routing", "layer_transitions", "expert_load", "load_balance", "domain_specialization")
TOP_TOKENS = """select vocab_id, token, tokens, lift from expert_token_affinity
where run_id = 'olmoe' and layer = 7 and expert = 3 and tokens >= 10 order by lift desc, vocab_id limit 20"""
QUESTIONS = {
    **{f"`{view}`": f"from {view}" for view in MATRICES},
    "one expert's top tokens": TOP_TOKENS,
    "`from routes limit 5`": "from routes limit 5",
    "`from runs`": "from runs",
}


@dataclass(frozen=True)
class Scale:
    """The sizes of the warehouses."""

    segment_tokens: int
    distinct: int
    """Segments written; further ones are hard links to them."""
    segments: tuple[int, ...]
    """Sizes to measure above one segment: multiples of `distinct`."""
    runs: int
    times: int
    """How often each query is run."""


SMALL = Scale(12_500, 4, (20, 100), 20, 5)
LARGE = Scale(250_000, 40, (120, 520, 2_000), 200, 5)
RUN_SEGMENTS = 5
"""Segments per run, where there are many runs."""


@dataclass(frozen=True)
class Warehouses:
    """Warehouses of one segment and of all distinct ones, each unsealed and sealed."""

    one: Layout
    one_sealed: Layout
    base: Layout
    base_sealed: Layout
    sealing: Spent | None
    """The time to seal the last; None if it was sealed already."""


def warehouses(folder: Path, scale: Scale, domains: int, token_share: float) -> Warehouses:
    """Build the missing warehouses below `folder`."""

    def built(name: str, segments: int) -> Layout:
        tokens = segments * scale.segment_tokens
        return build(
            folder / name,
            tokens,
            domains=domains,
            token_share=token_share,
            segment_tokens=scale.segment_tokens,
            progress=lambda _: None,
        )

    one, base = built("one", 1), built("base", scale.distinct)
    one_sealed = repeat(one, folder / "one-sealed", 1)
    seal(one_sealed, RUN)
    base_sealed = repeat(base, folder / "base-sealed", scale.distinct)
    sealed = base_sealed.sealed(RUN).is_dir()
    sealing = None if sealed else best(lambda: seal(base_sealed, RUN), 1)
    return Warehouses(one, one_sealed, base, base_sealed, sealing)


def by_segments(made: Warehouses, folder: Path, scale: Scale) -> Iterator[str]:
    """Yield the table of every query by number of segments: the median seconds and the least core-seconds."""
    yield from ("", "## By segments, sealed and unsealed", "")
    yield "In an open connection, warm, all rows fetched as Arrow; median seconds (least core-seconds)."
    yield f"Above {scale.distinct} segments, they are hard links to the same {scale.distinct}, repeated."
    yield ""
    columns: dict[str, dict[str, Spent]] = {"1": asked(made.one, scale), "1, sealed": asked(made.one_sealed, scale)}
    for segments in scale.segments:
        layout = repeat(made.base, folder / f"{segments}", segments)
        columns[f"{segments:,}"] = asked(layout, scale)
        layout = repeat(made.base, folder / f"{segments}-sealed", segments)
        seal_repeated(layout, made.base_sealed, segments // scale.distinct)
        columns[f"{segments:,}, sealed"] = asked(layout, scale)
    yield row("segments", *columns)
    yield rule(len(columns) + 1)
    for question in columns["1"]:
        yield row(question, *(shown(taken[question]) for taken in columns.values()))
    yield from ("", f"`from routes limit 5` at {scale.segments[-1]:,} segments, against 1:")
    routes = [columns[name]["`from routes limit 5`"] for name in (f"{scale.segments[-1]:,}", "1")]
    yield f"{routes[0].wall / routes[1].wall:.1f} x the seconds, {routes[0].cores / routes[1].cores:.1f} x the cores."
    yield from ("", f"Sealed, {scale.segments[-1]:,} segments against 1:", "")
    for view in MATRICES:
        large, small = (columns[f"{name}, sealed"][f"`{view}`"] for name in (f"{scale.segments[-1]:,}", "1"))
        unsealed = columns["1"][f"`{view}`"]
        yield (
            f"- `{view}`: {large.wall / small.wall:.2f} x the seconds, {large.cores / small.cores:.2f} x the cores; "
            f"against 1 unsealed {large.cores / unsealed.cores:.2f} x the cores"
        )


def by_runs(made: Warehouses, folder: Path, scale: Scale) -> Iterator[str]:
    """Yield the table of views over one of many sealed runs, and over all of them."""
    names = [f"run{number:03d}" for number in range(scale.runs)]
    layout = repeat(made.one, folder / f"{scale.runs}-runs", RUN_SEGMENTS, names)
    seal_repeated(layout, made.one_sealed, RUN_SEGMENTS, names[0])
    for name in names[1:]:
        seal_linked(layout, names[0], name)
    yield from ("", f"## {scale.runs} sealed runs of {RUN_SEGMENTS} segments", "")
    yield "Median seconds (least core-seconds), in an open connection."
    yield ""
    yield row("question", "one run", "all runs", "rows of all")
    yield rule(4)
    with open_warehouse(layout) as connection:
        for view in (*MATRICES, "expert_repetition", "routes limit 5", "runs"):
            name, _, limit = view.partition(" ")
            one = f"from {name} where run_id = '{names[len(names) // 2]}' {limit}"
            taken = [timed(partial(_all_rows, connection, sql), 3) for sql in (one, f"from {view}")]
            rows = connection.sql(f"select count(*) from (from {view})").fetchall()[0][0]
            yield row(f"`{view}`", *map(shown, taken), f"{rows:,}")
    yield from ("", f"`moewh runs`, the whole process: {moewh_process(layout, 'runs'):.2f} s.")


def _all_rows(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    connection.sql(sql).to_arrow_table()


def asked(layout: Layout, scale: Scale) -> dict[str, Spent]:
    """Return the cost of opening a warehouse and of each query."""
    opened = timed(lambda: open_warehouse(layout).close(), scale.times)
    with open_warehouse(layout) as connection:
        taken = {name: timed(partial(_all_rows, connection, sql), scale.times) for name, sql in QUESTIONS.items()}
    return {"open": opened, **taken}
