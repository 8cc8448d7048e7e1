"""Diffusion Gemma: the router of Gemma 4."""

from __future__ import annotations

from moewh.ingest.families.gemma4_text import Gemma4


class DiffusionGemma(Gemma4):
    """As Gemma 4: probabilities instead of logits, and each weight multiplied by a factor of its expert."""


FAMILY = DiffusionGemma()
