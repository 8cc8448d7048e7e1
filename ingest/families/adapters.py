"""The families whose blocks do not follow the rule of `moewh.ingest.families.rule`: all of them, each with its reason.

A family that is not named here needs no line of code. Keys are the text configuration's model_type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families.rule import Call, Reader, Record, Site, unwrapped
from moewh.ingest.routing import NO_ROUTE


class JetMoe(Reader):
    """The router sorts the (token, slot) pairs by expert; its 5-tuple tells how to put them back.

    Each layer has a second router, in its attention; the MLP's is the layer's routing.
    """

    block_is_container = True

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the MLPs: the block holds its experts' matrices itself."""
        return ((path, module) for path, module in model.named_modules() if path.endswith(".mlp"))

    def not_the_routing(self, site: Site) -> list[str]:
        """The layer's other experts: those of its attention."""
        return [f"{site.path.removesuffix('.mlp')}.self_attention.experts"]

    def num_experts(self, site: Site) -> int:
        """As the router says."""
        return int(unwrapped(_router(site)).num_experts)  # type: ignore[arg-type]

    def attach(self, site: Site, record: Record) -> list[RemovableHandle]:
        """Hook the router."""

        def after(_: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            slots, _, gates, sizes, _ = output
            sizes_E = torch.tensor(sizes, device=slots.device)
            experts = torch.arange(len(sizes), device=slots.device).repeat_interleave(sizes_E, output_size=len(slots))
            ids, weights = torch.empty_like(slots), torch.empty_like(gates)
            ids[slots], weights[slots] = experts, gates
            T = len(args[0])
            record(site, Call(args[0], ids.reshape(T, -1), weights.reshape(T, -1)))

        return [_router(site).register_forward_hook(after)]

    def rebuild(self, site: Site, call: Call) -> torch.Tensor:
        """The block adds its bias."""
        bias_H: torch.Tensor = site.block.bias
        return super().rebuild(site, call) + bias_H.double()

    def run_experts(self, site: Site, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Sort the rows by expert, run the block's two matrices, and sort back."""
        block = site.block
        order = expert_ids_M.argsort()
        sizes = torch.bincount(expert_ids_M, minlength=self.num_experts(site)).tolist()
        gate, up = block.input_linear(hidden_MH[order], sizes).chunk(2, dim=-1)
        output = torch.empty_like(hidden_MH)
        output[order] = block.output_linear(block.activation(gate) * up, sizes)
        return output

    def logits(self, output: Any) -> Any:
        """The fifth output."""
        return output[4]


class Llama4(Reader):
    """Every expert runs on every token, the weight multiplies its input, and nothing is told the indices.

    So the router is read: its scores [T, E] are zero but at the K chosen.
    """

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the experts beside a router."""
        for path, module in model.named_modules():
            if isinstance(getattr(module, "experts", None), nn.Module) and hasattr(module, "router"):
                yield f"{path}.experts", module.experts

    def attach(self, site: Site, record: Record) -> list[RemovableHandle]:
        """Hook the router."""

        def after(router: nn.Module, args: tuple[Any, ...], output: tuple[Any, ...]) -> None:
            scores_TE, logits_TE = output
            # The very topk of the router's forward, so that ties fall the same way.
            ids_TK = torch.topk(logits_TE, unwrapped(router).top_k, dim=1).indices  # type: ignore[arg-type]
            record(site, Call(args[0], ids_TK, scores_TE.gather(1, ids_TK)))

        return [_router(site).register_forward_hook(after)]

    def observed(self, site: Site) -> nn.Module:
        """The block: the container's own output is not summed over experts."""
        block: nn.Module = site.block
        return block

    def rebuild(self, site: Site, call: Call) -> torch.Tensor:
        """Σ expert(weight · x), and the shared expert that the block adds."""
        N, K = call.expert_ids_TK.shape
        inputs = (call.hidden_TH[:, None] * call.weights_TK[..., None]).reshape(N * K, -1)
        single = self.run_experts(site, inputs, call.expert_ids_TK.reshape(-1)).reshape(N, K, -1)
        shared_NH: torch.Tensor = site.block.shared_expert(call.hidden_TH)
        return single.double().sum(1) + shared_NH.double()

    def run_experts(self, site: Site, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Give each row to its expert and zeros to all others, as the block does."""
        M, H = hidden_MH.shape
        rows = torch.arange(M, device=hidden_MH.device)
        inputs_EMH = hidden_MH.new_zeros(self.num_experts(site), M, H)
        inputs_EMH[expert_ids_M, rows] = hidden_MH
        outputs: torch.Tensor = site.outermost(inputs_EMH.reshape(-1, H)).reshape(-1, M, H)
        return outputs[expert_ids_M, rows]

    def logits(self, output: Any) -> Any:
        """The second output."""
        return output[1]


class Doge(Reader):
    """Product keys: an expert is a row of two embeddings, chosen as a pair of half-keys; no container at all.

    Its router views [B * S, 2 √E] as [2, B * S, √E], which mixes the logits of different tokens: what a token
    is routed to depends on the whole batch, so prompts are run one by one.
    """

    block_is_container = True
    shared_experts = 1
    one_context_a_batch = True

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the blocks themselves."""
        return ((path, module) for path, module in model.named_modules() if hasattr(module, "router_gate"))

    def router(self, block: nn.Module) -> nn.Module | None:
        """The linear map to the half-keys' logits."""
        return block.get_submodule("router_gate")

    def attach(self, site: Site, record: Record) -> list[RemovableHandle]:
        """Take the logits from the router, and the indices on their way into the experts' embedding."""
        block = site.block
        seen: dict[str, torch.Tensor] = {}

        def routed(_: nn.Module, args: tuple[Any, ...], logits: torch.Tensor) -> None:
            seen["hidden"] = args[0].reshape(-1, args[0].shape[-1])
            seen["logits"] = logits.reshape(2, len(seen["hidden"]), -1)

        def embedded(_: nn.Module, args: tuple[Any, ...]) -> None:
            ids_TK = args[0]
            first, second = seen.pop("logits")
            scores = first.gather(1, ids_TK // block.num_keys) + second.gather(1, ids_TK % block.num_keys)
            weights_TK = torch.softmax(scores, dim=-1)
            if block.norm_topk_prob:
                weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
            record(site, Call(seen.pop("hidden"), ids_TK, weights_TK))

        return [
            block.router_gate.register_forward_hook(routed),
            block.down_embed.register_forward_pre_hook(embedded),
        ]

    def rebuild(self, site: Site, call: Call) -> torch.Tensor:
        """Σ weight · expert(x), and the dense MLP that the block adds."""
        block = site.block
        x = call.hidden_TH
        shared_NH: torch.Tensor = block.down_proj(block.act_fn(block.gate_proj(x)) * block.up_proj(x))
        return super().rebuild(site, call) + shared_NH.double()

    def run_experts(self, site: Site, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """An expert is one neuron: up · act(down · x)."""
        block = site.block
        scale_M = block.act_fn((block.down_embed(expert_ids_M) * hidden_MH).sum(-1))
        output_MH: torch.Tensor = block.up_embed(expert_ids_M) * scale_M[:, None]
        return output_MH

    def logits(self, output: Any) -> None:
        """There are none: half-keys are no experts."""


class Zaya(Reader):
    """A token that the router lets skip the experts reaches them as expert 0 with weight 0: it has no route."""

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A chosen expert's weight is its probability, which is never 0."""
        ids_TK, weights_TK = super().rows(ids, weights)
        return ids_TK.masked_fill(weights_TK == 0, NO_ROUTE), weights_TK


class SwitchTransformers(Reader):
    """The index is a one-hot mask [T, 1, E] after capacity: an empty row is a dropped token, which has no route.

    Capacity is counted along the padded sequence, so prompts are run one by one.
    """

    one_context_a_batch = True

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Read the mask: K is 1."""
        kept_T1 = ids.sum(-1) > 0
        return ids.argmax(-1).masked_fill(~kept_T1, NO_ROUTE), weights

    def run_experts(self, site: Site, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Give the container a mask."""
        mask_M1E = nn.functional.one_hot(expert_ids_M, self.num_experts(site))[:, None]
        ones = torch.ones(len(hidden_MH), 1, dtype=hidden_MH.dtype, device=hidden_MH.device)
        output_MH: torch.Tensor = site.outermost(hidden_MH, mask_M1E, ones)
        return output_MH

    def logits(self, output: Any) -> Any:
        """The third output."""
        return output[2]


ADAPTERS: dict[str, Reader] = {
    "jetmoe": JetMoe(),
    "llama4_text": Llama4(),
    "doge": Doge(),
    "zaya": Zaya(),
    "switch_transformers": SwitchTransformers(),
}

REFUSED: dict[str, str] = {
    # NllbMoeExperts one-hots a mask that is one-hot already (seen from transformers 5.0 to 5.24).
    "nllb-moe": "transformers computes it wrongly: whatever the router chooses, only experts 0 and 1 run",
}


def reader_for(model_type: str) -> Reader:
    """Return how a family's blocks are read: its adapter, or the rule."""
    return ADAPTERS.get(model_type) or Reader()


def _router(site: Site) -> nn.Module:
    assert site.router is not None
    return site.router
