"""LongCat-Flash: its count of layers, and its identity experts."""

from __future__ import annotations

from typing import Any

import torch

from moewh.ingest.families.configuration import text_config
from moewh.ingest.families.rule import FamilyAdapter, MoELayer


class LongcatFlash(FamilyAdapter):
    """Two attention sublayers make one layer, and num_hidden_layers counts the sublayers.

    Its last experts are identities: they return their input.
    """

    renormalized = False

    def routed_layers(self, config: Any) -> list[int]:
        """Return every layer, counted by num_layers."""
        return list(range(text_config(config).num_layers))

    def identity_experts(self, moe: MoELayer) -> int:
        """Return the container's number of identity experts."""
        return int(moe.experts.zero_expert_num)  # type: ignore[arg-type]

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Run in two slots, the second with weight 0, because the container does not accept a single one."""
        weights_M2 = hidden_MH.new_tensor([1.0, 0.0]).expand(len(hidden_MH), 2)
        output_MH: torch.Tensor = moe.outermost(hidden_MH, expert_ids_M[:, None].expand(-1, 2), weights_M2)
        return output_MH


FAMILY = LongcatFlash()
