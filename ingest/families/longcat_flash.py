"""LongCat-Flash: how it counts its layers, and experts that compute nothing."""

from __future__ import annotations

from typing import Any

import torch

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

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """In two slots, the second with weight 0: the container takes no single one."""
        weights_M2 = hidden_MH.new_tensor([1.0, 0.0]).expand(len(hidden_MH), 2)
        output_MH: torch.Tensor = moe.outermost(hidden_MH, expert_ids_M[:, None].expand(-1, 2), weights_M2)
        return output_MH


FAMILY = LongcatFlash()
