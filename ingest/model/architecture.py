"""From a configuration to the model class that holds its layers, loaded or empty. Refuses what cannot be recorded."""

from __future__ import annotations

import copy
import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, get_hf_quantizer
from transformers.utils import CONFIG_NAME
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from moewh.ingest.model.repository import broken_links
from moewh.ingest.options import DEMO
from moewh.warehouse.errors import MoewhError, UsageError

OLDEST_TRANSFORMERS = (5, 19)
_MOST = {"experts": 1 << 20, "layers": 1 << 15}
_COUNT = re.compile(r"(?:^|_)(?:(?P<experts>experts?)|(?P<layers>layers?|depth|blocks))(?:_num)?$")
"""The configuration fields that hold these counts."""
_NOT_A_HUB_ID = re.compile(
    r"(?=.*(?:://|@))(?:(?:https?://(?:www\.)?(?:huggingface\.co|hf\.co)|hf:/)/)?(?P<id>[\w.-]+/[\w.-]+)"
    r"(?:@(?P<at>[\w./-]+)|/tree/(?P<tree>[\w./-]+?))?/?"
)
DEQUANTIZED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Ways to store weights in fewer bits that transformers can undo without a GPU."""
_AUTO_CLASSES: tuple[Any, ...] = (
    # Image models first: for such a configuration, the causal class would be the text stack alone.
    AutoModelForImageTextToText,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    AutoModel,
)


def check_versions() -> None:
    """Raise MoewhError if transformers is too old."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if version < OLDEST_TRANSFORMERS:
        oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
        raise MoewhError(
            f"transformers {transformers.__version__} is too old: experts cannot be observed as they run. "
            f"Install transformers {oldest} or newer."
        )


def read_config(location: str, **arguments: Any) -> Any:
    """Read a model's configuration; for a model of several stages (Qwen-Omni), that of the stage that reads text.

    Raises whatever transformers raises, and MoewhError for an impossible configuration.
    """
    stored, _ = PreTrainedConfig.get_config_dict(location, **arguments)
    check_counts(stored)
    config = AutoConfig.from_pretrained(location, **arguments)
    return getattr(config, "thinker_config", None) or config


def require_named(name: str) -> None:
    """Raise UsageError for an empty name of a model or tokenizer, which would mean the current folder."""
    if not name:
        raise UsageError(
            "a name given for a model or tokenizer is empty. Is a variable unset? Give a hub id, or . for this folder."
        )


def check_location(model: str, revision: str | None = None, *, settings: bool = False) -> None:
    """Raise MoewhError for a path that is not a model: a file of weights, or a folder without a configuration.

    A hub id passes; with `settings`, so does a configuration file. Raises UsageError for a revision of a path.
    """
    require_named(model)
    path = Path(model)
    if model == DEMO:
        return
    if not path.exists():
        check_hub_id(model)
        return
    if revision is not None:
        kind = "folder" if path.is_dir() else "file"
        raise UsageError(f"--revision {revision} goes with a hub id; {path} is a {kind}. Name its folder.")
    if not path.is_dir():
        if settings and path.suffix == ".json":
            return
        kind = "a GGUF file, which moewh does not read" if path.suffix == ".gguf" else "a file"
        raise MoewhError(
            f"cannot load the model {path}: it is {kind}. Give the folder that holds {CONFIG_NAME} and the weights as "
            "safetensors."
        )
    if not any((path / name).is_file() for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME)):
        raise MoewhError(f"cannot load the model {path}: {_without_configuration(path)}")


def check_hub_id(model: str) -> None:
    """Raise UsageError for what people give instead of a hub id: the address of its page, or a revision after an @."""
    if meant := _NOT_A_HUB_ID.fullmatch(model):
        revision = meant["tree"] or meant["at"]
        more = f" with --revision {revision}" if revision else ""
        raise UsageError(f"{model} is not a hub id. Give {meant['id']}{more}.")


def _without_configuration(folder: Path) -> str:
    """Return what a folder without a configuration holds instead, and what to do."""
    checkpoints = sorted(
        {found.parent.name for name in (CONFIG_NAME, ADAPTER_CONFIG_NAME) for found in folder.glob(f"*/{name}")}
    )
    if checkpoints:
        several = f"{', '.join(checkpoints[:5])}{', …' if len(checkpoints) > 5 else ''}"
        return f"it has no {CONFIG_NAME}; its sub-folders are checkpoints: {several}. Give one of them."
    if broken := broken_links(folder, CONFIG_NAME):
        return f"{broken[0]} is a link to a file that does not exist. Fetch the model again."
    files = sorted(found.name for found in folder.iterdir() if not found.name.startswith(".") and found.is_file())
    if not files:
        return f"the folder {'holds no files' if any(folder.iterdir()) else 'is empty'}. Give a model's folder."
    return (
        f"it holds {', '.join(files[:3])}{', …' if len(files) > 3 else ''} and no {CONFIG_NAME}. Give a model's folder."
    )


