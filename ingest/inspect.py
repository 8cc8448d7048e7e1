"""Describe a model without its weights: its MoE layers, their shapes, and whether moewh can record it.

The model is built from its configuration on the meta device, where tensors have shapes but no data.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from moewh.ingest import demo
from moewh.ingest.capture.expert_outputs import arithmetic_share
from moewh.ingest.capture.vectors import WantedVectors
from moewh.ingest.families.configuration import text_config
from moewh.ingest.families.find import adapter_of
from moewh.ingest.families.rule import MoELayer
from moewh.ingest.model.architecture import check_location, check_quantization, check_versions, empty_model, read_config
from moewh.ingest.model.expected import num_layers, top_k
from moewh.ingest.model.layers import find_moe_layers, locate_moe_layers
from moewh.ingest.model.loading import explaining, silence_libraries
from moewh.ingest.model.peft_adapter import PeftAdapter, find_adapter
from moewh.ingest.model.repository import Repository
from moewh.ingest.options import DEMO
from moewh.ingest.proof.measure import shared_experts
from moewh.warehouse.errors import MoewhError, short_message

_BYTES_PER_ROW = {"bfloat16": 2.0, "float16": 2.5, "float32": 4.0}
"""Measured on stored routing, index and weight together. Most of it is the weight's mantissa."""


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer: where it is, and the shapes of its weights."""

    layer: int
    stack: str
    module: str
    module_class: str
    router: str | None
    router_class: str | None
    num_experts: int
    num_identity_experts: int
    num_shared_experts: int
    top_k: int
    router_weights: dict[str, list[int]]
    expert_weights: dict[str, list[int]]


@dataclass(frozen=True)
class Inspection:
    """What `moewh inspect` prints. Sizes in elements, bytes as written to disk."""

    model: str
    model_type: str
    model_class: str
    peft_adapter: str | None
    """Type and base of the adapter, if the model is one; the fields below then describe the base."""
    status: Literal["captured", "refused"]
    reason: str | None
    """Why the model, or its adapter, is refused."""
    adapter: str | None
    num_hidden_layers: int
    num_moe_layers: int
    scoring: str | None
    renormalized: bool | None
    hidden_size: int | None
    intermediate_size: int | None
    moe_intermediate_size: int | None
    routing_rows_per_token: int
    bytes_per_token: int
    router_logits_bytes_per_token: int
    """Extra bytes with --router-logits, before compression."""
    hidden_states_bytes_per_token: int
    """Extra bytes with --hidden-states all, before compression; proportionally less for a subset of layers."""
    expert_outputs_bytes_per_token: int | None
    """Extra bytes with --expert-outputs, before compression; None where a family's experts cannot be measured."""
    expert_outputs_arithmetic: float | None
    """Multiplications that --expert-outputs adds, as a share of a pass without it."""
    one_prompt_a_batch: bool
    layers: list[LayerShape]


