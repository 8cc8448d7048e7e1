"""Check the weights: everything that the recorded forward pass uses must come from the model's files.

transformers fills a parameter that the files lack with random numbers, and continues. Here the files' headers are
checked against the model before any data is loaded: missing and unexpected tensors, the numbers of each layer's
experts, shapes and dtypes. Every difference is refused, by name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import MergeModulelist, WeightConverter, convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from moewh.ingest.families.configuration import text_config
from moewh.ingest.model.layers import OTHER_MODALITY, MoELayers
from moewh.ingest.model.stored import DTYPES, Part, Sources, StoredTensor, conversion, first_names, parameter_sources
from moewh.warehouse.errors import MoewhError

_HEAD = re.compile(r"^(?:lm_head|embed_out|score|classifier|v_head)\b")
"""Heads for tasks other than that of the loaded class."""
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_hidden_layers")
"""Configuration fields for the number of layers that predict tokens further ahead: stored last, never loaded."""
_NUMBER = re.compile(r"\d+")


@dataclass
class Faults:
    """Faults in a model's files: names of tensors, or lines that describe what is wrong."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)

    def raise_any(self, title: str) -> None:
        """Raise MoewhError if there is a fault."""
        if self.missing:
            alike = sorted(self.unexpected, key=lambda name: -_likeness(self.missing[0], name))
            instead = f" The files have {first_names(alike)} instead." if alike else ""
            raise MoewhError(
                f"{title}: its files lack weights that the forward pass uses: {first_names(self.missing)}.{instead} "
                "Complete the files, or give the configuration that belongs to them."
            )
        if self.others:
            raise MoewhError(
                f"{title}: its files do not fit its configuration: {first_names(self.others, '; ')}. "
                "Give the configuration that belongs to these weights, or fetch the files again."
            )
        if self.unexpected:
            raise MoewhError(
                f"{title}: its files hold weights that its configuration has no place for: "
                f"{first_names(self.unexpected)}. Give the configuration that belongs to these weights."
            )


def check_stored(
    title: str,
    model: Any,
    found: MoELayers,
    stored: dict[str, StoredTensor],
    *,
    quantizer: Any = None,
    head: bool = False,
) -> list[str]:
    """Check the stored tensors against a model on the meta device.

    `found` holds the recorded layers; `head` says whether the LM head is used too. Returns the parameters that are not
    stored and that the recorded pass does not need. Raises MoewhError for files that do not match the model.
    """
    sources = parameter_sources(model, stored.values(), quantizer)
    known = model.state_dict()
    used = used_parameters(model, found, head)
    lacking = _not_stored(model, sources, known)
    faults = _source_faults(model, known, sources, quantizer)
    faults.missing += [_as_stored(name, sources) for name in known if name in lacking and name in used]
    faults.unexpected += _without_parameter(model, found, sources, known, quantizer)
    faults.others += _lacking_scales(stored)
    if not faults.missing and not faults.others and quantizer is None:
        faults.others += _shape_faults(model, known, sources)
    faults.raise_any(title)
    return [name for name in known if name in lacking]


def check_sources(title: str, model: Any, names: Collection[str], sources: Sources, quantizer: Any) -> None:
    """Raise MoewhError if a parameter is not made of the tensors it should be, each expert's exactly once."""
    _source_faults(model, names, sources, quantizer).raise_any(title)


def check_loaded(title: str, model: Any, found: MoELayers, info: dict[str, Any], *, head: bool) -> None:
    """Raise MoewhError if transformers itself reports that the pass uses parameters it did not load.

    Used for formats where the loader knows more than the files' headers show.
    """
    used = used_parameters(model, found, head)
    missing = [name for name in model.state_dict() if name in info["missing_keys"] and name in used]
    shapes = [_shapes(name, *shapes) for name, *shapes in sorted(info["mismatched_keys"])]
    Faults(missing, others=shapes + [str(line) for line in info["error_msgs"]]).raise_any(title)


