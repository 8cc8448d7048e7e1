"""The weights of a layer's router and experts in one form, whatever the family's own layout.

In: a `MoELayer` (on the meta device, or filled by `geometry.checkpoint`). Out: `LayerWeights`, views of the same data.
The layout is recognised by the names and shapes of the container's parameters, and the family splits them; a container
that does not match a known layout exactly is refused.

Shapes: E experts with weights, H the length of their input, I of their inner layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moewh.ingest.families.layouts import Tensors
from moewh.ingest.families.rule import MoELayer
from moewh.warehouse.errors import MoewhError

_ROUTER_ROWS = ("weight", "proj.weight", "gate.weight", "wg.weight", "layer.weight", "classifier.weight")
"""Routers' names for the matrix whose rows, multiplied with the input, give the logits."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer's matrices, without biases: one of each kind per expert that has weights, and the router's rows."""

    gate: list[torch.Tensor] | None
    """[I, H] each; None for experts without a gate."""
    up: list[torch.Tensor]
    """[I, H] each."""
    down: list[torch.Tensor]
    """[H, I] each."""
    router_EH: torch.Tensor | None
    """A row per expert, identity experts included; None for a router whose logits are not products with rows."""

    @property
    def hidden_size(self) -> int:
        """H, the size of an expert's input and output."""
        return self.up[0].shape[1]

    @property
    def input_parts(self) -> list[list[torch.Tensor]]:
        """The matrices applied to an expert's input, by kind: gate and up, or only up."""
        return [self.up] if self.gate is None else [self.gate, self.up]

    @property
    def largest_rank(self) -> int:
        """The largest dimension that both of an expert's subspaces can have."""
        inner, hidden = self.up[0].shape
        return min(inner, hidden)

    def input(self, expert: int) -> torch.Tensor:
        """Return the matrices applied to an expert's input, stacked: [gate; up] [2I, H]; without a gate, up [I, H]."""
        return torch.cat([part[expert] for part in self.input_parts])


def layer_weights(moe: MoELayer) -> LayerWeights:
    """Return a layer's weights in one form. Raises MoewhError for a container that is not of a known layout."""
    tensors = _matrices(moe)
    parts = moe.family.split_experts(moe, tensors)
    if parts is None:
        raise _unknown(moe, tensors)
    gate, up, down = parts
    count = moe.kinds.count("mlp")
    if min(len(up), len(down)) < count:
        raise _unknown(moe, tensors)
    return LayerWeights(None if gate is None else gate[:count], up[:count], down[:count], router_rows(moe))


def router_rows(moe: MoELayer) -> torch.Tensor | None:
    """Return the router's row for each expert [E, …]; None for an MLP or for half-keys.

    A router that also scores shared experts has their rows after those of the routed ones.
    """
    parameters = dict(moe.router.named_parameters()) if moe.router is not None else {}
    rows = next((parameters[name] for name in _ROUTER_ROWS if name in parameters), None)
    if rows is None or rows.dim() != 2 or len(rows) < moe.num_experts:
        return None
    return rows[: moe.num_experts].detach()


def _matrices(moe: MoELayer) -> Tensors:
    """Return the container's parameters by name, except biases, norms, and a router's that the container holds."""
    routers = set() if moe.router is None else {id(parameter) for parameter in moe.router.parameters()}
    return {
        name: parameter.detach()
        for name, parameter in moe.experts.named_parameters()
        if parameter.dim() > 1 and not name.endswith("bias") and id(parameter) not in routers
    }


def _unknown(moe: MoELayer, tensors: Tensors) -> MoewhError:
    shown = ", ".join(f"{name} {' x '.join(map(str, tensor.shape))}" for name, tensor in list(tensors.items())[:4])
    return MoewhError(
        f"{moe.path} ({type(moe.experts).__name__}) keeps its experts' weights in a layout that `moewh geometry` "
        f"does not know: {shown or 'no matrices'}. Its routing can be recorded and queried all the same."
    )
