"""`moewh demo`: ingest the embedded model and prompts, and print what their routing shows."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moewh.cli.options import warehouse_option
from moewh.ingest.options import DEMO
from moewh.warehouse.files.layout import Layout

if TYPE_CHECKING:
    import duckdb

    from moewh.warehouse.answer.query import Value

SERIES = "moewh-demo"
"""The series of the demo's own runs only; a user's runs of the embedded model have the series `demo`."""
_STRONGEST = 3
_TOP_TOKENS = 5
_MIN_TOKENS = 20
"""Lifts from fewer tokens than this are high by chance."""
_MIN_SHARE = 0.1
_SHUFFLES = 1_000


@click.command(short_help="Ingest the embedded model and prompts, and show their routing.")
@warehouse_option
def demo(warehouse: Layout) -> None:
    """Ingest every checkpoint of the embedded model, and print which experts prefer what.

    The model is a small OLMoE that was trained for this; nothing is downloaded.
    """
    runs = _ingest_checkpoints(warehouse)
    click.echo("\n\n".join((*_findings(warehouse, runs), _next_steps(warehouse, runs[-1]))))


def _findings(warehouse: Layout, runs: list[str]) -> list[str]:
    """Describe what the runs show, part by part.

    The connection is not a variable of `demo`: frames that were open while torch was imported live until the process
    ends (`no_collection`), and DuckDB would report the connection as leaked.
    """
    from moewh.warehouse.views.opening import open_warehouse

    run_id = runs[-1]
    with open_warehouse(warehouse) as connection:
        return [
            _model(connection, run_id),
            _domains(connection, run_id),
            _saturation(connection, runs),
            _strongest_pairs(connection, run_id),
            _strongest_transitions(connection, run_id),
        ]


def _ingest_checkpoints(warehouse: Layout) -> list[str]:
    """Ingest the demo's checkpoints in training order; return their runs."""
    from moewh.cli.ingest import run_ingest, summary_line
    from moewh.ingest import demo as embedded
    from moewh.ingest.options import IngestOptions

    runs = []
    for revision in embedded.checkpoints():
        # In float32 the same experts are chosen on every machine; bfloat16 kernels differ between processors.
        options = IngestOptions(
            model=DEMO,
            prompts=(DEMO,),
            revision=revision,
            run_id=f"{DEMO}-{revision}",
            series=SERIES,
            dtype="float32",
        )
        summary = run_ingest(options, warehouse)
        click.echo(summary_line(summary), err=True)
        runs.append(summary.run_id)
    return runs


def _model(connection: duckdb.DuckDBPyConnection, run_id: str) -> str:
    from moewh.ingest import demo as embedded

    layers, experts, top_k, tokens = connection.execute(
        "select num_moe_layers, num_experts, top_k, tokens from runs where run_id = $run", {"run": run_id}
    ).fetchall()[0]
    learned = embedded.facts()["domains"].items()
    shown = ", ".join(f"{domain} {fact['loss']:.2f} ({fact['bigram_loss']:.2f})" for domain, fact in learned)
    return (
        f"{run_id}: {layers} layers, {experts} experts, top-{top_k}; {tokens:,} tokens ingested.\n"
        f"Held-out loss in nats per token (in parentheses: a bigram model of the domain): {shown}."
    )


def _domains(connection: duckdb.DuckDBPyConnection, run_id: str) -> str:
    """Describe, for each domain, the expert with the greatest lift among those that get at least 10% of its tokens."""
    lines = ["The expert that each domain prefers most (from domain_experts):"]
    by_chance = lifts_by_chance(connection, run_id)
    seen = set()
    for row in _rows(connection, "domain_experts", {"run": run_id, "min_share": _MIN_SHARE}):
        if row["domain"] in seen:
            continue
        seen.add(row["domain"])
        values: dict[str, Value] = {
            "run": run_id,
            "layer": row["layer"],
            "expert": row["expert"],
            "min_tokens": _MIN_TOKENS,
        }
        tokens = [repr(token["token"]) for token in _rows(connection, "expert_top_tokens", values)[:_TOP_TOKENS]]
        lines.append(
            f"  {row['domain']:<6} layer {row['layer']}, expert {row['expert']:>2}: lift {row['lift']:.1f}, "
            f"{row['share']:.0%} of its tokens (overall {row['overall_share']:.0%}); top tokens {' '.join(tokens)}"
        )
    chances = ", ".join(f"{domain} {lift:.1f}" for domain, lift in sorted(by_chance.items()))
    lines.append(f"  By chance (99th percentile of the best lift with shuffled labels): {chances}.")
    return "\n".join(lines)