def used_parameters(model: Any, found: MoELayers, head: bool) -> set[str]:
    """Return the names of parameters and buffers that the recorded pass uses: the text stack's and input embeddings'.

    The text stack is the smallest submodel that holds all recorded layers. With `head`, parameters outside the base
    model are used too, except those of another modality.
    """
    stack = text_stack(model, found)
    embeddings = {id(tensor) for tensor in model.get_input_embeddings().state_dict(keep_vars=True).values()}
    base = {id(tensor) for tensor in model.base_model.state_dict(keep_vars=True).values()}
    outside = base if model.base_model is not model else set()
    of_head = _head(model)
    used = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        in_stack = name.startswith(stack) and not OTHER_MODALITY.search(name.removeprefix(stack))
        at_the_end = head and id(tensor) not in outside and not OTHER_MODALITY.search(name)
        if (in_stack and not name.startswith(of_head)) or id(tensor) in embeddings or at_the_end:
            used.add(name)
    return used


def text_stack(model: nn.Module, found: MoELayers) -> str:
    """Return the path (with a dot) of the smallest submodel that holds all recorded layers; "" for the model itself."""
    models = [path for path, module in model.named_modules() if path and isinstance(module, PreTrainedModel)]
    stacks = [f"{path}." for path in models if all(moe.path.startswith(f"{path}.") for moe in found.moe_layers)]
    return max(stacks, key=len, default="")


def unloaded_modules(
    model: nn.Module, found: MoELayers, absent: Collection[str], head: bool
) -> list[tuple[str, nn.Module]]:
    """Return the modules with parameters that are not stored, which a prompt must not reach.

    Modules that hold a recorded layer are left out, and so is a head whose output is not read.
    """
    of_head = _head(model)
    paths = {name.rpartition(".")[0] for name in absent if head or not name.startswith(of_head)}
    return [
        (path, model.get_submodule(path))
        for path in sorted(paths)
        if path and not any(moe.path.startswith(f"{path}.") for moe in found.moe_layers)
    ]


def _head(model: Any) -> tuple[str, ...]:
    """Return the prefixes of the LM head's parameter names; empty for a model without one."""
    head = model.get_output_embeddings()
    return tuple(f"{path}." for path, module in model.named_modules() if module is head)


def _not_stored(model: Any, sources: Sources, known: dict[str, torch.Tensor]) -> set[str]:
    """Return the parameters that are not stored, except those tied to a stored one and those a family never stores."""
    made = sources.made()
    lacking = {name for name in known if name not in made}
    tied: dict[str, set[str]] = {}
    for target, source in model.all_tied_weights_keys.items():
        tied.setdefault(source, {source}).add(target)
    for group in tied.values():
        if group - lacking:
            lacking -= group
    for pattern in model._keys_to_ignore_on_load_missing or ():
        # The value that transformers fills in is right if the checkpoint stores none of them, wrong if it lost some.
        alike = {name for name in known if re.search(pattern, name)}
        if alike <= lacking:
            lacking -= alike
    return lacking


def _as_stored(name: str, sources: Sources) -> str:
    """Return the files' name for a parameter that they lack, by analogy with the same parameter of another layer."""
    numbers = _NUMBER.findall(name)
    for other, parts in sources.parts.items():
        spaces = _NUMBER.split(parts[0].tensor.key)
        if len(parts) == 1 and _NUMBER.split(other) == _NUMBER.split(name) and len(spaces) == len(numbers) + 1:
            return "".join(part + number for part, number in zip(spaces, [*numbers, ""], strict=True))
    return name


def _source_faults(model: Any, names: Collection[str], sources: Sources, quantizer: Any) -> Faults:
    known, faults = model.state_dict(), Faults()
    for name, parts in sources.parts.items():
        if name in known and name in names:
            if quantizer is None:
                _check_dtypes(faults, known[name], parts)
            _check_parts(faults, name, known[name], sources)
    return faults


