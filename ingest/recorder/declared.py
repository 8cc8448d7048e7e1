"""Describe a model's layers without its weights and without running it: the rows that describe a recorded run.

In: a hub id, a folder, a configuration, or the numbers themselves. Out: the rows of `layers` and `experts`, and the
run's own columns. Values that only a forward pass can show are NULL.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Set
from dataclasses import dataclass
from typing import Any

from moewh.ingest.recorder.arguments import checked_text, whole
from moewh.warehouse.errors import UsageError, brief


@dataclass(frozen=True)
class Declared:
    """A model's MoE layers as plain data."""

    run: dict[str, Any]
    """Columns of `runs`."""
    layers: list[dict[str, Any]]
    experts: list[dict[str, Any]]
    shaping: dict[str, Any]
    """The model's part of the run's identity."""

    @property
    def shapes(self) -> dict[int, tuple[int, int]]:
        """Layer → (E, K), in order."""
        return {row["layer"]: (row["num_experts"], row["top_k"]) for row in self.layers}


def from_numbers(model: str | None, layers: Collection[int], num_experts: int, top_k: int) -> Declared:
    """Return a model described by these numbers. Raises UsageError for impossible ones."""
    if not isinstance(layers, Iterable) or isinstance(layers, str | bytes):
        raise UsageError(f"layers is {brief(layers)}. Give a list of the MoE layers' indices.")
    given = [whole("a layer", layer, -1, 2**31 - 1) for layer in layers]
    numbers = sorted(given)
    if given != numbers and not isinstance(layers, Set):
        raise UsageError(f"layers are {given}, and expert_ids are in the order of the layers. Give both ascending.")
    num_experts, top_k = whole("num_experts", num_experts, 1, 2**31 - 1), whole("top_k", top_k)
    model = checked_text("model", os.fspath(model) if isinstance(model, os.PathLike) else model)
    if not numbers or numbers[0] < 0 or len(set(numbers)) < len(numbers):
        raise UsageError(f"layers are {numbers}. Give the index of each MoE layer once.")
    if not 1 <= top_k <= num_experts:
        raise UsageError(f"top_k is {top_k} of {num_experts} experts. Give 1 to num_experts.")
    rows = [{"layer": layer, "stack": "decoder", "num_experts": num_experts, "top_k": top_k} for layer in numbers]
    experts = [{"layer": layer, "expert": expert, "kind": "mlp"} for layer in numbers for expert in range(num_experts)]
    run = {"model": model, "num_moe_layers": len(rows), "num_experts": num_experts, "top_k": top_k, "series": model}
    return Declared(run, rows, experts, {"model": model, "layers": numbers, "num_experts": num_experts, "top_k": top_k})


def from_model(model: Any, revision: str | None, trust_remote_code: bool) -> Declared:
    """Return a model described by its configuration: a hub id, a folder, a configuration file or object.

    Raises MoewhError for a model that cannot be recorded, or whose configuration cannot be read.
    """
    from moewh.ingest.families.configuration import text_config
    from moewh.ingest.identity import expert_rows, layer_row
    from moewh.ingest.inspect import build_empty
    from moewh.ingest.model.architecture import empty_model
    from moewh.ingest.model.expected import num_layers, top_k
    from moewh.ingest.model.layers import find_moe_layers
    from moewh.ingest.model.loading import config_sha256
    from moewh.ingest.proof.measure import declared_facts

    model = os.fspath(model) if isinstance(model, os.PathLike) else model
    if isinstance(model, str):
        config, empty, _ = build_empty(model, revision, trust_remote_code)
        title = model
    elif hasattr(model, "get_text_config"):
        config, empty, title = model, empty_model(model), getattr(model, "_name_or_path", "") or model.model_type
    else:
        raise UsageError(f"model is a {type(model).__name__}. Give a hub id, a folder or a configuration.")
    moe_layers = find_moe_layers(empty, config).moe_layers
    facts = [(moe, declared_facts(moe, config)) for moe in moe_layers]
    layers = [layer_row(moe, fact) for moe, fact in facts]
    experts = [row for moe, fact in facts for row in expert_rows(moe, fact)]
    run = {
        "model": title,
        "revision": revision,
        "series": title,
        "model_type": text_config(config).model_type,
        "num_hidden_layers": num_layers(config),
        "num_moe_layers": len(layers),
        "num_experts": max(moe.num_experts for moe in moe_layers),
        "top_k": top_k(config),
    }
    return Declared(
        run, layers, experts, {"model": title, "revision": revision, "config_sha256": config_sha256(config)}
    )
