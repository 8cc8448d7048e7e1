"""One MoE layer of a model, and how its calls are read: the one rule that fits almost every family.

Every MoE block in transformers 5 hands its chosen experts and their weights to a container of experts
whose forward names them so; the very tensors it is called with are what moewh records. The rule goes by
these parameter names, never by class names. `moewh.ingest.families.adapters` holds the few families that differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.model.expected import Stack
from moewh.ingest.routing import NO_ROUTE
from moewh.warehouse.errors import MoewhError

INDEX_NAMES = frozenset({"top_k_index", "router_indices", "selected_experts", "router_mask"})
WEIGHT_NAMES = frozenset({"top_k_weights", "routing_weights", "router_probs"})
_ROUTER_NAMES = ("gate", "router")
_COUNT_NAMES = ("total_experts", "num_experts", "num_local_experts")


class Call(NamedTuple):
    """What a block's experts were called with, one row per token of the batch, padding included."""

    hidden_TH: torch.Tensor
    expert_ids_TK: torch.Tensor
    weights_TK: torch.Tensor


Record = Callable[["Site", Call], None]


@dataclass(frozen=True)
class Site:
    """One MoE layer: where it is, and how its calls are read."""

    layer: int
    stack: Stack
    path: str
    experts: nn.Module
    """The container of experts: what the model has at `path`, without an adapter's wrappers."""
    outermost: nn.Module
    """What the block calls: the outermost of an adapter's wrappers around the container, or the container itself."""
    router: nn.Module | None
    """As the block calls it: with an adapter's wrappers."""
    block: Any
    """The module that holds both."""
    whole_layer: nn.Module
    """The transformer layer that the block is part of."""
    reader: Reader
    visit: int = 0
    """Which of the block's calls in a forward pass is this layer's, from 0."""
    visits: int = 1
    """Calls of the block in a forward pass: more than one where a model loops over its layers."""

    @property
    def num_experts(self) -> int:
        """E: the routed experts of this layer, identity experts included."""
        return self.reader.num_experts(self)

    @property
    def kinds(self) -> list[str]:
        """What each of the E experts is: mlp or identity."""
        identity = int(getattr(self.experts, "zero_expert_num", None) or 0)
        return ["mlp"] * (self.num_experts - identity) + ["identity"] * identity


class Reader:
    """How the calls of a block are read; this class is the rule, its subclasses are the adapters."""

    block_is_container = False
    """True where the block holds the experts' matrices itself, without a container."""
    shared_experts = 0
    """Experts that every token passes, where no module is named after them."""
    one_context_a_batch = False
    """True where a token's routing depends on the rest of its batch, so that prompts must not share one."""

    def find(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield every container of routed experts: its path and the module."""
        for path, module in model.named_modules():
            if routed_call(module):
                yield path, module

    def not_the_routing(self, site: Site) -> list[str]:
        """Paths of what looks like experts in a site's layer and is known to be no part of its routing."""
        del site
        return []

    def router(self, block: nn.Module) -> nn.Module | None:
        """The module of a block that makes the choice."""
        return next(
            (getattr(block, name) for name in _ROUTER_NAMES if isinstance(getattr(block, name, None), nn.Module)), None
        )

    def num_experts(self, site: Site) -> int:
        """E: the routed experts that a block's indices count."""
        for name in _COUNT_NAMES:
            if isinstance(known := getattr(site.experts, name, None), int):
                return known
        raise MoewhError(f"{site.path} ({type(site.experts).__name__}) does not say how many experts it holds.")

    def attach(self, site: Site, record: Record) -> list[RemovableHandle]:
        """Hook the block so that `record` is told of each call; return the hooks."""

        parameters = routed_call(site.experts)
        assert parameters is not None

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden, ids, weights = _read(site, parameters, args, kwargs)
            record(site, Call(hidden, *self.rows(ids, weights)))

        return [site.experts.register_forward_pre_hook(before, with_kwargs=True)]

    def rows(self, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Turn what the container is called with into indices and weights [T, K]; NO_ROUTE where there is none."""
        return ids.reshape(-1, ids.shape[-1]), weights.reshape(-1, weights.shape[-1])

    def observed(self, site: Site) -> nn.Module:
        """The module whose output `rebuild` gives again."""
        return site.outermost

    def run_experts(self, site: Site, hidden_MH: torch.Tensor, expert_ids_M: torch.Tensor) -> torch.Tensor:
        """Run one expert on each of M rows, with weight one, through the container as the block calls it.

        In two slots, the second with weight 0: some containers cannot take a single one.
        """
        ids_M2 = expert_ids_M[:, None].expand(-1, 2)
        weights_M2 = hidden_MH.new_tensor([1.0, 0.0]).expand(len(hidden_MH), 2)
        output_MH: torch.Tensor = site.outermost(hidden_MH, ids_M2, weights_M2)
        return output_MH

    def rebuild(self, site: Site, call: Call) -> torch.Tensor:
        """Return Σ weight · expert(x) for each of N rows, in float64: what `observed` should have put out."""
        N, K = call.expert_ids_TK.shape
        repeated = call.hidden_TH.repeat_interleave(K, dim=0)
        single = self.run_experts(site, repeated, call.expert_ids_TK.clamp_min(0).reshape(-1))
        weights_NK = call.weights_TK.double() * (call.expert_ids_TK != NO_ROUTE)
        return (single.reshape(N, K, -1).double() * weights_NK[..., None]).sum(1)

    def logits(self, output: Any) -> Any:
        """The router's logits among what its forward returns."""
        return output[0] if isinstance(output, tuple) else output


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of an adapter's wrappers, whose attributes are the model's; any other module itself."""
    while True:
        copies = getattr(module, "modules_to_save", None)
        inner = (
            next(iter(copies.values())) if isinstance(copies, nn.ModuleDict) else getattr(module, "base_layer", None)
        )
        if not isinstance(inner, nn.Module):
            return module
        module = inner


@dataclass(frozen=True)
class _Parameters:
    signature: inspect.Signature
    index_name: str
    weight_name: str


def _read(site: Site, parameters: _Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What a container is called with. Raises MoewhError for a call that its class's forward does not take."""
    try:
        given = parameters.signature.bind(site.experts, *args, **kwargs).arguments
    except TypeError as error:
        raise MoewhError(
            f"{site.path} was called with other arguments than the forward of {type(site.experts).__name__} takes "
            f"({error}): something replaces it. It is not recorded."
        ) from error
    tensors = [value for name, value in given.items() if name != "self"][:1]
    tensors += [given.get(name) for name in (parameters.index_name, parameters.weight_name)]
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        raise MoewhError(
            f"{site.path} ({type(site.experts).__name__}) was called without a tensor of {parameters.index_name} or "
            f"{parameters.weight_name}. It is not recorded."
        )
    return Call(*tensors)


def routed_call(module: nn.Module) -> _Parameters | None:
    """A container's forward: its signature, index and weight parameters; None for any other module.

    The signature follows decorators through `__wrapped__`.
    """
    signature = inspect.signature(type(module).forward)
    index = next((name for name in signature.parameters if name in INDEX_NAMES), None)
    weight = next((name for name in signature.parameters if name in WEIGHT_NAMES), None)
    return _Parameters(signature, index, weight) if index and weight else None