def _check_dtypes(faults: Faults, parameter: torch.Tensor, parts: list[Part]) -> None:
    """Check that floating-point parameters are stored as floating-point tensors, and integers as integers."""
    for part in parts:
        if _is_float(part.tensor) != parameter.is_floating_point():
            faults.others.append(
                f"{part.tensor.key} is stored as {part.tensor.dtype}, which the model does not compute in"
            )


def _check_parts(faults: Faults, name: str, parameter: torch.Tensor, sources: Sources) -> None:
    """Check that a parameter is made of one tensor, or of exactly one per expert."""
    parts = sources.parts[name]
    by_pattern: dict[str | None, list[StoredTensor]] = {}
    for part in parts:
        by_pattern.setdefault(part.pattern, []).append(part.tensor)
    if (plain := by_pattern.get(None, [])) and len(parts) > 1:
        other = next(part.tensor.key for part in parts if part.tensor != plain[0])
        faults.others.append(f"{plain[0].key} and {other} are the same weight twice")
    for converter in {id(converter): converter for converter in _converters(by_pattern, sources)}.values():
        merge = next((step for step in converter.operations if isinstance(step, MergeModulelist)), None)
        if merge is None:
            continue
        for pattern in converter.source_patterns:
            keys = [tensor.key for tensor in by_pattern.get(pattern, [])]
            if keys and "*" in pattern:
                _check_numbers(faults, keys, parameter.shape[merge.dim])
            elif not keys and "scale" not in pattern:  # experts that are not quantised have no scale
                faults.missing.append(f"{pattern} of {name}")


def _converters(by_pattern: Collection[str | None], sources: Sources) -> Iterator[WeightConverter]:
    return (sources.converters[pattern] for pattern in by_pattern if pattern is not None)


def _check_numbers(faults: Faults, keys: list[str], count: int) -> None:
    """Check that the expert numbers in the keys are exactly 0 to count - 1."""
    before, key_of, after = _expert_numbers(keys)
    faults.missing += [f"{before}{number}{after}" for number in range(count) if number not in key_of]
    faults.unexpected += [key for number, key in sorted(key_of.items()) if number >= count]


def _expert_numbers(keys: list[str]) -> tuple[str, dict[int, str], str]:
    """Split keys that differ in one number: the part before it, the keys by that number, and the part after it.

    With a single key, that is its last number.
    """
    numbers = [list(_NUMBER.finditer(key)) for key in keys]
    differing = [at for at in range(len(numbers[0])) if len({found[at][0] for found in numbers if len(found) > at}) > 1]
    at = differing[-1] if differing else len(numbers[0]) - 1
    first = numbers[0][at]
    return (
        keys[0][: first.start()],
        {int(found[at][0]): key for key, found in zip(keys, numbers, strict=True)},
        keys[0][first.end() :],
    )


def _without_parameter(
    model: Any, found: MoELayers, sources: Sources, known: dict[str, torch.Tensor], quantizer: Any
) -> list[str]:
    """Return the keys in the text stack that the model has no parameter for and that transformers does not ignore."""
    info = SimpleNamespace(missing_keys=set(), unexpected_keys=set(sources.parts) - set(known))
    model._adjust_missing_and_unexpected_keys(info)
    stack = text_stack(model, found)
    modules = {path for path, _ in model.named_modules()} if quantizer is not None else set()
    keys = []
    for name, parts in sources.parts.items():
        reported = name in info.unexpected_keys and name.startswith(stack) and name.rpartition(".")[0] not in modules
        rest = name.removeprefix(stack)
        of_others = OTHER_MODALITY.search(f"{rest}.") or _HEAD.search(rest) or _further_layer(model, rest)
        if reported and not of_others:
            keys += [part.tensor.key for part in parts]
    return keys