def inspect_model(model: str, revision: str | None = None, trust_remote_code: bool = False) -> Inspection:
    """Build a hub id, folder or configuration file on the meta device and describe it.

    Raises MoewhError if there is no configuration, or no model can be built from it.
    """
    check_versions()
    silence_libraries()
    config, empty, peft_adapter = build_empty(model, revision, trust_remote_code)
    reason = None
    try:
        if peft_adapter is not None:
            peft_adapter.check(allow_pickle=True)
        check_quantization(config)
        find_moe_layers(empty, config)
    except MoewhError as refusal:
        reason = str(refusal)
    text = text_config(config)
    moe_layers = locate_moe_layers(empty, config).moe_layers
    layers = [_shape(moe, config) for moe in moe_layers]
    every = frozenset(moe.layer for moe in moe_layers)
    hidden_size = getattr(text, "hidden_size", None)
    adapter = adapter_of(text.model_type)
    scoring, renormalized = moe_layers[-1].family.declared(moe_layers[-1], config) if moe_layers else (None, None)
    rows, chosen = sum(layer.top_k for layer in layers), layers[0].top_k if layers else 0
    outputs = WantedVectors(expert_outputs=True)
    has_outputs = bool(moe_layers) and moe_layers[0].family.no_outputs is None
    return Inspection(
        model=model,
        model_type=text.model_type,
        model_class=type(empty).__name__,
        peft_adapter=None if peft_adapter is None else f"{peft_adapter.kind} on {peft_adapter.base.location}",
        status="captured" if reason is None else "refused",
        reason=reason or (_first_line(adapter) if adapter else None),
        adapter=type(adapter).__name__ if adapter else None,
        num_hidden_layers=num_layers(config),
        num_moe_layers=len(layers),
        scoring=scoring,
        renormalized=renormalized,
        hidden_size=hidden_size,
        intermediate_size=getattr(text, "intermediate_size", None),
        moe_intermediate_size=getattr(text, "moe_intermediate_size", None),
        routing_rows_per_token=rows,
        bytes_per_token=round(rows * _BYTES_PER_ROW.get(str(config.dtype).removeprefix("torch."), 2.0)),
        router_logits_bytes_per_token=WantedVectors(router_logits=every).bytes_per_token(moe_layers, 0, chosen),
        hidden_states_bytes_per_token=WantedVectors(hidden_states=every).bytes_per_token(
            moe_layers, hidden_size or 0, chosen
        ),
        expert_outputs_bytes_per_token=outputs.bytes_per_token(moe_layers, 0, chosen) if has_outputs else None,
        expert_outputs_arithmetic=arithmetic_share(empty, moe_layers, chosen) if has_outputs else None,
        one_prompt_a_batch=bool(adapter and adapter.one_context_per_batch),
        layers=layers,
    )


def build_empty(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Any, nn.Module, PeftAdapter | None]:
    """Build a hub id, folder or configuration file on the meta device.

    Returns its configuration, the model, and its adapter (None if it is not one).
    """
    check_location(model, revision, settings=True)
    location = str(demo.checkpoint_path(revision)) if model == DEMO else model
    files = Repository(location, None if Path(location).exists() else revision or "main")
    with explaining(model):
        adapter = find_adapter(files, model)
        base = files if adapter is None else adapter.base
        config = read_config(base.location, revision=base.revision, trust_remote_code=trust_remote_code)
    try:
        return config, empty_model(config, trust_remote_code), adapter
    except MoewhError:
        raise
    except Exception as error:
        raise MoewhError(
            f"transformers cannot build {model} from its configuration: {short_message(error)}. "
            "Something is missing or wrong there; complete it, or name the model it belongs to."
        ) from error


def _shape(moe: MoELayer, config: Any) -> LayerShape:
    router = moe.router
    names = (path for path, module in moe.block.named_children() if module is router)
    parent = moe.path if moe.family.block_is_container else moe.path.rpartition(".")[0]
    return LayerShape(
        layer=moe.layer,
        stack=moe.stack,
        module=moe.path,
        module_class=type(moe.experts).__name__,
        router=None if router is None else ".".join(part for part in (parent, next(names)) if part),
        router_class=None if router is None else type(router).__name__,
        num_experts=moe.num_experts,
        num_identity_experts=moe.kinds.count("identity"),
        num_shared_experts=shared_experts(moe, config),
        top_k=top_k(config),
        router_weights={} if router is None else _shapes(router),
        expert_weights=_shapes(moe.experts, leave_out=router),
    )


def _shapes(module: nn.Module, leave_out: nn.Module | None = None) -> dict[str, list[int]]:
    left_out = set() if leave_out is None else {id(parameter) for parameter in leave_out.parameters()}
    named = module.state_dict(keep_vars=True).items()
    return {name: list(tensor.shape) for name, tensor in named if id(tensor) not in left_out}


def _first_line(adapter: object) -> str:
    return (type(adapter).__doc__ or "").splitlines()[0]
