"""A model already in memory, a notebook's or a training run's: named, fingerprinted, and left unchanged.

In: the model and its tokenizer. Out: a `LoadedModel` like those of `moewh.ingest.model.loading`. The origin of such
weights is unknown, so their bytes identify them; whatever else changes a pass is part of the identity too.
"""

from __future__ import annotations

import hashlib
import json
import random
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from moewh.ingest.model.architecture import check_parallel, check_versions
from moewh.ingest.model.generation_tokens import GenerationTokens, StatedTokens, distinct_ends, stated_ends
from moewh.ingest.model.layers import find_moe_layers
from moewh.ingest.model.loading import LoadedModel, Source
from moewh.ingest.model.patches import patches
from moewh.ingest.model.peft_adapter import SUPPORTED_TYPES
from moewh.warehouse.cpus import usable_cpus
from moewh.warehouse.errors import MoewhError, UsageError

RECORDED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Modules whose calls are being recorded, which moewh must not run itself meanwhile, in whatever model they are."""
_HASHERS = 8
"""Most tensors hashed at once."""
_HASHED_BYTES = 16 << 20
"""Bytes of a tensor copied to the host at once, few enough for the allocator to use the same memory again."""
_OF_PEFT = ("_active_adapter", "_disable_adapters")
"""Settings that decide which adapter runs, although their names look private."""
_NOT_SHAPING = {"training", "gradient_checkpointing", "max_seq_len_cached"}


def model_in_memory(
    model: Any,
    tokenizer: Any,
    *,
    series: str | None = None,
    train_step: int | None = None,
    train_tokens: int | None = None,
    generates: bool = False,
) -> LoadedModel:
    """Return a model in memory as a `LoadedModel`, without changing it.

    Raises UsageError if it is not a model or not a tokenizer, MoewhError for a model that cannot be recorded.
    """
    check_versions()
    inner = unwrapped_model(model)
    if tokenizer is None:
        raise UsageError("a model in memory needs its tokenizer, and none was given. Give tokenizer=AutoTokenizer….")
    require_tokenizer(tokenizer)
    if generates and not inner.can_generate():
        raise MoewhError(f"{type(inner).__name__} has no LM head to generate with. Leave generate out.")
    check_parallel(inner)
    found = find_moe_layers(inner, inner.config)
    title = str(getattr(inner.config, "_name_or_path", "") or type(inner).__name__)
    name = PurePath(title).name or type(inner).__name__
    digest = fingerprint(inner)
    return LoadedModel(
        Source("", None, name, title, None, series or f"{name}-{digest[:8]}"),
        inner,
        tokenizer,
        found if generates else found.of_prompts(),
        digest,
        train_step=train_step,
        train_tokens=train_tokens,
        generation_tokens=_generation_tokens(inner, tokenizer) if generates else None,
        patches=patches(inner),
    )


def require_tokenizer(tokenizer: Any) -> None:
    """Raise UsageError for anything but a loaded tokenizer, such as its name."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UsageError(
            f"the tokenizer is a {type(tokenizer).__name__}. Give a loaded one: AutoTokenizer.from_pretrained(…)."
        )


def unwrapped_model(model: Any) -> Any:
    """Return the transformers model inside the wrappers of data parallelism and peft.

    Raises UsageError if it is not a transformers model, MoewhError for one that does not run as plain modules.
    """
    if type(model).__name__ == "OptimizedModule" or getattr(model, "_compiled_call_impl", None) is not None:
        raise MoewhError(
            "the model is compiled (torch.compile), and a compiled graph cannot be observed. Give the uncompiled model."
        )
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model = model.module
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        kinds = {str(getattr(config.peft_type, "value", config.peft_type)) for config in model.peft_config.values()}
        if wrong := sorted(kinds - SUPPORTED_TYPES):
            raise MoewhError(f"the model has an adapter of type {', '.join(wrong)}, which is not recorded.")
        model = model.get_base_model()
    if not isinstance(model, PreTrainedModel):
        raise UsageError(
            f"the model is a {type(model).__name__}. Give a loaded model of transformers; only moewh.ingest also takes "
            "a hub id or a folder."
        )
    for path, module in model.named_modules():
        if getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule":
            raise MoewhError(
                f"{path or 'the model'} is compiled, and a compiled graph cannot be observed. Load it again."
            )
    if hasattr(model, "_compiled_call"):
        raise MoewhError(
            "the model was compiled by `generate` (a static cache), and cannot be observed. Load it again."
        )
    return model