def _further_layer(model: Any, name: str) -> bool:
    """Return whether a name belongs to the extra layers, stored after the last, that predict tokens further ahead."""
    text = text_config(model.config)
    counts = [getattr(text, attribute, None) for attribute in _FURTHER_LAYERS]
    further = max((count for count in counts if isinstance(count, int)), default=0)
    layer = re.match(r"layers\.(\d+)\.", name)
    return bool(layer and text.num_hidden_layers <= int(layer[1]) < text.num_hidden_layers + further)


def _lacking_scales(stored: dict[str, StoredTensor]) -> list[str]:
    """Return a fault for each tensor in 8 or 4 bits whose scale is not stored with it."""
    faults = []
    for key, tensor in stored.items():
        scaled = any(f"{key}{end}" in stored for end in ("_scale_inv", "_scale"))
        if tensor.dtype in ("F8_E4M3", "F8_E5M2") and not scaled:
            faults.append(f"{key} is stored as {tensor.dtype} without its scale")
        for one, other in (("_blocks", "_scales"), ("_scales", "_blocks")):
            if key.endswith(one) and key.removesuffix(one) + other not in stored:
                faults.append(f"{key} is there without {key.removesuffix(one) + other}")
    return faults


def _shape_faults(model: Any, known: dict[str, torch.Tensor], sources: Sources) -> list[str]:
    """Let transformers load the tensors without data, and return whatever does not fit.

    Layers are alike, so one parameter of each kind is tried first, and all of them only if one does not fit.
    """
    return _load_faults(model, _one_of_each_kind(known, sources)) and _load_faults(model, sources.parts)


def _one_of_each_kind(known: dict[str, torch.Tensor], sources: Sources) -> dict[str, list[Part]]:
    """Return the sources of one parameter of each kind: of the same shapes, and of the same name except its numbers."""
    kinds: dict[Any, str] = {}
    for name, parts in sources.parts.items():
        stored = tuple((part.pattern, part.tensor.shape, part.tensor.dtype) for part in parts)
        shapes = tuple(known[made].shape for made in sorted(sources.made_of(name)) if made in known)
        kinds.setdefault((_NUMBER.sub("#", name), stored, shapes), name)
    return {name: sources.parts[name] for name in kinds.values()}


def _load_faults(model: Any, made_of: dict[str, list[Part]]) -> list[str]:
    tensors = {
        part.tensor.key: torch.empty(part.tensor.shape, dtype=DTYPES.get(part.tensor.dtype), device="meta")
        for parts in made_of.values()
        for part in parts
    }
    config = LoadStateDictConfig(weight_mapping=conversion(model, None), device_map={"": "meta"})
    info, _ = convert_and_load_state_dict_in_model(model, tensors, config)
    faults = [_shapes(*mismatch) for mismatch in sorted(info.mismatched_keys, key=lambda mismatch: mismatch[0])]
    for name in sorted(info.conversion_errors):
        faults += _differing(name, [part.tensor for part in made_of.get(name, [])])
    return faults


def _differing(name: str, tensors: list[StoredTensor]) -> Iterator[str]:
    """Yield a fault for each tensor whose shape differs from the most common one, so that they cannot be combined."""
    shapes = [tensor.shape for tensor in tensors]
    usual = max(set(shapes), key=shapes.count, default=())
    odd = [tensor for tensor in tensors if tensor.shape != usual]
    yield from (f"{tensor.key} is {_size(tensor.shape)}, others beside it {_size(usual)}" for tensor in odd)
    if not odd:
        yield f"the tensors stored for {name} cannot be combined"


def _shapes(name: str, stored: Any, expected: Any) -> str:
    return f"{name} is {_size(stored)} in the files, {_size(expected)} by the configuration"


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape)) or "a single number"


def _is_float(tensor: StoredTensor) -> bool:
    return DTYPES[tensor.dtype].is_floating_point if tensor.dtype in DTYPES else False


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, name, other, autojunk=False).quick_ratio()
