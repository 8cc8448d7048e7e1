"""CommitteeAudit's CSV: layer, domain, expert_idx, expert_weight, topk_rank, one row per expert that a domain uses.

expert_weight is the mean weight of the expert over the domain's tokens (weight_sum / N_D); topk_rank is its 0-based
rank by that weight among the layer's experts. Prompts without a domain become the domain `unlabelled`.
"""

from __future__ import annotations

import csv
from pathlib import Path

from moewh.warehouse.answer.export import Export, ExportedRun
from moewh.warehouse.errors import MoewhError

_WEIGHTS = """
    with counted as (
        select layer, coalesce(domain, 'unlabelled') as domain, expert, sum(tokens) as tokens, sum(weight_sum) as weight
        from expert_counts
        where run_id = $run and kind <> 'special' and ($domain is null or domain = $domain)
        group by all
    ),
    shares as (
        select
            counted.layer as layer,
            counted.domain as domain,
            expert,
            weight * layers.top_k / sum(tokens) over (partition by counted.layer, counted.domain) as weight
        from counted
        join layers on layers.run_id = $run and layers.layer = counted.layer
    )
    select layer, domain, expert, weight,
        row_number() over (partition by layer, domain order by weight desc, expert) - 1 as topk_rank
    from shares
    order by layer, domain, topk_rank"""


_DOMAINS = """
    select distinct domain
    from expert_counts
    where run_id = $run and kind <> 'special' and ($domain is null or domain = $domain)"""


def _write(run: ExportedRun, path: Path) -> None:
    if {(None,), ("unlabelled",)} <= set(run.rows(_DOMAINS)):
        raise MoewhError(
            f"run {run.run_id} has prompts without a domain and a domain 'unlabelled', which would become one domain. "
            "Export one domain with --domain."
        )
    rows = run.rows(_WEIGHTS)
    if not rows or any(weight is None for *_, weight, _ in rows):
        raise MoewhError(f"run {run.run_id} has no weights, and the audit ranks experts by them. Export another run.")
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["layer", "domain", "expert_idx", "expert_weight", "topk_rank"])
        table.writerows(rows)


EXPORT = Export(_write, ".csv")
