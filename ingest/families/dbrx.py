"""DBRX: the layout of the experts' matrices in its checkpoints."""

from __future__ import annotations

from moewh.ingest.families.layouts import Parts, Tensors
from moewh.ingest.families.rule import FamilyAdapter, MoELayer


class Dbrx(FamilyAdapter):
    """All experts' neurons are concatenated in three two-dimensional matrices."""

    def split_experts(self, moe: MoELayer, tensors: Tensors) -> Parts | None:
        """Split w1 (gate), v1 (up) and w2 (down, transposed), each [E · I, H]."""
        if set(tensors) != {"mlp.w1", "mlp.v1", "mlp.w2"}:
            return None
        gate, up, down = (
            tensors[f"mlp.{name}"].unflatten(0, (moe.num_experts, -1)).unbind() for name in ("w1", "v1", "w2")
        )
        return list(gate), list(up), [matrix.T for matrix in down]


FAMILY = Dbrx()
