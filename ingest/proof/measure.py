"""Measure a layer on the few tokens that the guard keeps: columns of `layers` that no configuration states.

These are the function from the router's logits to weights, whether the weights are renormalised, and the factor applied
to the routed sum afterwards. Each is measured, and None where it cannot be. `declared_facts` takes the place of the
measurement where a model is not run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from moewh.ingest.families.configuration import shared_count, text_config
from moewh.ingest.families.rule import Call, MoELayer, unwrapped
from moewh.ingest.model.expected import top_k
from moewh.ingest.proof.rebuild import TOLERANCE, Observation
from moewh.ingest.routing import NO_ROUTE

_SCORING = {
    "softmax": torch.exp,
    "sigmoid": torch.sigmoid,
    "sqrtsoftplus": lambda logits: torch.nn.functional.softplus(logits).sqrt(),
}
"""Each up to a factor common to all experts of a token."""

_SHARED = re.compile(r"(?:^|[._])shared?_(?:expert|mlp)")
_BIAS_NAMES = ("e_score_correction_bias", "expert_bias")
_SCALE_NAMES = (
    "routed_scaling_factor",
    "moe_routed_scaling_factor",
    "moe_router_scaling_factor",
    "num_experts_per_tok",
)


@dataclass(frozen=True)
class LayerFacts:
    """The properties of a layer, measured or declared: see the columns of the table `layers`."""

    top_k: int
    scoring: str | None
    renormalized: bool | None
    post_scale: float | None
    num_shared_experts: int
    router_input: str | None
    selection_bias: tuple[float, ...] | None
    """Per expert, added to its score for the choice only; None if no such bias explains the choice."""


def measure_layers(moe_layers: list[MoELayer], seen: dict[int, Observation], config: Any) -> dict[int, LayerFacts]:
    """Return the measured facts of each layer."""
    return {moe.layer: _measure(moe, seen[moe.layer], config) for moe in moe_layers}


def declared_facts(moe: MoELayer, config: Any) -> LayerFacts:
    """Return what is known of a layer without running it; what only a forward pass can show is None."""
    scoring, renormalized = moe.family.declared(moe, config)
    return LayerFacts(
        top_k=top_k(config),
        scoring=scoring,
        renormalized=renormalized,
        post_scale=None,
        num_shared_experts=shared_experts(moe, config),
        router_input=None,
        selection_bias=None,
    )


def _measure(moe: MoELayer, seen: Observation, config: Any) -> LayerFacts:
    call = seen.call
    assert call is not None
    scoring, renormalized = _measure_scoring(call, seen)
    if scoring is None or not moe.family.measurable:
        scoring, stated = moe.family.declared(moe, config)
        sums_differ = renormalized is False and moe.family.measurable
        renormalized = renormalized if stated is None or sums_differ else stated
    router_input = None
    if seen.router_input_NH is not None:
        same = torch.equal(seen.router_input_NH, call.hidden_TH) and not seen.router_state
        router_input = "experts" if same else "own"
    return LayerFacts(
        top_k=call.expert_ids_TK.shape[-1],
        scoring=scoring,
        renormalized=renormalized,
        post_scale=_measure_post_scale(seen, config),
        num_shared_experts=shared_experts(moe, config),
        router_input=router_input,
        selection_bias=_measure_selection_bias(moe, seen, scoring, config),
    )


def _measure_scoring(call: Call, seen: Observation) -> tuple[str | None, bool | None]:
    """Find the function whose values at the router's logits are proportional to the weights, for each token."""
    usable_N = call.weights_TK.isfinite().all(-1) & (call.expert_ids_TK != NO_ROUTE).all(-1)
    weights_NK, expert_ids_NK = call.weights_TK[usable_N].double(), call.expert_ids_TK[usable_N].long()
    sums_N = weights_NK.sum(-1)
    tolerance = 10 * TOLERANCE.get(call.weights_TK.dtype, 1e-2)
    N, K = weights_NK.shape
    if N < 2:
        return None, None
    renormalized = bool(((sums_N / sums_N.mean() - 1).abs() <= max(1e-3, tolerance / 10)).all())
    logits_NE = seen.router_logits_NE
    if logits_NE is None or int(expert_ids_NK.max()) >= logits_NE.shape[1]:
        return None, renormalized
    tolerance = max(tolerance, 10 * TOLERANCE.get(logits_NE.dtype, 1e-2))
    logits_NE = logits_NE[usable_N].double()
    fitting = [name for name in _SCORING if _spread(name, logits_NE, expert_ids_NK, weights_NK) <= tolerance]
    # Logits that hardly differ, or a single weight that is always the same, fit several functions.
    return (fitting[0] if len(fitting) == 1 and not (K == 1 and renormalized) else None), renormalized


