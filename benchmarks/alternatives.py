"""Alternatives without rollups: the self-join over rows in DuckDB and polars, and the one-hot limit in numpy.

Each counts, for every layer, the tokens that two experts share.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.parquet as pq

from benchmarks.simulated import EXPERTS, RUN, TOP_K
from moewh.warehouse.files.layout import Layout

PAIRS = """
select a.layer, a.expert as expert_a, b.expert as expert_b, count(*) as tokens
from routing as a
join routing as b
    on b.run_id = a.run_id and b.segment = a.segment and b.token_id = a.token_id and b.layer = a.layer
    and b.expert > a.expert
{where}
group by a.layer, a.expert, b.expert"""

TRANSITIONS = """
select a.layer, a.expert as expert, b.expert as next_expert, count(*) as tokens
from routing as a
join routing as b
    on b.run_id = a.run_id and b.segment = a.segment and b.token_id = a.token_id and b.layer = a.layer + 1
{where}
group by a.layer, a.expert, b.expert"""


def in_prompts(prompts: list[int]) -> str:
    """Return the condition that restricts the self-joins to the tokens of some prompts."""
    listed = ", ".join(map(str, prompts))
    return f"where a.prompt_id in ({listed}) and a.kind <> 'special'"


def polars_pairs(layout: Layout, prompts: list[int] | None, transitions: bool = False) -> int:
    """Run the self-join in polars' streaming engine, layer by layer; return the pairs counted."""
    routing = pl.scan_parquet(_files(layout, "routing"), hive_partitioning=False)
    if prompts is not None:
        routing = routing.filter(pl.col("prompt_id").is_in(prompts) & (pl.col("kind") != "special"))
    counted = 0
    for layer in range(15 if transitions else 16):
        a = routing.filter(pl.col("layer") == layer).select("token_id", "expert")
        b = routing.filter(pl.col("layer") == layer + 1).select("token_id", "expert") if transitions else a
        both = a.join(b, on="token_id")
        if not transitions:
            both = both.filter(pl.col("expert") < pl.col("expert_right"))
        pairs = both.group_by("expert", "expert_right").len().collect(engine="streaming")
        counted += int(pairs["len"].sum())
    return counted


def load_experts(layout: Layout, layer: int) -> npt.NDArray[np.int32]:
    """Return one layer's experts [T, K] of every segment, in memory."""
    parts = [
        pq.read_table(path, columns=["expert"], filters=[("layer", "==", layer)], partitioning=None)["expert"]
        for path in _files(layout, "routing")
    ]
    return np.concatenate([part.to_numpy() for part in parts]).reshape(-1, TOP_K)


def one_hot_pairs(ids_TK: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """Count pairs as the product of one-hot rows: the least work for a CPU once the rows are in memory."""
    total_EE = np.zeros((EXPERTS, EXPERTS), np.float64)
    for start in range(0, len(ids_TK), 4_096):
        block_TK = ids_TK[start : start + 4_096]
        one_hot_TE = np.zeros((len(block_TK), EXPERTS), np.float32)
        one_hot_TE.ravel()[(np.arange(len(block_TK)) * EXPERTS)[:, None] + block_TK] = 1
        total_EE += one_hot_TE.T @ one_hot_TE
    return np.triu(total_EE, 1)


def _files(layout: Layout, table: str) -> list[str]:
    return [str(path) for path in sorted(layout.segments(RUN).glob(f"segment=*/{table}.parquet"))]
