"""Jamba: what a token's weights sum to."""

from __future__ import annotations

from moewh.ingest.families.rule import FamilyAdapter


class Jamba(FamilyAdapter):
    """A token's weights are not divided by their sum, which no configuration states."""

    renormalized = False


FAMILY = Jamba()
