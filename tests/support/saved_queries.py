"""Answers of saved queries as the command gives them, and parameters with which each query has rows."""

from __future__ import annotations

from moewh.warehouse.answer.parameters import kinds_of
from moewh.warehouse.answer.query import Value, find_query
from moewh.warehouse.files.layout import Layout
from tests.support.brute_force import Rows
from tests.support.opened import engine_of
from tests.support.synthetic import word


def answer(layout: Layout, name: str, values: dict[str, Value]) -> Rows:
    found = engine_of(layout)(find_query(name), values)
    assert found is not None
    return found.execute().fetchall()


EXISTING: dict[str, Value] = {
    "run": "step-30",
    "run of the same experts": "step-1",
    "run of the same tokens": "step-1",
    "complete run of the same tokens": "step-1",
    "series": "trained",
    "domain": "code",
    "token": word(4),
    "layer": 3,
    "expert": 4,
    "prompt ids": "0,3",
    "token ids": "1,2",
    "count": 5,
    "share": 0.01,
    "ratio": 1.01,
    "placement": "0:0:0,0:1:1",
    "text": "a",
    "whole number": 1,
    "number": 0.5,
}
"""Kind of parameter → a value that is in the random warehouse."""
GIVEN: dict[str, dict[str, Value]] = {
    "expert_top_tokens": {"min_tokens": 1},
    "domain_experts": {"run": "007", "min_share": 0.2},
    "co_routing_where": {"prompt_ids": "0,2,3", "run": "mixed"},
    "transitions_where": {"token_ids": f"{1 << 24}, {(1 << 24) + 1}, 2, 3"},
    "contrast_domains": {"other_domain": "prose"},
    "contrast_runs": {"run": "step-1", "other_run": "step-30"},
    "expert_contexts": {"width": 3, "strongest": 1_000},
    "expert_paths": {"most": 5, "domain": "code"},
    "layer_pair_jaccard": {"layer": 4, "other_layer": 0},
    "placement_quality": {"placement": "0:0:0,0:1:1,0:2:0,0:3:1,0:4:0,0:5:1,0:5:0", "run": "007"},
    "load_by_position": {"width": 4},
    "risk_difference": {"domain": "code", "other_prompt_ids": "1,2,4"},
    "specialization_changes": {"run": "step-30", "other_run": "step-1", "min_lift": 1.05},
}
"""Parameters of saved queries that test more than the values of EXISTING would."""


def values_of(name: str) -> dict[str, Value]:
    """Return parameters with which a saved query has rows: the required ones from EXISTING, and those in GIVEN."""
    query = find_query(name)
    kinds = kinds_of(query)
    return {parameter: EXISTING[kinds[parameter]] for parameter in query.required} | GIVEN.get(name, {})
