"""A model's layers and experts by its configuration, with the rules that families share.

Families write these down in a dozen ways. Each rule looks for an attribute that only its families have; a layer is
routed if no rule makes it dense. What is particular to one family is in that family's file.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from moewh.warehouse.errors import MoewhError

Stack = Literal["decoder", "encoder"]
_TOP_K_NAMES = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_top_k", "moe_k")
_SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")


def text_config(config: Any) -> Any:
    """Return the configuration of the text stack; for an encoder-decoder, its own, which describes both stacks."""
    return config if config.is_encoder_decoder else config.get_text_config(decoder=True)


def visits(config: Any, layer: int) -> list[int]:
    """Return the layer numbers of a layer's visits in one forward pass: its own, unless the model loops over it.

    A looping model is numbered in execution order, as transformers numbers its hidden states: a looped layer has one
    number per pass over the loop, and the layers after the loop follow its last pass.
    """
    text = text_config(config)
    passes = getattr(text, "loop_num_passes", None) or 1
    start, end = (int(getattr(text, f"loop_layer_index_{edge}", None) or 0) for edge in ("start", "end"))
    if layer < start:
        return [layer]
    if layer < end:
        return [layer + loop * (end - start) for loop in range(passes)]
    return [layer + (passes - 1) * (end - start)]


def first_layer(config: Any, stack: Stack) -> int:
    """Return the number of a stack's first layer: a decoder's layers are numbered after its encoder's."""
    return int(text_config(config).num_hidden_layers) if config.is_encoder_decoder and stack == "decoder" else 0


def routed_layers(config: Any, first_sparse: Callable[[int], int]) -> list[int]:
    """Return the layers that hold routed experts, with the model's own numbers.

    In an encoder-decoder these are every step-th layer of each stack, from `first_sparse(step)` on.
    """
    text = text_config(config)
    if config.is_encoder_decoder:
        first = first_layer(config, "decoder")
        encoder = _every(text.encoder_sparse_step, text.num_hidden_layers, first_sparse)
        decoder = _every(text.decoder_sparse_step, decoder_layers(text), first_sparse)
        return encoder + [first + layer for layer in decoder]
    routed = (layer for layer in range(text.num_hidden_layers) if not _is_dense(text, layer))
    return sorted(visit for layer in routed for visit in visits(config, layer))


def top_k(config: Any) -> int:
    """Return the configuration's experts per token K; the largest where layers differ."""
    text = text_config(config)
    configurations = [text, *(part for part in (getattr(text, "ffn_config", None),) if part is not None)]
    known = (getattr(configuration, name, None) for configuration in configurations for name in _TOP_K_NAMES)
    found = next((value for value in known if value is not None), None)
    if found is None:
        raise MoewhError(
            f"the configuration of model type {text.model_type} does not state the number of experts per token."
        )
    counts = found if isinstance(found, (list, tuple)) else [found]
    if not counts or any(type(count) is not int for count in counts):
        raise MoewhError(
            f"the configuration states {found!r} experts per token, which is not a whole number. Correct it."
        )
    return int(max(counts))


def shared_count(config: Any) -> int:
    """Return the configuration's number of shared experts, in a layer that has any."""
    text = text_config(config)
    known = (getattr(text, name, None) for name in _SHARED_COUNTS)
    found = next((value for value in known if value), 1)
    return max(found) if isinstance(found, (list, tuple)) else int(found)


def decoder_layers(text: Any) -> int:
    """Layers of an encoder-decoder's decoder."""
    names = ("num_decoder_layers", "decoder_layers")
    stated = next((value for name in names if (value := getattr(text, name, None)) is not None), None)
    if stated is None:
        raise MoewhError(
            f"the configuration of model type {text.model_type} does not state its number of decoder layers."
        )
    return int(stated)


def _every(step: int, layers: int, first_sparse: Callable[[int], int]) -> list[int]:
    return [layer for layer in range(layers) if layer % step == first_sparse(step)] if step > 0 else []


def _is_dense(text: Any, layer: int) -> bool:
    """Return whether any rule makes this decoder layer dense."""

    def get(name: str, default: Any) -> Any:
        value = getattr(text, name, None)
        return default if value is None else value

    kinds = get("mlp_layer_types", None)
    if kinds is not None:
        return bool(kinds[layer] == "dense")
    blocks = get("layers_block_type", [])
    return bool(
        layer < max(get("first_k_dense_replace", 0), get("num_dense_layers", 0), get("moe_layer_start_index", 0))
        or layer > get("moe_layer_end_index", layer)
        or layer in get("mlp_only_layers", ())
        or layer not in get("moe_layers", (layer,))
        or (layer + 1) % get("decoder_sparse_step", 1) != 0
        or (layer + 1) % get("moe_layer_interval", 1) != 0
        or get("layers_num_experts", {layer: None})[layer] == 1
        or ("moe" in blocks and blocks[layer] != "moe")
        or not get("is_moe", True)
        or not get("enable_moe_block", True)
        or get("num_local_experts", 1) == 0
    )
