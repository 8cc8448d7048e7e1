"""JetMoe: the block holds the experts' matrices itself and calls them on rows sorted by expert."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families.layouts import Parts, Tensors
from moewh.ingest.families.rule import Call, FamilyAdapter, MoELayer, Record, router_of, unwrapped


class JetMoe(FamilyAdapter):
    """The router sorts the (token, slot) pairs by expert; its 5-tuple holds the order to undo it.

    Each layer has a second router, in its attention; the MLP's is the layer's routing.
    """

    block_is_container = True

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the MLPs: the block holds its experts' matrices itself."""
        return ((path, module) for path, module in model.named_modules() if path.endswith(".mlp"))

    def unrouted_experts(self, moe: MoELayer) -> list[str]:
        """Return the path of the layer's other experts, those of its attention."""
        return [f"{moe.path.removesuffix('.mlp')}.self_attention.experts"]

    def num_experts(self, moe: MoELayer) -> int:
        """Return the router's number of experts."""
        return int(unwrapped(router_of(moe)).num_experts)  # type: ignore[arg-type]

    def attach(self, moe: MoELayer, record: Record) -> list[RemovableHandle]:
        """Hook the router."""

        def after(_: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            slots, _, gates, sizes, _ = output
            sizes_E = torch.tensor(sizes, device=slots.device)
            experts = torch.arange(len(sizes), device=slots.device).repeat_interleave(sizes_E, output_size=len(slots))
            ids, weights = torch.empty_like(slots), torch.empty_like(gates)
            ids[slots], weights[slots] = experts, gates
            T = len(args[0])
            record(moe, Call(args[0], ids.reshape(T, -1), weights.reshape(T, -1)))

        return [router_of(moe).register_forward_hook(after)]

    def rebuild(self, moe: MoELayer, call: Call) -> torch.Tensor:
        """Return Σ weight · expert(x) plus the block's bias."""
        bias_H: torch.Tensor = moe.block.bias
        return super().rebuild(moe, call) + bias_H.double()

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Sort the rows by expert, run the block's two matrices, and sort back."""
        block = moe.block
        order = expert_ids_M.argsort()
        sizes = torch.bincount(expert_ids_M, minlength=self.num_experts(moe)).tolist()
        gate, up = block.input_linear(hidden_MH[order], sizes).chunk(2, dim=-1)
        output = torch.empty_like(hidden_MH)
        output[order] = block.output_linear(block.activation(gate) * up, sizes)
        return output

    def logits(self, output: Any) -> Any:
        """Return the fifth output."""
        return output[4]

    def split_experts(self, moe: MoELayer, tensors: Tensors) -> Parts | None:
        """Split the two modules of matrices, [E, 2I, H] and [E, H, I]."""
        del moe
        if set(tensors) != {"input_linear.weight", "output_linear.weight"}:
            return None
        gate, up = tensors["input_linear.weight"].chunk(2, dim=1)
        down = tensors["output_linear.weight"]
        return (list(gate), list(up), list(down)) if up.shape[1:] == down.shape[:0:-1] else None


FAMILY = JetMoe()
