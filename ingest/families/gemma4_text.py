"""Gemma 4: the router returns probabilities."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class Gemma4(FamilyAdapter):
    """The router returns probabilities instead of logits, and multiplies each weight by a factor of its expert."""

    returns_probabilities = True
    measurable = False


FAMILY = Gemma4()
