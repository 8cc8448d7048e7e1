"""Where a model's routing happens: its MoE layers, found and checked against the configuration.

A module that looks like routed experts but cannot be observed is refused by name: a container whose forward gives its
arguments other names, or hides them behind a decorator, must not pass for a dense layer.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from moewh.ingest.families.configuration import Stack, first_layer, text_config, visits
from moewh.ingest.families.find import family_of
from moewh.ingest.families.rule import INDEX_NAMES, WEIGHT_NAMES, FamilyAdapter, MoELayer, unwrapped
from moewh.ingest.model.expected import expected_layers, top_k
from moewh.warehouse.errors import MoewhError

_LAYER = re.compile(r"(?:.*\.)?(?:layers|blocks|block|h)\.(\d+)\.")
OTHER_MODALITY = re.compile(
    r"(?:^|\.)(?:\w*(?:vision|visual|audio|image|speech)\w*|\w*projector|connector|talker|\w*2wav|mtp\w*|\w*_mtp)\."
)
"""Matches the path of a module of another modality, or of the layers that predict tokens further ahead."""
_EXPERTS_CLASS = re.compile(r"(?<!Shared)Experts?$")
_SHARED = re.compile(r"(?:^|\.)\w*shared\w*(?:\.|$)")
_WRAPPER = r"\.(?:base_layer|modules_to_save\.[^.]+)"
"""The names that peft gives a module inside the wrapper that replaces it, or the copy of it that runs instead."""
_REPLACED = "original_module"
"""The name that peft gives a module when a copy of it runs instead."""


@dataclass(frozen=True)
class MoELayers:
    """MoE layers to observe, in order, and the containers of experts outside them."""

    moe_layers: list[MoELayer]
    others: list[tuple[str, nn.Module]]
    """Path and module of containers that must not be called: experts of vision or audio towers, or not loaded."""

    def of_prompts(self) -> MoELayers:
        """The layers that see a prompt: in an encoder-decoder the encoder's; the decoder sees what it generates."""
        seeing = [moe for moe in self.moe_layers if moe.stack == "encoder"] or self.moe_layers
        return MoELayers(
            seeing, self.others + [(moe.path, moe.experts) for moe in self.moe_layers if moe not in seeing]
        )


def refuse_by_name(config: Any, *, expert_outputs: bool = False) -> None:
    """Raise MoewhError for a family that moewh always refuses, UsageError for one without expert outputs."""
    family, model_type = family_of(config), text_config(config).model_type
    if family.refused:
        raise MoewhError(f"model type {model_type} is not recorded: {family.refused}. Use another model.")
    if expert_outputs:
        family.require_outputs(model_type)


def find_moe_layers(model: nn.Module, config: Any) -> MoELayers:
    """Return the MoE layers of the model's text stacks.

    `config` is the model's configuration. Raises MoewhError if there are none, if the model has other routed experts
    that cannot be observed, or if the configuration promises routed experts in other layers.
    """
    refuse_by_name(config)
    located = locate_moe_layers(model, config)
    if unobserved := list(_unobserved(model, located)):
        raise MoewhError(_cannot_observe(model, unobserved))
    if not located.moe_layers:
        raise MoewhError(_no_moe_layers(model, text_config(config).model_type, located))
    expected, layers = expected_layers(config), [moe.layer for moe in located.moe_layers]
    if layers != expected:
        raise MoewhError(
            f"{type(model).__name__}: its configuration has routed experts in layers {expected}, but containers "
            f"were found in layers {layers}. moewh cannot record this model whole, so it does not record it."
        )
    check_top_k(located.moe_layers, top_k(config))
    return located


def check_top_k(moe_layers: list[MoELayer], chosen: int) -> None:
    """Raise MoewhError for a configuration with no expert per token, or more than the layer has."""
    for moe in moe_layers:
        if not 1 <= chosen <= moe.num_experts:
            raise MoewhError(
                f"{moe.path}: the configuration states {chosen} of {moe.num_experts} experts per token. Correct it, or "
                "fetch it again."
            )


