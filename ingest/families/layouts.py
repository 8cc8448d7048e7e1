"""The two layouts of the rule in which a container of experts keeps its matrices.

In: the container and its parameters by name. Out: a matrix of each kind per expert; None for an unknown layout.

Shapes: E experts with weights, H input size, I inner size.
"""

from __future__ import annotations

import torch
from torch import nn

Tensors = dict[str, torch.Tensor]
Experts = list[torch.Tensor]
Parts = tuple[Experts | None, Experts, Experts]
"""Per expert: gate [I, H] (None for experts without one), up [I, H] and down [H, I]."""


def split(experts: nn.Module, tensors: Tensors) -> Parts | None:
    """Split the layout that the names belong to."""
    if set(tensors) == {"gate_up_proj", "down_proj"}:
        return _fused(experts, tensors["gate_up_proj"], tensors["down_proj"])
    if set(tensors) == {"up_proj", "down_proj"}:
        return _ungated(experts, tensors["up_proj"], tensors["down_proj"])
    return None


def _fused(experts: nn.Module, both: torch.Tensor, down: torch.Tensor) -> Parts | None:
    """Split gate_up_proj [E, 2I, H] and down_proj [E, H, I], or both transposed; gate first, or interleaved with up."""
    straight = both.shape[1:] == (2 * down.shape[2], down.shape[1])
    if not straight:
        both, down = both.transpose(1, 2), down.transpose(1, 2)
        if both.shape[1:] != (2 * down.shape[2], down.shape[1]):
            return None
    if bool(getattr(experts, "is_transposed", not straight)) is straight:
        return None
    if getattr(experts, "is_concatenated", True):
        gate, up = both.chunk(2, dim=1)
    else:
        gate, up = both[:, 0::2], both[:, 1::2]
    return list(gate), list(up), list(down)


def _ungated(experts: nn.Module, up: torch.Tensor, down: torch.Tensor) -> Parts | None:
    """Split up_proj [E, I, H] and down_proj [E, H, I]."""
    if up.shape[1:] != down.shape[:0:-1] or getattr(experts, "is_transposed", False):
        return None
    return None, list(up), list(down)
