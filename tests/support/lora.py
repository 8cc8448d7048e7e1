"""Tiny random adapters of peft beside tiny models, saved as ordinary folders; and the numbers that they come to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file


def save_adapter(model: Any, folder: Path, base: Path | str, config: peft.PeftConfig, seed: int = 0) -> Path:
    """Put a random adapter into a model, which changes it, save the adapter alone, and return its folder."""
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.3)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(str(folder))
    return folder


def merged_with(state: dict[str, torch.Tensor], adapter: Path, scaling: float) -> dict[str, torch.Tensor]:
    """The base's tensors plus scaling · B @ A, by the names and layout in which peft stores A and B.

    Of a matrix [out, in], A is [r, in] and B [out, r]. Of E stacked matrices [E, out, in], A holds each expert's r rows
    one after the other and B each expert's columns in turns; the innermost wrapper is that of the first parameter.
    """
    stored = load_file(adapter / "adapter_model.safetensors")
    merged = dict(state)
    for name, A in stored.items():
        if ".lora_A." not in name:
            continue
        B = stored[name.replace("lora_A", "lora_B")]
        target = _target(name, state)
        weight = merged[target]
        if weight.dim() == 2:
            merged[target] = weight + scaling * B @ A
        else:
            E = len(weight)
            A_ErI, B_OrE = A.reshape(E, -1, A.shape[1]), B.reshape(len(B), -1, E)
            merged[target] = weight + scaling * torch.stack(
                [B_OrE[:, :, expert] @ A_ErI[expert] for expert in range(E)]
            )
    return merged


def _target(name: str, state: dict[str, torch.Tensor]) -> str:
    path = name.removeprefix("base_model.model.").partition(".lora_A.")[0]
    for candidate in (f"{path}.weight", f"{path.removesuffix('.base_layer')}.gate_up_proj"):
        if candidate in state and (candidate.endswith("weight") or path.endswith("base_layer")):
            return candidate
    return f"{path}.down_proj"


Routes = dict[tuple[int, int, int], dict[int, float]]


def routed(model: Any, ids: list[list[int]], call: Any = None) -> Routes:
    """{(prompt, position, layer): {expert: weight}}: what the containers of experts are called with."""
    found: Routes = {}
    prompt = 0

    def hook(layer: int) -> Any:
        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            _, experts, weights = (*args, *kwargs.values())
            for position, (chosen, weight) in enumerate(zip(experts.tolist(), weights.tolist(), strict=True)):
                found[prompt, position, layer] = dict(zip(chosen, weight, strict=True))

        return before

    handles = [
        layer.mlp.experts.register_forward_pre_hook(hook(number), with_kwargs=True)
        for number, layer in enumerate(model.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    with torch.inference_mode():
        for prompt, tokens in enumerate(ids):  # noqa: B007 - the hooks read it
            (call or model)(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    for handle in handles:
        handle.remove()
    return found
