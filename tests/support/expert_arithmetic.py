"""What one expert computes for one token, from its own matrices: written out again, without the model's forward.

Each function takes the module that holds the experts, an expert's index and its input, and returns its output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import relu, silu


def _clamped(experts: Any, gate_I: torch.Tensor, up_I: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    limit = getattr(experts, "limit", None) or getattr(experts, "swiglu_limit", None) or float("inf")
    return gate_I.clamp(max=limit), up_I.clamp(-limit, limit)


def _alpha_gate(experts: Any, gate_I: torch.Tensor, up_I: torch.Tensor) -> torch.Tensor:
    alpha = getattr(experts, "alpha", None) or experts.swiglu_alpha
    gate_I, up_I = _clamped(experts, gate_I, up_I)
    return (up_I + 1) * gate_I * torch.sigmoid(alpha * gate_I)


def swiglu(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """down(act(gate · x) * (up · x)), gate above up in one matrix."""
    gate_I, up_I = _clamped(experts, *(experts.gate_up_proj[expert] @ x_H).chunk(2))
    return experts.down_proj[expert] @ (getattr(experts, "act_fn", silu)(gate_I) * up_I)


def swiglu_transposed(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """The same with the matrices stored as (in, out)."""
    gate_I, up_I = (x_H @ experts.gate_up_proj[expert]).chunk(2)
    return (experts.act_fn(gate_I) * up_I) @ experts.down_proj[expert]


def swiglu_alpha(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """down((up + 1) * gate * sigmoid(alpha * gate))."""
    return experts.down_proj[expert] @ _alpha_gate(experts, *(experts.gate_up_proj[expert] @ x_H).chunk(2))


def swiglu_concatenated(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """The same with biases, stored as (in, out)."""
    gate_I, up_I = (x_H @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]).chunk(2)
    return _alpha_gate(experts, gate_I, up_I) @ experts.down_proj[expert] + experts.down_proj_bias[expert]


def swiglu_interleaved(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """The same with gate and up in turns."""
    both_2I = x_H @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
    hidden_I = _alpha_gate(experts, both_2I[::2], both_2I[1::2])
    return hidden_I @ experts.down_proj[expert] + experts.down_proj_bias[expert]


def softcapped(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """down(cap(gate) * sigmoid(gate) * cap(up)), cap(z) = c · tanh(z / c)."""
    gate_I, up_I = (experts.gate_up_proj[expert] @ x_H).chunk(2)
    gate_cap, up_cap = experts.act_fn.gate_softcap.softcap, experts.act_fn.up_softcap.softcap
    hidden_I = gate_cap * torch.tanh(gate_I / gate_cap) * torch.sigmoid(gate_I) * up_cap * torch.tanh(up_I / up_cap)
    return experts.down_proj[expert] @ hidden_I


def or_identity(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """Experts past the matrices return their input."""
    return swiglu(experts, expert, x_H) if expert < len(experts.down_proj) else x_H


def normed(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """With a norm after each expert."""
    return experts.post_expert_norm(swiglu(experts, expert, x_H))


def ungated(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """down(act(up · x))."""
    return experts.down_proj[expert] @ experts.act_fn(experts.up_proj[expert] @ x_H)


def dbrx(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """Three matrices of all experts' neurons, one expert after the other."""
    size = experts.ffn_hidden_size
    w1, v1, w2 = (
        matrix[expert * size : (expert + 1) * size] for matrix in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2)
    )
    return (silu(w1 @ x_H) * (v1 @ x_H)) @ w2


def dense(experts: Any, expert: int, x_H: torch.Tensor) -> Any:
    """wo(relu(wi · x)), each expert a module."""
    module = experts[f"expert_{expert}"]
    return module.wo.weight @ relu(module.wi.weight @ x_H)


def neuron(block: Any, expert: int, x_H: torch.Tensor) -> Any:
    """up · act(down · x), two vectors."""
    return block.up_embed.weight[expert] * block.act_fn(block.down_embed.weight[expert] @ x_H)


def jetmoe(block: Any, expert: int, x_H: torch.Tensor) -> Any:
    """As swiglu, in two modules of matrices."""
    gate_I, up_I = (block.input_linear.weight[expert] @ x_H).chunk(2)
    return block.output_linear.weight[expert] @ (block.activation(gate_I) * up_I)
