"""Phi-3.5-MoE: weights that are no function of the logits alone."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class Phimoe(FamilyAdapter):
    """Each slot's weight is a softmax over what the slots before it left, above a threshold."""

    measurable = False
    renormalized = False


FAMILY = Phimoe()
