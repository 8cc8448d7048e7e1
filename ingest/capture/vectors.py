"""The opt-in tables: the router's raw logits, its input vectors, and measures of the experts' outputs.

Logits and vectors are far larger than the routing (E or H numbers per token and layer instead of K), so a segment's are
kept in unnamed files, which vanish with the process, and written from there in token order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from moewh.ingest.families.rule import MoELayer
from moewh.ingest.options import IngestOptions
from moewh.warehouse.errors import UsageError
from moewh.warehouse.files import schema
from moewh.warehouse.files.schema import Table


@dataclass(frozen=True)
class WantedVectors:
    """The opt-in vectors that a run stores, and for which layers."""

    router_logits: frozenset[int] = frozenset()
    hidden_states: frozenset[int] = frozenset()
    expert_outputs: bool = False
    """For all layers or none."""

    @property
    def tables(self) -> list[Table]:
        """The run's opt-in tables."""
        wanted = {
            schema.ROUTER_LOGITS: bool(self.router_logits),
            schema.HIDDEN_STATES: bool(self.hidden_states),
            schema.EXPERT_OUTPUTS: self.expert_outputs,
        }
        return [table for table, asked in wanted.items() if asked]

    def bytes_per_token(self, moe_layers: list[MoELayer], hidden_size: int, top_k: int) -> int:
        """Return the bytes of one token's vectors before compression; expert outputs take two numbers per choice."""
        logits = sum(moe.num_experts for moe in moe_layers if moe.layer in self.router_logits)
        outputs = 2 * top_k * len(moe_layers) if self.expert_outputs else 0
        return 4 * (logits + hidden_size * len(self.hidden_states) + outputs)


def wanted_vectors(options: IngestOptions, moe_layers: list[MoELayer], model_type: str) -> WantedVectors:
    """Read the options of the opt-in tables. Raises UsageError for a table that this model cannot provide."""
    layers = frozenset(moe.layer for moe in moe_layers)
    if options.router_logits and any(moe.family.returns_probabilities for moe in moe_layers):
        raise UsageError(f"--router-logits: routers of {model_type} return probabilities, not logits. Leave it out.")
    if (options.router_logits or options.hidden_states is not None) and any(moe.router is None for moe in moe_layers):
        raise UsageError(
            f"{model_type} has no router module to observe. Leave out --router-logits and --hidden-states."
        )
    if options.expert_outputs:
        moe_layers[0].family.require_outputs(model_type)
    hidden = _layers(options.hidden_states, layers) if options.hidden_states is not None else frozenset()
    return WantedVectors(layers if options.router_logits else frozenset(), hidden, options.expert_outputs)


def _layers(text: str, known: frozenset[int]) -> frozenset[int]:
    if text == "all":
        return known
    parts = [part.strip() for part in text.split(",")]
    chosen = frozenset(int(part) for part in parts if part.isdecimal())
    if not all(part.isdecimal() for part in parts) or not chosen <= known:
        listed = ",".join(map(str, sorted(known)))
        raise UsageError(f"--hidden-states {text}: give MoE layers separated by commas, or all. They are {listed}.")
    return chosen


def attach_vectors(moe: MoELayer, wanted: WantedVectors, keep: Any) -> list[RemovableHandle]:
    """Hook a layer's router, calling `keep(table, layer, tensor)` with each vector [B*S, E or H]."""
    router, handles = moe.router, []
    if router is not None and moe.layer in wanted.hidden_states:

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
            keep(schema.HIDDEN_STATES, moe, given)

        handles.append(router.register_forward_pre_hook(before, with_kwargs=True))
    if router is not None and moe.layer in wanted.router_logits:

        def after(_: nn.Module, __: Any, output: Any) -> None:
            keep(schema.ROUTER_LOGITS, moe, moe.family.logits(output))

        handles.append(router.register_forward_hook(after))
    return handles