def check_counts(stored: Any, path: str = "") -> None:
    """Raise MoewhError for a value that is not a configuration, or one with absurd numbers of layers or experts.

    transformers builds lists of that many entries, which would exhaust memory.
    """
    if not isinstance(stored, dict):
        raise MoewhError(f"{path or CONFIG_NAME} is not a JSON object. Fetch the model's configuration again.")
    for name, value in stored.items():
        if isinstance(value, dict):
            check_counts(value, f"{path}{name}.")
        elif (counted := _COUNT.search(name)) and isinstance(value, (int, float)):
            most = _MOST[str(counted.lastgroup)]
            if value > most:
                raise MoewhError(
                    f"the configuration has {path}{name} = {value}, and moewh takes at most {most:,}. "
                    f"Correct {CONFIG_NAME}, or fetch it again."
                )


def model_class(config: Any, trust_remote_code: bool = False) -> Any:
    """Return the class to load a model with: the one its checkpoint names, else the first that takes its configuration.

    Raises MoewhError if there is none.
    """
    if trust_remote_code and getattr(config, "auto_map", None):
        named = (auto for auto in _AUTO_CLASSES if auto.__name__ in config.auto_map)
        return next(named, AutoModelForCausalLM)
    for name in config.architectures or ():
        known = getattr(transformers, name, None)
        if isinstance(known, type) and issubclass(known, PreTrainedModel):
            return known
    for auto in _AUTO_CLASSES:
        if type(config) in auto._model_mapping:
            return auto._model_mapping[type(config)]
    raise MoewhError(
        f"transformers {transformers.__version__} has no language model for model type {config.model_type}. "
        "Install a newer transformers, or use another model."
    )


def loading_arguments(config: Any) -> dict[str, Any]:
    """Return the arguments that from_pretrained needs so that every expert call can be observed.

    Native MXFP4 kernels call neither routers nor experts, so such weights are dequantised to bfloat16 on loading.
    """
    if quantization_method(config) == "mxfp4":
        return {"quantization_config": Mxfp4Config(dequantize=True)}
    return {}


def quantization_method(config: Any) -> str | None:
    """Return the configuration's quantisation method; None for weights that are not quantised."""
    configurations = (config, config.get_text_config(decoder=True))
    stored = next(
        (found for configuration in configurations if (found := getattr(configuration, "quantization_config", None))),
        None,
    )
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def check_quantization(config: Any) -> None:
    """Raise MoewhError for a quantisation that transformers does not know: it would take the numbers without scales."""
    method = quantization_method(config)
    known = any(f"{method}{end}" in AUTO_QUANTIZATION_CONFIG_MAPPING for end in ("", "_4bit", "_8bit"))
    if method not in (None, "None") and not known:  # without a name, transformers goes by the other settings
        raise MoewhError(
            f"the weights are quantised ({method}), which transformers {transformers.__version__} does not read. Give "
            "the model that they were made from."
        )


def dequantizer(config: Any) -> tuple[Any, Any] | None:
    """Return the quantizer that dequantises the weights without a GPU, and the configuration that results.

    None for weights that are not quantised, for a method that cannot be undone, and without accelerate.
    """
    method = quantization_method(config)
    if method not in DEQUANTIZED or importlib.util.find_spec("accelerate") is None:
        return None
    undone = DEQUANTIZED[method](dequantize=True)
    quantizer, config, _ = get_hf_quantizer(copy.deepcopy(config), undone, None, True, {})
    return quantizer, config


def empty_model(config: Any, trust_remote_code: bool = False) -> nn.Module:
    """Build the model on the meta device: shapes without data."""
    kind = model_class(config, trust_remote_code)
    with torch.device("meta"):
        model: nn.Module = (
            kind.from_config(config, trust_remote_code=True) if kind in _AUTO_CLASSES else kind._from_config(config)
        )
    return model


def check_parallel(model: nn.Module) -> None:
    """Raise MoewhError if the model's tensors are spread over processes, where expert indices would be local."""
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "DTensor":
            raise MoewhError(
                f"{name} is spread over several processes (tensor or expert parallel), where expert indices are "
                "local. Load the model whole: one process per model, or --device auto."
            )
