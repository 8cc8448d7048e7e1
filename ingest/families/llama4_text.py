"""Llama 4: the router's scores, zero except at the K chosen, multiply the experts' inputs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families.rule import Call, FamilyAdapter, MoELayer, Record, router_of, unwrapped


class Llama4(FamilyAdapter):
    """Every expert runs on every token, the weight multiplies its input, and the indices are not passed on.

    So the router is read: its scores [T, E] are zero except at the K chosen.
    """

    renormalized = False
    no_outputs = "its weights multiply the experts' inputs, so that an expert has no output before its weight"

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the experts beside a router."""
        for path, module in model.named_modules():
            if isinstance(getattr(module, "experts", None), nn.Module) and hasattr(module, "router"):
                yield f"{path}.experts", module.experts

    def attach(self, moe: MoELayer, record: Record) -> list[RemovableHandle]:
        """Hook the router."""

        def after(router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            scores_TE, logits_TE = output
            # The same topk as in the router's forward, so that ties are broken the same way.
            ids_TK = torch.topk(logits_TE, unwrapped(router).top_k, dim=1).indices  # type: ignore[arg-type]
            record(moe, Call(args[0], ids_TK, scores_TE.gather(1, ids_TK)))

        return [router_of(moe).register_forward_hook(after)]

    def observed(self, moe: MoELayer) -> nn.Module:
        """Return the block: the container's own output is not summed over experts."""
        block: nn.Module = moe.block
        return block

    def rebuild(self, moe: MoELayer, call: Call) -> torch.Tensor:
        """Return Σ expert(weight · x) plus the shared expert that the block adds."""
        N, K = call.expert_ids_TK.shape
        inputs = (call.hidden_TH[:, None] * call.weights_TK[..., None]).reshape(N * K, -1)
        single = self.run_experts(moe, inputs, call.expert_ids_TK.reshape(-1)).reshape(N, K, -1)
        shared_NH: torch.Tensor = moe.block.shared_expert(call.hidden_TH)
        return single.double().sum(1) + shared_NH.double()

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Pass each row to its expert and zeros to all others, as the block does."""
        M, H = hidden_MH.shape
        rows = torch.arange(M, device=hidden_MH.device)
        inputs_EMH = hidden_MH.new_zeros(self.num_experts(moe), M, H)
        inputs_EMH[expert_ids_M, rows] = hidden_MH
        outputs: torch.Tensor = moe.outermost(inputs_EMH.reshape(-1, H)).reshape(-1, M, H)
        return outputs[expert_ids_M, rows]

    def logits(self, output: Any) -> Any:
        """Return the second output."""
        return output[1]


FAMILY = Llama4()
