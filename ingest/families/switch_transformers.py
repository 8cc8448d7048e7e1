"""Switch Transformers: one expert per token, up to each expert's capacity."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moewh.ingest.families.layouts import Parts, Tensors
from moewh.ingest.families.rule import FamilyAdapter, MoELayer
from moewh.ingest.routing import NO_ROUTE


class SwitchTransformers(FamilyAdapter):
    """The index is a one-hot mask [T, 1, E] after capacity: an empty row is a dropped token, which has no route.

    Capacity is counted over the padded sequence, so prompts are run one by one.
    """

    one_context_per_batch = True
    renormalized = False
    fixed_top_k = 1

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the indices from the mask; K is 1."""
        kept_T1 = ids.sum(-1) > 0
        return ids.argmax(-1).masked_fill(~kept_T1, NO_ROUTE), weights

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Run the container with a mask."""
        mask_M1E = nn.functional.one_hot(expert_ids_M, self.num_experts(moe))[:, None]
        ones = torch.ones(len(hidden_MH), 1, dtype=hidden_MH.dtype, device=hidden_MH.device)
        output_MH: torch.Tensor = moe.outermost(hidden_MH, mask_M1E, ones)
        return output_MH

    def logits(self, output: Any) -> Any:
        """Return the third output."""
        return output[2]

    def first_sparse(self, step: int) -> int:
        """Return the second layer of each stack."""
        return 1 % step

    def split_experts(self, moe: MoELayer, tensors: Tensors) -> Parts | None:
        """Split the experts' own modules: wi [I, H] and wo [H, I]."""
        experts = range(moe.num_experts)
        if set(tensors) != {f"expert_{expert}.{name}.weight" for expert in experts for name in ("wi", "wo")}:
            return None
        up, down = ([tensors[f"expert_{expert}.{name}.weight"] for expert in experts] for name in ("wi", "wo"))
        return None, up, down


FAMILY = SwitchTransformers()
