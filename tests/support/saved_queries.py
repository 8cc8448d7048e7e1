"""Saved queries answered as the command answers them, and parameters for which each has rows."""

from __future__ import annotations

from moewh.warehouse.answer.query import Value, find_query
from moewh.warehouse.files.layout import Layout
from tests.support.brute_force import Rows
from tests.support.opened import engine_of
from tests.support.synthetic import word


def answer(layout: Layout, name: str, values: dict[str, Value]) -> Rows:
    found = engine_of(layout)(find_query(name), values)
    assert found is not None
    return found.execute().fetchall()


VALUES: dict[str, dict[str, Value]] = {
    "expert_top_tokens": {"layer": 2, "expert": 5, "min_tokens": 1},
    "domain_experts": {"run": "007", "min_share": 0.2},
    "co_routing_where": {"prompt_ids": "0,2,3", "run": "mixed"},
    "transitions_where": {"token_ids": f"{1 << 24}, {(1 << 24) + 1}, 2, 3"},
    "changed_tokens": {"run": "step-1", "other_run": "step-30"},
    "contrast_domains": {"domain": "code", "other_domain": "prose"},
    "contrast_runs": {"run": "step-1", "other_run": "step-30"},
    "expert_contexts": {"layer": 3, "expert": 4, "width": 3},
    "expert_paths": {"most": 5, "domain": "code"},
    "layer_pair_jaccard": {"layer": 5, "other_layer": 0},
    "placement_quality": {"placement": "0:0:0,0:1:1,0:2:0,0:3:1,0:4:0,0:5:1,0:5:0", "run": "007"},
    "load_by_position": {"width": 4},
    "risk_difference": {"domain": "code", "other_prompt_ids": "1,2,4"},
    "specialization_changes": {"run": "step-30", "other_run": "step-1", "min_lift": 1.05},
    "token_experts": {"token": word(4)},
}
"""For each saved query that needs some, parameters that give rows."""
