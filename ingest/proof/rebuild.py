"""Guards: before anything is written, prove on real tokens that what was captured is what the model computes.

For a few tokens of the first batch, every layer's output is rebuilt as Σ weight · expert(x) from the captured rows.
`moewh.ingest.proof.measure` uses the same pass's observations of each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families.rule import NOT_CALLED, Call, MoELayer, is_measuring
from moewh.warehouse.errors import MoewhError, short_message

CHECKED_TOKENS = 4
"""Tokens whose output is rebuilt."""
MEASURED_TOKENS = 32
"""Tokens of the first batch that are kept for measuring each layer."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Largest relative L2 error of a rebuilt row; correct captures measured 9e-7, 6e-4 and 4e-3."""


@dataclass
class Observation:
    """One block's call, its router's, and the outputs of its parts, reduced to N rows."""

    call: Call | None = None
    output_NH: torch.Tensor | None = None
    router_input_NH: torch.Tensor | None = None
    router_state: bool = False
    """True if the router gets more than one row of numbers per token."""
    router_logits_NE: torch.Tensor | None = None
    block_output_NH: torch.Tensor | None = None
    other_outputs: list[torch.Tensor | None] = field(default_factory=list)
    """Outputs of the block's other parts, such as shared experts."""


class _Observer:
    """Keeps the inputs and outputs of every block for a few real tokens of one forward pass."""

    def __init__(self, attention_mask_BS: torch.Tensor) -> None:
        rows = attention_mask_BS.flatten().nonzero().flatten()
        self._rows = rows[torch.linspace(0, len(rows) - 1, min(MEASURED_TOKENS, len(rows))).long()]
        self._tokens = attention_mask_BS.numel()
        self.seen: dict[int, Observation] = {}

    def sample_rows(self, output: Any) -> torch.Tensor | None:
        """Return the kept rows of a tensor with one row per token (the first of a tuple); None for anything else."""
        tensor = output[0] if isinstance(output, tuple) else output
        if not isinstance(tensor, torch.Tensor) or tensor.dim() < 2 or not tensor.is_floating_point():
            return None
        flat = tensor.detach().reshape(-1, tensor.shape[-1])
        return flat[self._rows.to(flat.device)].clone() if len(flat) == self._tokens else None

    def attach(self, moe: MoELayer) -> list[RemovableHandle]:
        """Hook one block and its parts."""
        seen = self.seen[moe.layer] = Observation()

        def router(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = [rows for value in (*args, *kwargs.values()) if (rows := self.sample_rows(value)) is not None]
            seen.router_input_NH = given[0] if given else None
            seen.router_state = len(given) > 1
            seen.router_logits_NE = self.sample_rows(moe.family.logits(output))

        handles = moe.family.attach(moe, _of_visit(moe, self.record))
        handles.append(self._keep_output(moe, moe.family.observed(moe), partial(setattr, seen, "output_NH")))
        handles.append(self._keep_output(moe, moe.block, partial(setattr, seen, "block_output_NH")))
        for part in moe.block.children():
            if part not in (moe.router, moe.outermost):
                handles.append(self._keep_output(moe, part, seen.other_outputs.append))
        if moe.router is not None:
            handles.append(moe.router.register_forward_hook(_of_visit(moe, router), with_kwargs=True))
        return handles

    def _keep_output(
        self, moe: MoELayer, module: nn.Module, keep: Callable[[torch.Tensor | None], None]
    ) -> RemovableHandle:
        return module.register_forward_hook(_of_visit(moe, lambda _, __, output: keep(self.sample_rows(output))))

    def record(self, moe: MoELayer, call: Call) -> None:
        """Record one block's call."""
        rows = [tensor.detach().reshape(-1, tensor.shape[-1])[self._rows.to(tensor.device)].clone() for tensor in call]
        self.seen[moe.layer].call = Call(*rows)


def _of_visit(moe: MoELayer, hook: Callable[..., None]) -> Callable[..., None]:
    """Return a hook that fires only for this layer's call of a block, which a model may loop over."""
    calls = count()

    def of_visit(*call: Any) -> None:
        if not is_measuring() and (moe.visits == 1 or next(calls) == moe.visit):
            hook(*call)

    return of_visit


@contextmanager
def observe_calls(moe_layers: Sequence[MoELayer], attention_mask_BS: torch.Tensor) -> Iterator[dict[int, Observation]]:
    """Keep the inputs and outputs of every block and its parts, for a few real tokens of one forward pass."""
    observer = _Observer(attention_mask_BS)
    handles = [handle for moe in moe_layers for handle in observer.attach(moe)]
    try:
        yield observer.seen
    finally:
        for handle in handles:
            handle.remove()


def verify_layers(moe_layers: Sequence[MoELayer], seen: dict[int, Observation]) -> None:
    """Check every layer's rebuilt output.

    Raises MoewhError, with the module and the error, if a layer's output is not Σ weight · expert(x) or holds no
    numbers, or if its experts cannot be run one by one.
    """
    for moe in moe_layers:
        call = seen[moe.layer].call
        if call is None:
            raise MoewhError(f"{moe.path} was not called in a forward pass of the model: {NOT_CALLED}")
        some = slice(None, None, -(-len(call.hidden_TH) // CHECKED_TOKENS))
        output_NH = seen[moe.layer].output_NH
        if output_NH is not None and not output_NH[some].isfinite().all(-1).any():
            raise MoewhError(
                f"{moe.path}: its output is NaN or infinity for every token that was checked. Weights of the model are "
                f"such numbers, or it overflows in {str(output_NH.dtype).removeprefix('torch.')}: try another --dtype."
            )
        try:
            error = rebuild_error(
                moe, Call(*(tensor[some] for tensor in call)), None if output_NH is None else output_NH[some]
            )
        except torch.OutOfMemoryError:
            raise
        except (LookupError, RuntimeError, TypeError, ValueError) as failed:
            raise MoewhError(
                f"{moe.path} ({type(moe.experts).__name__}): its experts cannot be run one by one to check what was "
                f"captured ({short_message(failed)}). It is not recorded."
            ) from failed
        tolerance = TOLERANCE.get(call.hidden_TH.dtype, TOLERANCE[torch.bfloat16])
        if not error <= tolerance:
            raise MoewhError(
                f"{moe.path} ({type(moe.experts).__name__}): its output is not the sum of weight times expert over "
                f"the captured rows (relative error {error:.2g}, allowed {tolerance:.2g}). It is not recorded."
            )


@torch.no_grad()
def rebuild_error(moe: MoELayer, call: Call, output_NH: torch.Tensor | None) -> float:
    """Return the largest relative L2 error over N rows of Σ_k weight_k · expert_k(x) against the real output.

    Each expert is run alone, with weight one. Rows whose output is not finite prove nothing and are left out; the error
    is infinity if no row is left. A row without a route must give zeros.
    """
    if output_NH is None or not (finite_N := output_NH.isfinite().all(-1)).any():
        return float("inf")
    rebuilt_NH = moe.family.rebuild(moe, Call(*(tensor[finite_N] for tensor in call)))
    actual_NH = output_NH[finite_N].double()
    errors_N = (rebuilt_NH - actual_NH).norm(dim=-1) / actual_NH.norm(dim=-1).clamp_min(1e-30)
    return float(errors_N.max())
