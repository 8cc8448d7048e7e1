"""Zaya: a token may skip the experts of a layer."""

from __future__ import annotations

import torch

from moewh.ingest.families.rule import FamilyAdapter
from moewh.ingest.routing import NO_ROUTE


class Zaya(FamilyAdapter):
    """A token that skips the experts reaches them as expert 0 with weight 0: it has no route."""

    renormalized = False

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Treat weight 0 as no route: a chosen expert's weight is its probability, which is never 0."""
        ids_TK, weights_TK = super().rows(ids, weights)
        return ids_TK.masked_fill(weights_TK == 0, NO_ROUTE), weights_TK


FAMILY = Zaya()