def lifts_by_chance(connection: duckdb.DuckDBPyConnection, run_id: str, quantile: float = 0.99) -> dict[str, float]:
    """Return, for each domain, the lift that its best expert exceeds in 1 of 100 shuffles of the prompts' labels.

    The best expert has the greatest lift among those with a share of at least 10% at any layer, as in the demo's table.
    """
    import numpy as np

    chosen = connection.execute(
        """
        select prompt_id, domain, layer, expert, count(*) from routes
        where run_id = $run and kind <> 'special' group by all order by prompt_id
        """,
        {"run": run_id},
    ).fetchall()
    labels = {prompt: domain for prompt, domain, *_ in chosen}
    prompts, experts = list(labels), sorted({(layer, expert) for _, _, layer, expert, _ in chosen})
    counts_PX = np.zeros((len(prompts), len(experts)))
    for prompt, _, layer, expert, tokens in chosen:
        counts_PX[prompts.index(prompt), experts.index((layer, expert))] = tokens
    tokens_P = counts_PX.sum(1)  # in units of the layers times top-k: every token has all of them
    choices = _choices_per_token(connection, run_id)
    domains, label_P = np.unique(list(labels.values()), return_inverse=True)
    random = np.random.default_rng(0)
    best_SD = np.zeros((_SHUFFLES, len(domains)))
    for shuffle in range(_SHUFFLES):
        member_DP = (random.permutation(label_P) == np.arange(len(domains))[:, None]).astype(float)
        share_DX = choices * (member_DP @ counts_PX) / (member_DP @ tokens_P)[:, None]
        lift_DX = share_DX / (choices * counts_PX.sum(0) / tokens_P.sum())
        best_SD[shuffle] = np.where(share_DX >= _MIN_SHARE, lift_DX, 0).max(1)
    return dict(zip(domains.tolist(), np.quantile(best_SD, quantile, axis=0).tolist(), strict=True))


def _choices_per_token(connection: duckdb.DuckDBPyConnection, run_id: str) -> int:
    """Return the routing rows per token, over all layers."""
    answer = connection.execute("select sum(top_k) from layers where run_id = $run", {"run": run_id}).fetchone()
    assert answer is not None
    return int(answer[0])


def _saturation(connection: duckdb.DuckDBPyConnection, runs: list[str]) -> str:
    """Describe how much of the last checkpoint's routing each of the demo's runs already has, by layer."""
    rows = connection.execute(
        "select train_step, saturation, random from router_saturation where list_contains($runs, run_id) "
        "order by train_step, layer",
        {"runs": runs},
    ).fetchall()
    steps: dict[int, list[float]] = {}
    for step, share, _ in rows:
        steps.setdefault(step, []).append(share)
    chance = rows[0][-1]
    lines = [
        f"Share of the last checkpoint's experts, layer by layer (from router_saturation; by chance {chance:.2f}):"
    ]
    for step, shares in steps.items():
        lines.append(f"  step {step:>5,}: {'  '.join(f'{share:.2f}' for share in shares)}")
    return "\n".join(lines)


def _strongest_pairs(connection: duckdb.DuckDBPyConnection, run_id: str) -> str:
    rows = connection.execute(
        """
        select layer, expert_a, expert_b, tokens, conditional, lift from co_routing
        where run_id = $run and expert_a < expert_b and tokens >= $least order by lift desc limit $strongest
        """,
        {"run": run_id, "least": _MIN_TOKENS, "strongest": _STRONGEST},
    ).fetchall()
    lines = ["Experts that fire together most, against chance (from co_routing):"]
    for layer, expert, other, tokens, conditional, lift in rows:
        lines.append(
            f"  layer {layer}: experts {expert:>2} and {other:>2} share {tokens:>4} tokens, lift {lift:.1f} "
            f"({conditional:.0%} of expert {expert}'s tokens)"
        )
    return "\n".join(lines)


def _strongest_transitions(connection: duckdb.DuckDBPyConnection, run_id: str) -> str:
    rows = connection.execute(
        """
        select layer, expert, next_layer, next_expert, tokens, conditional, lift from layer_transitions
        where run_id = $run and tokens >= $least order by lift desc limit $strongest
        """,
        {"run": run_id, "least": _MIN_TOKENS, "strongest": _STRONGEST},
    ).fetchall()
    lines = ["Where tokens go from one layer to the next, against chance (from layer_transitions):"]
    for layer, expert, next_layer, next_expert, tokens, conditional, lift in rows:
        lines.append(
            f"  layer {layer} expert {expert:>2} → layer {next_layer} expert {next_expert:>2}: "
            f"{tokens:>4} tokens, lift {lift:.1f} ({conditional:.0%} of expert {expert}'s tokens)"
        )
    return "\n".join(lines)


def _next_steps(warehouse: Layout, run_id: str) -> str:
    """Return commands that work as printed: they give the demo's last run, and the warehouse if not the default."""
    default = Path(os.environ.get("MOEWH_WAREHOUSE") or "wh").absolute()
    option = "" if warehouse.root == default else f" --warehouse {shlex.quote(str(warehouse.root))}"
    return "\n".join(
        [
            "Try next:",
            f"  moewh show --prompt 3 --layer 1 --run {run_id}{option}",
            f"  moewh query domain_experts -p run={run_id}{option}",
            f"  moewh query -c \"from co_routing where run_id = '{run_id}' order by lift desc limit 10\"{option}",
            f"  moewh shell{option}",
        ]
    )


def _rows(connection: duckdb.DuckDBPyConnection, name: str, values: Mapping[str, Value]) -> list[dict[str, Any]]:
    """Return the rows of a saved query as dictionaries."""
    from moewh.warehouse.answer import query as queries

    answer = queries.prepare(connection, queries.find_query(name), values)
    if answer is None:
        return []
    result = answer.execute()
    names = [column[0] for column in result.description or ()]
    return [dict(zip(names, row, strict=True)) for row in result.fetchall()]
