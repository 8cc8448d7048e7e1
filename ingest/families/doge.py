"""Doge: product keys instead of a container of experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families.rule import Call, FamilyAdapter, MoELayer, Record, is_measuring


class Doge(FamilyAdapter):
    """Product keys: an expert is a row of two embeddings, chosen as a pair of half-keys, without a container.

    Its router views [B * S, 2 √E] as [2, B * S, √E], which mixes the logits of different tokens: a token's routing
    depends on the whole batch, so prompts are run one by one.
    """

    block_is_container = True
    shared_experts = 1
    one_context_per_batch = True

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the blocks themselves."""
        return ((path, module) for path, module in model.named_modules() if hasattr(module, "router_gate"))

    def router(self, block: nn.Module) -> nn.Module | None:
        """Return the linear map to the half-keys' logits."""
        return block.get_submodule("router_gate")

    def attach(self, moe: MoELayer, record: Record) -> list[RemovableHandle]:
        """Read the logits from the router, and the indices as they enter the experts' embedding."""
        block = moe.block
        seen: dict[str, torch.Tensor] = {}

        def routed(_: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> None:
            seen["hidden"] = args[0].reshape(-1, args[0].shape[-1])
            seen["logits"] = logits.reshape(2, len(seen["hidden"]), -1)

        def embedded(_: nn.Module, args: tuple[Any, ...]) -> None:
            if is_measuring():
                return
            ids_TK = args[0]
            first, second = seen.pop("logits")
            scores = first.gather(1, ids_TK // block.num_keys) + second.gather(1, ids_TK % block.num_keys)
            weights_TK = torch.softmax(scores, dim=-1)
            if block.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            record(moe, Call(seen.pop("hidden"), ids_TK, weights_TK))

        return [
            block.router_gate.register_forward_hook(routed),
            block.down_embed.register_forward_pre_hook(embedded),
        ]

    def rebuild(self, moe: MoELayer, call: Call) -> torch.Tensor:
        """Return Σ weight · expert(x) plus the dense MLP that the block adds."""
        block = moe.block
        x = call.hidden_TH
        shared_NH: torch.Tensor = block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))
        return super().rebuild(moe, call) + shared_NH.double()

    def run_experts(self, moe: MoELayer, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Run an expert, which is one neuron: up · act(down · x)."""
        block = moe.block
        scale_M = block.act_fn((block.down_embed(expert_ids_M) * hidden_MH).sum(-1))
        output_MH: torch.Tensor = block.up_embed(expert_ids_M) * scale_M[:, None]
        return output_MH

    def logits(self, output: Any) -> None:
        """Return no logits: half-keys are not experts."""


FAMILY = Doge()
