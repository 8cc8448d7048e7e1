"""Where a model's routing happens: its MoE layers, found and held against what the configuration promises."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from ingest.adapters import REFUSED, reader_for
from ingest.blocks import Reader, Site
from ingest.expected import Stack, expected_layers, first_layer, text_config, top_k
from warehouse.errors import MoewhError

_LAYER = re.compile(r"(?:.*\.)?(?:layers|blocks|block|h)\.(\d+)\.")
OTHER_MODALITY = re.compile(
    r"(?:^|\.)(?:\w*(?:vision|visual|audio|image|speech)\w*|\w*projector|connector|talker|\w*2wav|mtp\w*|\w*_mtp)\."
)
"""Path of a module of another modality, or of the layers that predict tokens further ahead."""


@dataclass(frozen=True)
class Sites:
    """MoE layers to observe, in order, and the containers of experts that are none of them."""

    sites: list[Site]
    others: list[tuple[str, nn.Module]]
    """Path and module of what must not be called: the experts of vision or audio towers, and what was not loaded."""

    def of_prompts(self) -> Sites:
        """The layers that see a prompt: of an encoder-decoder the encoder's; its decoder sees what it generates."""
        seeing = [site for site in self.sites if site.stack == "encoder"] or self.sites
        return Sites(seeing, self.others + [(site.path, site.experts) for site in self.sites if site not in seeing])


def refuse_by_name(config: Any) -> None:
    """Raise MoewhError for a family that moewh refuses whatever its weights are."""
    model_type = text_config(config).model_type
    if reason := REFUSED.get(model_type):
        raise MoewhError(f"model type {model_type} is not recorded: {reason}. Use another model.")


def find_sites(model: nn.Module, config: Any) -> Sites:
    """Return the MoE layers of the model's text stacks.

    `config` is the model's configuration. Raises MoewhError if there are none, or if the configuration
    promises routed experts in other layers than those found.
    """
    refuse_by_name(config)
    located = locate_sites(model, config)
    if not located.sites:
        raise MoewhError(_no_sites(model, text_config(config).model_type))
    expected, layers = expected_layers(config), [site.layer for site in located.sites]
    if layers != expected:
        raise MoewhError(
            f"{type(model).__name__}: its configuration has routed experts in layers {expected}, but containers "
            f"were found in layers {layers}. moewh cannot record this model whole, so it does not record it."
        )
    check_top_k(located.sites, top_k(config))
    return located


def check_top_k(sites: list[Site], chosen: int) -> None:
    """Raise MoewhError for a configuration that gives a token no expert, or more than there are."""
    for site in sites:
        if not 1 <= chosen <= site.num_experts:
            raise MoewhError(
                f"{site.path}: the configuration gives a token {chosen} of {site.num_experts} experts. Correct it, or "
                "fetch it again."
            )


def locate_sites(model: nn.Module, config: Any) -> Sites:
    """Return whatever MoE layers there are, whether or not they can be recorded."""
    reader = reader_for(text_config(config).model_type)
    sites, others = [], []
    for path, module in reader.find(model):
        found = _LAYER.match(path + ".")
        if found and not OTHER_MODALITY.search(path):
            sites.append(_site(model, config, path, found, reader))
        else:
            others.append((path, module))
    return Sites(sites, others)


def _site(model: nn.Module, config: Any, path: str, found: re.Match[str], reader: Reader) -> Site:
    stack: Stack = "encoder" if config.is_encoder_decoder and "encoder" in path.split(".") else "decoder"
    experts = model.get_submodule(path)
    block = experts if reader.block_is_container else model.get_submodule(path.rpartition(".")[0])
    return Site(
        layer=first_layer(config, stack) + int(found[1]),
        stack=stack,
        path=path,
        experts=experts,
        router=reader.router(block),
        block=block,
        whole_layer=model.get_submodule(found[0].rstrip(".")),
        reader=reader,
    )


def _no_sites(model: nn.Module, model_type: str) -> str:
    name = type(model).__name__
    lists = {
        type(module[0]).__name__
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and path.endswith("experts")
    }
    if lists:
        return (
            f"{name} ({model_type}) keeps its experts as a list of {', '.join(sorted(lists))}, which moewh cannot "
            "observe. Use a model class that transformers 5 ships."
        )
    return f"{name} ({model_type}) has no routed experts: it is a dense model. Give a Mixture-of-Experts model."