def locate_moe_layers(model: nn.Module, config: Any) -> MoELayers:
    """Return all MoE layers found, whether or not they can be recorded."""
    family = family_of(config)
    moe_layers, others = [], []
    for path, module in family.find(model):
        found = _LAYER.match(path + ".")
        if found and not OTHER_MODALITY.search(path) and _REPLACED not in path.split("."):
            moe_layers += _moe_layers(model, config, path, found, family)
        else:
            others.append((path, module))
    return MoELayers(sorted(moe_layers, key=lambda moe: moe.layer), others)


def _moe_layers(
    model: nn.Module, config: Any, path: str, found: re.Match[str], family: FamilyAdapter
) -> list[MoELayer]:
    """Return the layers of a container: one, or one per visit in a looping model."""
    stack: Stack = "encoder" if config.is_encoder_decoder and "encoder" in path.split(".") else "decoder"
    called = re.sub(f"(?:{_WRAPPER})+$", "", path)
    outermost = model.get_submodule(called)
    block = outermost if family.block_is_container else model.get_submodule(called.rpartition(".")[0])
    layers = visits(config, int(found[1]))
    return [
        MoELayer(
            layer=first_layer(config, stack) + layer,
            stack=stack,
            path=re.sub(f"{_WRAPPER}(?=\\.|$)", "", path),
            experts=unwrapped(model.get_submodule(path)),
            outermost=outermost,
            router=family.router(block),
            block=block,
            whole_layer=model.get_submodule(found[0].rstrip(".")),
            family=family,
            visit=visit,
            visits=len(layers),
        )
        for visit, layer in enumerate(layers)
    ]


def _unobserved(model: nn.Module, located: MoELayers) -> Iterator[tuple[str, nn.Module]]:
    """Yield the outermost modules that look like routed experts of a text stack and are in no container that was found.

    That is a module named `experts`, one whose class is named so, or one that holds several matrices per expert.
    Experts that every token passes through are not routed, and a wrapper of a found container (LoRA) does not count.
    """
    known = [moe.path for moe in located.moe_layers] + [path for path, _ in located.others]
    known += [path for moe in located.moe_layers for path in moe.family.unrouted_experts(moe)]
    for called, module in model.named_modules():
        path = re.sub(f"{_WRAPPER}(?=\\.|$)", "", called)
        seen = _REPLACED in path.split(".") or any(
            f"{path}.".startswith(f"{other}.") or other.startswith(f"{path}.") for other in known
        )
        if seen or OTHER_MODALITY.search(path) or _SHARED.search(path):
            continue
        stacked = [tensor for tensor in module.parameters(recurse=False) if tensor.dim() > 2]
        if path.endswith("experts") or _EXPERTS_CLASS.search(type(module).__name__) or len(stacked) > 1:
            known.append(path)
            yield called, module


def _cannot_observe(model: nn.Module, unobserved: list[tuple[str, nn.Module]]) -> str:
    path, module = unobserved[0]
    more = f" (and {len(unobserved) - 1} more)" if len(unobserved) > 1 else ""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        kinds = ", ".join(sorted({type(part).__name__ for part in module.children()}))
        return (
            f"{type(model).__name__}: {path}{more} keeps its experts as a list of {kinds}, which moewh cannot observe. "
            "Use a model class that transformers 5 ships."
        )
    taken = ", ".join(list(inspect.signature(type(module).forward).parameters)[1:])
    return (
        f"{type(model).__name__}: {path}{more} looks like routed experts, but the forward of {type(module).__name__} "
        f"takes ({taken}). moewh observes experts whose indices ({', '.join(sorted(INDEX_NAMES))}) and weights "
        f"({', '.join(sorted(WEIGHT_NAMES))}) have these names. Use a version of transformers whose class has them."
    )


def _no_moe_layers(model: nn.Module, model_type: str, located: MoELayers) -> str:
    name = type(model).__name__
    if located.others:
        paths = ", ".join(path for path, _ in located.others[:3])
        return f"{name} ({model_type}) has routed experts only outside the layers of its text stack: {paths}."
    return f"{name} ({model_type}) has no routed experts: it is a dense model. Give a Mixture-of-Experts model."