def _spread(name: str, logits_NE: torch.Tensor, expert_ids_NK: torch.Tensor, weights_NK: torch.Tensor) -> float:
    """Return the largest relative deviation from proportionality, per token, or over all tokens if K is 1."""
    shifted_NE = logits_NE - logits_NE.max(-1, keepdim=True).values if name == "softmax" else logits_NE
    scores_NE = _SCORING[name](shifted_NE)
    if weights_NK.shape[1] == 1 and name == "softmax":
        scores_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
    ratios_NK = weights_NK / scores_NE.gather(1, expert_ids_NK)
    mean = ratios_NK.mean() if weights_NK.shape[1] == 1 else ratios_NK.mean(-1, keepdim=True)
    return float((ratios_NK / mean - 1).abs().max())


def _measure_selection_bias(
    moe: MoELayer, seen: Observation, scoring: str | None, config: Any
) -> tuple[float, ...] | None:
    """Return the bias for which the chosen experts have the K greatest score + bias; zeros if none is needed.

    Scores are softmax or sigmoid of the logits. For a family that first chooses groups of experts, this is checked
    within the groups that a token chose from.
    """
    call, logits_NE = seen.call, seen.router_logits_NE
    E = moe.num_experts
    if call is None or logits_NE is None or logits_NE.shape[1] != E or scoring not in ("softmax", "sigmoid"):
        return None
    logits_NE = logits_NE.double()
    scores_NE = logits_NE.softmax(-1) if scoring == "softmax" else logits_NE.sigmoid()
    bias_E = _correction_bias(moe, E)
    selection_NE = scores_NE + bias_E.to(scores_NE)
    usable_N = (call.expert_ids_TK != NO_ROUTE).all(-1) & selection_NE.isfinite().all(-1)
    selection_NE, expert_ids_NK = selection_NE[usable_N], call.expert_ids_TK[usable_N].long()
    chosen_NE = torch.zeros_like(selection_NE, dtype=torch.bool).scatter_(1, expert_ids_NK, True)
    groups = int(getattr(text_config(config), "n_group", None) or 1)
    of_chosen_group_NE = chosen_NE.unflatten(1, (groups, -1)).any(-1, keepdim=True).expand(-1, -1, E // groups)
    rivals_NE = of_chosen_group_NE.flatten(1) & ~chosen_NE
    least_N = selection_NE.masked_fill(~chosen_NE, torch.inf).min(-1).values
    greatest_N = selection_NE.masked_fill(~rivals_NE, -torch.inf).max(-1).values
    explained = bool((greatest_N <= least_N + TOLERANCE.get(call.weights_TK.dtype, 1e-2)).all())
    return tuple(bias_E.tolist()) if explained else None


def _correction_bias(moe: MoELayer, num_experts: int) -> torch.Tensor:
    """Return the correction bias [E] of the router or its block, else zeros."""
    for module in (None if moe.router is None else unwrapped(moe.router), moe.block):
        for name in _BIAS_NAMES:
            bias = getattr(module, name, None)
            if isinstance(bias, torch.Tensor) and bias.numel() == num_experts and not bias.is_meta:
                return bias.detach().flatten().float()
    return torch.zeros(num_experts)


def _measure_post_scale(seen: Observation, config: Any) -> float:
    """Solve block output = a · routed + Σ b_j · part_j for a, for each token.

    If no such sum explains the output (a norm or projection follows, or the block is the whole layer), the factor is 1.
    A factor that the configuration states is taken from there, free of rounding.
    """
    routed_NH, block_NH = seen.output_NH, seen.block_output_NH
    if routed_NH is None or block_NH is None or block_NH.shape != routed_NH.shape:
        return 1.0
    parts = [
        part.double().cpu()
        for part in (routed_NH, *seen.other_outputs)
        if part is not None and part.shape == block_NH.shape
    ]
    basis_NHJ, target_NH1 = torch.stack(parts, dim=-1), block_NH.double().cpu()[..., None]
    usable_N = target_NH1.isfinite().all(1)[:, 0] & (basis_NHJ[:, :, 0].norm(dim=1) > 0)
    basis_NHJ, target_NH1 = basis_NHJ[usable_N], target_NH1[usable_N]
    if not len(target_NH1):
        return 1.0
    factors_NJ1 = torch.linalg.lstsq(basis_NHJ, target_NH1).solution
    rest_N = (basis_NHJ @ factors_NJ1 - target_NH1).norm(dim=(1, 2)) / target_NH1.norm(dim=(1, 2))
    factor_N = factors_NJ1[:, 0, 0]
    tolerance = 10 * TOLERANCE.get(routed_NH.dtype, 1e-2)
    measured = float(factor_N.mean())
    if rest_N.max() > tolerance or (factor_N - measured).abs().max() > tolerance * abs(measured):
        return 1.0
    stated = [1.0, 0.5, *(float(getattr(text_config(config), name, None) or 1.0) for name in _SCALE_NAMES)]
    nearest = min(stated, key=lambda value: abs(value - measured))
    return nearest if abs(nearest - measured) <= tolerance * abs(measured) else measured


def shared_experts(moe: MoELayer, config: Any) -> int:
    """Count a layer's shared experts: the configuration's number, if the layer holds a module of them."""
    named = any(
        _SHARED.search(name) and any(True for _ in part.parameters()) for name, part in moe.whole_layer.named_modules()
    )
    return shared_count(config) if named else moe.family.shared_experts
