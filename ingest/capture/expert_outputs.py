"""The opt-in table `expert_outputs`: the norm of each chosen expert's output, and its cosine with the routed sum.

In: the arguments of a block's call of its experts. Each chosen expert is run once more by itself, through the container
that the block calls, as in the proof. Out: two numbers per choice; the outputs themselves are not kept.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from moewh.ingest.families.rule import Call, MoELayer, measuring_experts
from moewh.ingest.model.layers import OTHER_MODALITY
from moewh.ingest.routing import NO_ROUTE

_NO_PART = re.compile(rf"^lm_head\.|{OTHER_MODALITY.pattern}")
"""Parameters that take no part in a recorded pass's matrix products."""
_NUMBERS = 1 << 27
"""Most elements of outputs [T, K, H] held at once: 512 MiB in float32."""


def measure_outputs(moe: MoELayer, call: Call) -> torch.Tensor:
    """Return [T, 2 K] in float32: the norms of a token's K expert outputs in slot order, then their cosines.

    The norm is ‖f_e(x)‖₂, before the weight; the cosine is between f_e(x) and Σ_k w_k f_k(x). Rows without a route are
    undefined. A norm that is not finite, and the cosine of a zero vector, are NaN.
    """
    hidden_TH = call.hidden_TH.reshape(-1, call.hidden_TH.shape[-1])
    T, K = call.expert_ids_TK.shape
    at_once = max(1, _NUMBERS // max(1, K * hidden_TH.shape[1]))
    parts = [
        _measured(moe, Call(hidden_TH[part], call.expert_ids_TK[part], call.weights_TK[part]))
        for part in (slice(start, start + at_once) for start in range(0, T, at_once))
    ]
    return torch.cat(parts) if parts else hidden_TH.new_zeros((0, 2 * K), dtype=torch.float32)


def _measured(moe: MoELayer, call: Call) -> torch.Tensor:
    T, K = call.expert_ids_TK.shape
    with measuring_experts():
        single = moe.family.run_experts(
            moe, call.hidden_TH.repeat_interleave(K, dim=0), call.expert_ids_TK.clamp_min(0).reshape(-1)
        )
    output_TKH = single.reshape(T, K, -1).float()
    weights_TK = call.weights_TK.float().masked_fill(call.expert_ids_TK == NO_ROUTE, 0)
    norm_TK = torch.linalg.vector_norm(output_TKH, dim=-1)
    sum_TH = torch.bmm(weights_TK[:, None], output_TKH)[:, 0]
    dot_TK = torch.bmm(output_TKH, sum_TH[..., None])[..., 0]
    cosine_TK = (dot_TK / (norm_TK * torch.linalg.vector_norm(sum_TH, dim=-1, keepdim=True))).clamp(-1, 1)
    return torch.cat([norm_TK, cosine_TK], dim=1).masked_fill(~norm_TK.isfinite().repeat(1, 2), torch.nan)


def arithmetic_share(model: nn.Module, moe_layers: list[MoELayer], top_k: int) -> float:
    """Return the multiplications of a token's K experts relative to its whole pass: the cost of running them again.

    This is derived from matrix sizes, so it ignores attention over positions, and that experts may run slower than
    other matrices of their size. Embeddings, the head, and vision and audio towers are not part of the pass.
    """
    size = {moe.experts: sum(p.numel() for p in moe.experts.parameters() if p.dim() > 1) for moe in moe_layers}
    chosen = sum(size[moe.experts] * top_k / max(1, moe.kinds.count("mlp")) for moe in moe_layers)
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    left_out = {id(parameter) for module in (*tables, *size) for parameter in module.parameters()}
    others = sum(
        parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and id(parameter) not in left_out and not _NO_PART.search(name)
    )
    return chosen / max(1.0, chosen + others)
