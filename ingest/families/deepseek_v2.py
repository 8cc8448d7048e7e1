"""DeepSeek-V2: what a token's weights sum to."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class DeepseekV2(FamilyAdapter):
    """The router ignores norm_topk_prob: a token's weights are never divided by their sum."""

    renormalized = False


FAMILY = DeepseekV2()
