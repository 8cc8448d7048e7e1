"""LongCat-Flash: how it counts its layers, and experts that compute nothing."""

from __future__ import annotations

from typing import Any

from moewh.ingest.families.configuration import text_config
from moewh.ingest.families.rule import FamilyAdapter, MoELayer


class LongcatFlash(FamilyAdapter):
    """Two attention sublayers make one layer, and num_hidden_layers counts the sublayers.

    Its last experts are identities: they put out what they are given.
    """

    renormalized = False

    def routed_layers(self, config: Any) -> list[int]:
        """Every layer, counted by num_layers."""
        return list(range(text_config(config).num_layers))

    def identity_experts(self, moe: MoELayer) -> int:
        """As the container says."""
        return int(moe.experts.zero_expert_num)  # type: ignore[arg-type]


FAMILY = LongcatFlash()
