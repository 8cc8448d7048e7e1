"""Inkling: what a token's weights sum to."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class Inkling(FamilyAdapter):
    """A token's weights are divided by a sum that includes those of the shared experts."""

    renormalized = False


FAMILY = Inkling()
