"""NLLB-MoE: refused."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class NllbMoe(FamilyAdapter):
    """The experts' forward one-hots a mask that is one-hot already (seen in transformers 5.0 to 5.24)."""

    refused = "transformers computes it wrongly: whatever the router chooses, only experts 0 and 1 run"
    fixed_top_k = 2


FAMILY = NllbMoe()