def fingerprint(model: nn.Module) -> str:
    """Return a digest of what a model computes with, as far as its modules hold it.

    It covers the names, shapes, types and bytes of all parameters and buffers, and each module's class and plain
    settings (a top-k, an adapter's scaling). Raises MoewhError for tensors whose data is not in memory.
    """
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in named:
        if tensor.is_meta or hasattr(tensor, "ds_id"):
            raise MoewhError(f"the numbers of {name} are not in memory (offloaded or sharded). Load the model whole.")
    distinct = {id(tensor): tensor for _, tensor in named}
    with ThreadPoolExecutor(min(_HASHERS, usable_cpus())) as workers:  # hashing releases the GIL
        digests = dict(zip(distinct, workers.map(_tensor_digest, distinct.values()), strict=True))
    parts: list[Any] = [[name, digests[id(tensor)]] for name, tensor in named]
    parts += [[path, *_settings(module)] for path, module in model.named_modules()]
    parts += _held_otherwise(model, named)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _held_otherwise(model: nn.Module, named: list[tuple[str, torch.Tensor]]) -> list[list[str]]:
    """Return the digests of tensors that modules save besides parameters and buffers, such as a quantised one's scales.

    Raises MoewhError for weights that are saved as anything else.
    """
    known = {id(tensor) for _, tensor in named}
    found = []
    for path, module in model.named_modules():
        if type(module)._save_to_state_dict is nn.Module._save_to_state_dict:
            continue
        saved: dict[str, Any] = {}
        module._save_to_state_dict(saved, f"{path}.", True)
        for name, value in saved.items():
            if not isinstance(value, torch.Tensor):
                raise MoewhError(
                    f"{path} keeps its weights packed (torch's quantisation), where they cannot be told from others. "
                    "Give the model as it was before it was quantised."
                )
            if id(value) not in known:
                found.append([name, _tensor_digest(value)])
    return found


def _tensor_digest(tensor: torch.Tensor) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    in_parts = tensor.is_contiguous() and tensor.device.type in ("cpu", "cuda")
    whole = tensor.detach() if in_parts else tensor.detach().cpu().contiguous()
    for part in whole.reshape(-1).view(torch.uint8).split(_HASHED_BYTES):
        digest.update(part.cpu().numpy().data)
    return digest.hexdigest()


def _settings(module: nn.Module) -> tuple[str, dict[str, Any]]:
    """Return a module's class and its attributes that are plain values; a whole model's are in its configuration."""
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    if isinstance(module, PreTrainedModel):
        return kind, {}
    named = {
        name: value
        for name, value in sorted(vars(module).items())
        if (not name.startswith("_") or name in _OF_PEFT) and name not in _NOT_SHAPING and _is_plain(value)
    }
    return kind, named


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(name, str) and _is_plain(part) for name, part in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _generation_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> StatedTokens:
    """Return the tokens of the model's own generation settings, else of its configuration, else of the tokenizer."""
    holders = (model.generation_config, model.config)

    def stated(name: str) -> Any:
        return next((value for holder in holders if (value := getattr(holder, name, None)) is not None), None)

    ends = stated_ends(stated("eos_token_id"), tokenizer)
    start = stated("decoder_start_token_id") if model.config.is_encoder_decoder else None
    used = GenerationTokens(distinct_ends(ends), start)
    return StatedTokens(used, GenerationTokens((), None))


@contextmanager
def borrowed(model: Any) -> Iterator[None]:
    """Put a model in the state of a recorded pass, and restore its own state whatever happens.

    That is: not training, no autocast, and no generation settings of its own. Afterwards its modules' attributes and
    buffers and all random states are as before, so that a training run continues as if nothing had happened.
    Raises MoewhError for a model that is being recorded.
    """
    if any(module in RECORDED for module in model.modules()):
        raise MoewhError("the model's passes are being recorded (moewh.record). Leave that block first.")
    before = [(module, dict(vars(module)), dict(module._buffers)) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    try:
        for module, _, _ in before:
            module.training = False
        if getattr(model, "generation_config", None) is not None:
            model.generation_config = GenerationConfig()
        with torch.random.fork_rng(devices), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for module, attributes, buffers in before:
            vars(module).update(attributes)
            module._buffers.update(buffers)
        random.setstate(python)
        np.random.set_state(numpy)
