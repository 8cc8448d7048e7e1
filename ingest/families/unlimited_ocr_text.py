"""Unlimited OCR: the router of DeepSeek-V2."""

from __future__ import annotations

from moewh.ingest.families.deepseek_v2 import DeepseekV2


class UnlimitedOcr(DeepseekV2):
    """As DeepSeek-V2: a token's weights are never divided by their sum."""


FAMILY = UnlimitedOcr()
