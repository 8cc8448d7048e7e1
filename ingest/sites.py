"""Where a model's routing happens: the modules whose forward takes (hidden, indices, weights).

Every MoE block in transformers 5 hands its chosen experts and their weights to a container of experts
whose forward names them so; the very tensors it is called with are what moewh records. The rule goes by
these parameter names, never by class names.
"""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from warehouse.errors import MoewhError

INDEX_NAMES = frozenset({"top_k_index", "router_indices", "selected_experts", "router_mask"})
WEIGHT_NAMES = frozenset({"top_k_weights", "routing_weights", "router_probs"})
_ROUTER_NAMES = ("gate", "router")
_TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")


@dataclass(frozen=True)
class Site:
    """One MoE layer: the container of experts that is observed, and the router beside it."""

    layer: int
    path: str
    experts: nn.Module
    router: nn.Module | None
    block: nn.Module
    """The module that holds both."""
    signature: inspect.Signature
    index_name: str
    weight_name: str

    @property
    def num_experts(self) -> int:
        """E: the routed experts of this layer."""
        known = getattr(self.experts, "num_experts", None)
        if isinstance(known, int):
            return known
        raise MoewhError(f"{self.path} ({type(self.experts).__name__}) does not say how many experts it holds.")

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Return (hidden, indices, weights) of a call to the container."""
        bound = self.signature.bind(self.experts, *args, **kwargs).arguments
        hidden = next(value for name, value in bound.items() if name != "self")
        return hidden, bound[self.index_name], bound[self.weight_name]


def find_sites(model: nn.Module, config: Any) -> list[Site]:
    """Return the MoE layers of the model's text stack, in order.

    `config` is the model's configuration. Raises MoewhError if there are none, or if the configuration
    promises routed experts in other layers than those found.
    """
    sites = []
    for path, module in model.named_modules():
        call = _routed_call(module)
        found = re.match(r"(?:.*\.)?(?:layers|blocks|h)\.(\d+)\.", path + ".")
        if call and found:
            parent = model.get_submodule(path.rpartition(".")[0])
            sites.append(Site(int(found[1]), path, module, _router(parent), parent, *call))
    text = config.get_text_config(decoder=True)
    if not sites:
        raise MoewhError(_no_sites(model, text))
    expected, layers = expected_layers(text), [site.layer for site in sites]
    if layers != expected:
        raise MoewhError(
            f"{type(model).__name__}: its configuration has routed experts in layers {expected}, but containers "
            f"were found in layers {layers}. moewh cannot record this model whole, so it does not record it."
        )
    return sites


def top_k(text_config: Any) -> int:
    """Experts per token K, as the text configuration tells."""
    known = (getattr(text_config, name, None) for name in _TOP_K_NAMES)
    return int(next(value for value in known if value is not None))


def expected_layers(text_config: Any) -> list[int]:
    """Layers that hold routed experts, as the text configuration tells."""

    def get(name: str, default: Any) -> Any:
        value = getattr(text_config, name, None)
        return default if value is None else value

    layers = range(text_config.num_hidden_layers)
    kinds = get("mlp_layer_types", None)
    if kinds is not None:
        return [layer for layer in layers if kinds[layer] != "dense"]
    dense = set(get("mlp_only_layers", ())) | set(range(get("first_k_dense_replace", 0)))
    step = get("decoder_sparse_step", 1)
    return [layer for layer in layers if layer not in dense and (layer + 1) % step == 0]


def _routed_call(module: nn.Module) -> tuple[inspect.Signature, str, str] | None:
    """Signature of a container's forward and its index and weight parameters, if the module is one.

    The signature follows decorators through `__wrapped__`.
    """
    signature = inspect.signature(type(module).forward)
    index = next((name for name in signature.parameters if name in INDEX_NAMES), None)
    weight = next((name for name in signature.parameters if name in WEIGHT_NAMES), None)
    return (signature, index, weight) if index and weight else None


def _router(block: nn.Module) -> nn.Module | None:
    children = dict(block.named_children())
    return next((children[name] for name in _ROUTER_NAMES if name in children), None)


def _no_sites(model: nn.Module, text_config: Any) -> str:
    name, kind = type(model).__name__, getattr(text_config, "model_type", "unknown")
    lists = {
        type(module[0]).__name__
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and path.endswith("experts")
    }
    if lists:
        return (
            f"{name} ({kind}) keeps its experts as a list of {', '.join(sorted(lists))}, which moewh cannot observe. "
            "Use a model class that transformers 5 ships."
        )
    return f"{name} ({kind}) has no routed experts: it is a dense model. Give a Mixture-of-Experts model."
