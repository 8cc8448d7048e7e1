"""Phi-3.5-MoE: weights that are not a function of the logits alone."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class Phimoe(FamilyAdapter):
    """Each slot's weight is a softmax over the experts that earlier slots left, above a threshold."""

    measurable = False
    renormalized = False


FAMILY = Phimoe()
