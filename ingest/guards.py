"""Guards: before anything is written, prove on real tokens that what was captured is what the model does.

For a few tokens of the first batch, every layer's output is rebuilt as Σ weight · expert(x) from the
captured rows. The same pass measures what no configuration states in one way: which function turns the
router's logits into weights, and whether they are renormalised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from ingest.sites import Site
from warehouse.errors import MoewhError

CHECKED_TOKENS = 4
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest relative L2 error of a rebuilt row; rows of right captures measured 9e-7, 6e-4 and 4e-3."""
_SCORING = {"softmax": torch.exp, "sigmoid": torch.sigmoid}


@dataclass(frozen=True)
class LayerFacts:
    """What a layer was seen to do: see the columns of the table `layers`."""

    top_k: int
    scoring: str | None
    renormalized: bool | None
    router_input: str | None


@dataclass
class _Call:
    """One container's call and its router's, reduced to the rows that are checked (N of them)."""

    hidden_NH: torch.Tensor
    expert_ids_NK: torch.Tensor
    weights_NK: torch.Tensor
    output_NH: torch.Tensor | None = None
    router_input_NH: torch.Tensor | None = None
    router_logits_NE: torch.Tensor | None = None


@contextmanager
def observe_calls(sites: Sequence[Site], attention_mask_BS: torch.Tensor) -> Iterator[dict[int, _Call]]:
    """Keep, for one forward pass, inputs and outputs of every container and router for a few real tokens."""
    rows = attention_mask_BS.flatten().nonzero().flatten()
    rows = rows[torch.linspace(0, len(rows) - 1, min(CHECKED_TOKENS, len(rows))).long()]
    calls: dict[int, _Call] = {}
    routers: dict[int, tuple[torch.Tensor | None, torch.Tensor | None]] = {}

    def few(tensor: Any) -> torch.Tensor | None:
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2:
            return None
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        return flat[rows.to(flat.device)].clone() if len(flat) == attention_mask_BS.numel() else None

    def before(site: Site, args: Any, kwargs: Any) -> None:
        parts = [few(tensor) for tensor in site.bind(args, kwargs)]
        if any(part is None for part in parts):
            raise MoewhError(f"{site.path} was not called with one row per token. moewh cannot record this model.")
        calls[site.layer] = _Call(*(part for part in parts if part is not None))

    def after(site: Site, output: Any) -> None:
        calls[site.layer].output_NH = few(output)

    def router(site: Site, args: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        routers[site.layer] = (few(args[0]) if args else None, few(first))

    handles = []
    for site in sites:
        first = partial(lambda site, _, args, kwargs: before(site, args, kwargs), site)
        handles.append(site.experts.register_forward_pre_hook(first, with_kwargs=True))
        handles.append(site.experts.register_forward_hook(partial(lambda site, *call: after(site, call[-1]), site)))
        if site.router is not None:
            chosen = partial(lambda site, _, args, output: router(site, args, output), site)
            handles.append(site.router.register_forward_hook(chosen))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()
    for layer, (router_input, logits) in routers.items():
        calls[layer].router_input_NH, calls[layer].router_logits_NE = router_input, logits


def verify_layers(sites: Sequence[Site], calls: dict[int, _Call]) -> dict[int, LayerFacts]:
    """Check every layer's rebuilt output and return what was measured.

    Raises MoewhError naming the module and the error if a layer's output is not Σ weight · expert(x).
    """
    return {site.layer: _verify(site, calls[site.layer]) for site in sites}


def _verify(site: Site, call: _Call) -> LayerFacts:
    error = rebuild_error(site.experts, call.hidden_NH, call.expert_ids_NK, call.weights_NK, call.output_NH)
    tolerance = TOLERANCE.get(call.hidden_NH.dtype, TOLERANCE[torch.bfloat16])
    if not error <= tolerance:
        raise MoewhError(
            f"{site.path} ({type(site.experts).__name__}): its output is not the sum of weight times expert over "
            f"the captured rows (relative error {error:.2g}, allowed {tolerance:.2g}). It is not recorded."
        )
    scoring, renormalized = _measure_scoring(call)
    same = call.router_input_NH is not None and torch.equal(call.router_input_NH, call.hidden_NH)
    return LayerFacts(
        top_k=call.expert_ids_NK.shape[-1],
        scoring=scoring,
        renormalized=renormalized,
        router_input=None if call.router_input_NH is None else "experts" if same else "own",
    )


def rebuild_error(
    experts: nn.Module,
    hidden_NH: torch.Tensor,
    expert_ids_NK: torch.Tensor,
    weights_NK: torch.Tensor,
    output_NH: torch.Tensor | None,
) -> float:
    """Return the largest relative L2 error over N rows of Σ_k weight_k · expert_k(x) against the real output.

    Each expert is run alone, with weight one, through the container itself. Rows whose output is no finite
    number prove nothing and are left out; infinity if no row is left.
    """
    finite_N = torch.zeros(len(hidden_NH), dtype=torch.bool) if output_NH is None else output_NH.isfinite().all(-1)
    if output_NH is None or not finite_N.any():
        return float("inf")
    hidden_NH, expert_ids_NK = hidden_NH[finite_N], expert_ids_NK[finite_N]
    weights_NK, output_NH = weights_NK[finite_N], output_NH[finite_N]
    N, K = expert_ids_NK.shape
    repeated = hidden_NH.repeat_interleave(K, dim=0)
    with torch.no_grad():
        single = experts(repeated, expert_ids_NK.reshape(-1, 1), torch.ones_like(weights_NK).reshape(-1, 1))
    rebuilt_NH = (single.reshape(N, K, -1).double() * weights_NK.double()[..., None]).sum(1)
    actual_NH = output_NH.double()
    errors_N = (rebuilt_NH - actual_NH).norm(dim=-1) / actual_NH.norm(dim=-1).clamp_min(1e-30)
    return float(errors_N.max())


def _measure_scoring(call: _Call) -> tuple[str | None, bool | None]:
    """Find the function whose values at the router's logits are proportional to the weights, token by token."""
    finite_N = call.weights_NK.isfinite().all(-1)
    weights_NK, expert_ids_NK = call.weights_NK[finite_N].double(), call.expert_ids_NK[finite_N].long()
    sums_N = weights_NK.sum(-1)
    tolerance = 10 * TOLERANCE.get(call.weights_NK.dtype, 1e-2)
    renormalized = bool(((sums_N - sums_N.mean()).abs() <= tolerance * sums_N.mean().abs()).all())
    K = weights_NK.shape[1]
    if call.router_logits_NE is None or K < 2 or len(weights_NK) < 2:
        return None, None
    logits_NE = call.router_logits_NE[finite_N].double()
    if int(expert_ids_NK.max()) >= logits_NE.shape[1]:
        return None, renormalized
    chosen_NK = logits_NE.gather(1, expert_ids_NK)
    errors = {}
    for name, function in _SCORING.items():
        ratios_NK = weights_NK / function(chosen_NK - (chosen_NK.max() if name == "softmax" else 0))
        errors[name] = float((ratios_NK / ratios_NK.mean(-1, keepdim=True) - 1).abs().max())
    best = min(errors, key=errors.__getitem__)
    return (best if errors[best] <= max(tolerance, 0.05) else None), renormalized
